"""Check the trainings on a GPU, and time them there: `make gpu-check` (five minutes; neither network nor DVC nor MLflow).

What runs on a GPU alone is a training's step as a captured CUDA graph. Checked is that it trains to the weights of the step that
is not captured, that an interrupted training resumes to them, and that bf16 costs no accuracy. Timed are several trainings on one
device, and each training of `make bench` in four ways that take turns. Data are made here unless --distillation and --baselines
name .npz files. It writes benchmarks/results/<device>-check.md, and fails if a check does. With `--device cpu` nothing is
captured: a small run shows that every other line works.
"""

import argparse
import contextlib
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate

from benchmarks import bench
from pipeline.core.provenance import commit, machine
from pipeline.data.dataset import load_dataset
from pipeline.data.prepared import load_training_data
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import Source, read_source
from pipeline.networks.inference import choose_device, choose_precision
from pipeline.training import loop
from pipeline.training.recipe import Recipe, _training, train

SIZES = {"distillation": (10, 54_000, 6_000), "baselines": (2, 4_708, 524)}  # classes, images for training and validation
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model of the bench, changes of its recipe and settings
    "compact_cnn, distilled": ("student_distilled", {}, {}),
    "compact_cnn, distilled, views, cosine": ("student_distilled", {"augmentation": "shifts"}, {"schedule": "cosine"}),
    "compact_cnn, a tenth of the labels, one_cycle": ("student_distilled", {"label_fraction": 0.1}, {"schedule": "one_cycle"}),
    "simple_cnn, class weights, cosine": ("simple_cnn", {"class_weights": "balanced"}, {"schedule": "cosine"}),
    "simple_cnn, views, weight decay": ("simple_cnn", {"augmentation": "shifts"}, {"weight_decay": 0.01}),
    "resnet18, class weights, one_cycle": ("resnet18", {"class_weights": "balanced"}, {"schedule": "one_cycle"}),
    "resnet18, views, steps": ("resnet18", {"augmentation": "shifts"}, {"schedule": "steps"}),
}
EPOCHS, SEEDS = 5, 5  # of a timed stage, as in params.yaml
AS_GOOD = 0.02  # in accuracy, of bf16 and fp32


class Place(NamedTuple):
    """Where, and on which prepared sets by track, everything runs."""

    device: torch.device
    folder: Path
    data: dict[str, Path]
    few: dict[str, Path]  # some of the images, for what is slow


class Table(NamedTuple):
    """What a part of the check found, in how many cases not what it should."""

    header: list[str]
    rows: list[list[str]]
    words: str
    failures: int = 0

    def lines(self, title: str) -> list[str]:
        """As Markdown."""
        lines = ["", f"## {title}", "", self.words + (f" **{self.failures} FAILED.**" if self.failures else "")]
        return [*lines, "", tabulate(self.rows, self.header, tablefmt="github", disable_numparse=True)] if self.rows else lines


def main(*options: str) -> None:
    """Parse the command line, check, write; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--distillation", type=Path, help="data of the students' track, .npz")
    parser.add_argument("--baselines", type=Path, help="data of the baselines, .npz")
    parser.add_argument("--repeats", type=int, default=3, help="how often each way of a training is timed")
    parser.add_argument("--results", type=Path, default=bench.ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(options or None)
    start, device = time.perf_counter(), choose_device(arguments.device)
    facts = {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    facts = {"name": f"{machine().get('processor')}, {machine()['cores']} cores"} | facts | machine() | {"commit": commit()[:12]}
    rates = {kind: bench.matmul_rate(device, kind) for kind in ("fp32", "bf16")}
    lines = [
        f"# {facts['name']}: trainings checked and timed",
        "",
        f"Written by `make gpu-check`. {', '.join(f'{name}: {value}' for name, value in facts.items())}.",
        f"Matrix product: {', '.join(f'{kind} {rate:,.0f} GFLOP/s' for kind, rate in rates.items())}.",
    ]
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        place = prepared(device, Path(name), {track: getattr(arguments, track) for track in SIZES})
        for title, part in {
            "The step": lambda: steps(place),
            "Seeds on one device": lambda: side_by_side(place),
            "Against the ordinary loop": lambda: speed(place, arguments.repeats, rates[choose_precision("auto", device)]),
        }.items():
            table = caught(part)
            failures += table.failures
            lines += table.lines(title)
            print(*table.lines(title), sep="\n", flush=True)
    lines += ["", f"All in {time.perf_counter() - start:.0f} s."]
    path = arguments.results / f"{re.sub(r'[^a-z0-9]+', '-', facts['name'].lower()).strip('-')}-check.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    sys.exit(bool(failures))


def caught(part: Callable[[], Table]) -> Table:
    """What `part` finds; that it breaks is a finding too."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        return Table([], [], f"{type(error).__name__}: {error}", 1)


def prepared(device: torch.device, folder: Path, files: dict[str, Path | None]) -> Place:
    """Prepared sets of these files, or of images made here; on a CPU of a fiftieth of the images."""
    for track, file in files.items():
        prepare(read_source(str(file.resolve())) if file else made(*SIZES[track]), 0.1, folder / track)
    share = 1.0 if device.type == "cuda" else 0.02
    data, few = ({track: bench.cut(folder, track, share * part) for track in files} for part in (1.0, 0.2))
    return Place(device, folder, data, few)


def made(classes: int, train_images: int, val_images: int) -> Source:
    """Images, 28x28 and grey: a pattern per class, shifted by up to 4 pixels each way, with noise."""
    random, splits = np.random.default_rng(0), {}
    patterns = random.normal(size=(classes, 9, 9)).repeat(4, axis=1).repeat(4, axis=2) * 50 + 128
    for split, count in {"train": train_images, "val": val_images, "test": 100}.items():
        labels, down, right = random.integers(classes, size=count), *random.integers(9, size=(2, count, 1, 1))
        shifted = patterns[labels[:, None, None], np.arange(28)[:, None] + down, np.arange(28) + right]
        images = (shifted + random.normal(scale=80, size=shifted.shape)).clip(0, 255).astype(np.uint8)
        splits[split] = images[..., None], labels
    return Source("made.npz", [str(number) for number in range(classes)], splits)


def recipe(place: Place, model: str, data: dict[str, Path], epochs: int, **settings: Any) -> Recipe:
    """The bench's training of a model with changed settings; a distilled student's teacher is trained for an epoch."""
    teachers = ()
    if model == "student_distilled":
        teachers = (train(recipe(place, "teacher", place.few, 1), place.folder / "teachers", lambda _: None),)
    new = bench.recipe(model, data[bench.ARCHITECTURES[model][0]], 0, place.device, epochs, teachers)
    return replace(new, settings=new.settings | settings)


def steps(place: Place) -> Table:
    """Train each variant in both precisions: captured, not captured, and interrupted after the first of two epochs."""
    rows, failures = [], 0
    for title, (model, changes, settings) in VARIANTS.items():
        found = []  # of each precision: weights and accuracy
        for precision in ("fp32", "bf16"):
            training = replace(recipe(place, model, place.few, 2, precision=precision, **settings), **changes)
            with tempfile.TemporaryDirectory(dir=place.folder) as name:
                resumed, eager, captured, records = Path(name, "resumed"), Path(name, "eager"), Path(name, "captured"), []
                with contextlib.suppress(InterruptedError):
                    train(training, resumed, interrupt)
                with not_captured():
                    train(training, eager, lambda _: None)
                weights = [load_file(train(training, root, records.append)) for root in (captured, eager, resumed)]
            apart = [distance(weights[0], others) for others in weights[1:]]
            failures += any(apart)
            found.append((weights[0], records[-1].history[-1].val_accuracy))
            other = f"{distance(found[0][0], weights[0]):.1e}"
            rows.append([title, precision, *(f"{by:.1e}" if by else "to the bit" for by in apart), other, f"{found[-1][1]:.4f}"])
        failures += distance(found[0][0], found[1][0]) == 0 or abs(found[0][1] - found[1][1]) > AS_GOOD
    header = ["training", "precision", "not captured", "resumed after epoch 1", "fp32", "accuracy"]
    words = (
        "Two epochs. The largest difference of a weight of the captured training from the one not captured, the resumed one, both"
    )
    words += (
        " checked to be none, and the one in fp32; the last epoch's accuracy on validation images, of bf16 checked to be within"
    )
    return Table(header, rows, f"{words} {AS_GOOD:g} of fp32's.", failures)


def interrupt(record: Any) -> None:
    """End a training after its first epoch."""
    if record.history:
        raise InterruptedError


def not_captured() -> contextlib.AbstractContextManager:
    """Where trainings of this process launch every kernel of every step."""
    return mock.patch.object(loop, "_captured", lambda step, *_: step)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two networks' weights."""
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def side_by_side(place: Place) -> Table:
    """Trainings of the lone student on one device: in processes, as a stage starts them, and in threads of one process."""
    data, rows, numbers = place.data["distillation"], [], (1, 2, 4, 8) if place.device.type == "cuda" else (1, 2)
    images = load_dataset(data).images["train"]
    for number in numbers:
        count = max(4, number)
        spent = bench.ours("c", "student_alone", data, count, place.folder, place.device, EPOCHS, number)["wall_seconds"] / count
        rows.append([f"{number} at a time, a process each, with their start", f"{spent:.2f}", f"{EPOCHS * images / spent:,.0f}"])
    for number in numbers:
        spent = threads(place, number)
        rows.append([f"{number} streams of one process, once started", f"{spent:.2f}", f"{EPOCHS * images / spent:,.0f}"])
    return Table(["way", "s / training", "images / s"], rows, f"student_alone, {EPOCHS} epochs of {images:,} images.")


def threads(place: Place, count: int) -> float:
    """Seconds per training of `count`, each in a thread with a stream of its own: EPOCHS epochs after the first."""
    training = recipe(place, "student_alone", place.data, 1 + EPOCHS, precision=choose_precision("auto", place.device))
    data = load_training_data(training.data, place.device)
    trainings = [_training(replace(training, seed=seed), place.device, data, None)[1] for seed in range(count)]
    for epochs in trainings:
        next(epochs)  # returns when the device has finished

    def rest(epochs: Iterator) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if place.device.type == "cuda" else contextlib.nullcontext():
            list(epochs)

    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(rest, trainings))
    return (time.perf_counter() - start) / count


def speed(place: Place, repeats: int, rate: float) -> Table:
    """Images per second of the bench's trainings: (a), our loop with and without capture, and a stage; `rate` is in GFLOP/s."""
    rows, track = [], {"a": 0.0, "stage": 0.0}  # seconds per image
    for model, (name, _, _) in bench.ARCHITECTURES.items():
        dataset, found = load_dataset(place.data[name]), {way: [] for way in ("a", "eager", "captured", "stage", "start")}
        for _ in range(repeats):
            found["a"].append(ordinary(place, model))
            with not_captured():
                found["eager"].append(under_way(place, model, place.few)[0])
            for way, figure in zip(("captured", "start"), under_way(place, model, place.data), strict=True):
                found[way].append(figure)
            spent = bench.ours("c", model, place.data[name], SEEDS, place.folder, place.device, EPOCHS)["seconds_per_epoch"]
            found["stage"].append(dataset.images["train"] / spent)
        middle = {way: statistics.median(values) for way, values in found.items()}
        ratios = [stage / a for stage, a in zip(found["stage"], found["a"], strict=True)]
        of_rate = bench.flops_per_image(model, {name: dataset}) * middle["captured"] / 1e9 / rate
        track = {way: spent + (name == "distillation") / middle[way] for way, spent in track.items()}
        row = [
            model,
            *(f"{middle[way]:,.0f}" for way in ("a", "eager", "captured", "stage")),
            f"{middle['captured'] / middle['a']:.1f}",
        ]
        row += [
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})",
            f"{of_rate:.2%}",
            f"{middle['start']:.2f}",
        ]
        rows.append(row)
    header = [
        "training",
        "(a)",
        "not captured",
        "captured",
        "stage",
        "captured / (a)",
        "stage / (a), range",
        "of rate",
        "s to start",
    ]
    words = (
        f"Images per second, medians of {repeats} in turn: (a), the ordinary loop of benchmarks/peer.py; one training's step, not"
    )
    words += f" captured and captured; a stage of {SEEDS} seeds of {EPOCHS} epochs with their start. Of rate: captured, of the"
    words += " matrix product's. To start: a training in a process that has trained before."
    if track["stage"]:
        words += f" The distillation track as stages: {track['a'] / track['stage']:.1f} times as fast as (a)."
    return Table(header, rows, words)


def ordinary(place: Place, model: str) -> float:
    """Images per second of (a), with PyTorch's own number of threads and choice of algorithms."""
    data, used = place.few[bench.ARCHITECTURES[model][0]], torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_deterministic_debug_mode("default")
    spent = bench.peers("a", model, data, 1, place.folder, place.device, 1)["seconds_per_epoch"]
    torch.set_num_threads(used)
    choose_device(place.device.type)
    return load_dataset(data).images["train"] / spent


def under_way(place: Place, model: str, data: dict[str, Path]) -> tuple[float, float]:
    """Images per second of a training after its first epoch, and the seconds that the first took beyond that."""
    ends, training = [], recipe(place, model, data, 4)
    with tempfile.TemporaryDirectory(dir=place.folder) as root:
        train(
            training, Path(root), lambda record: ends.append(record.seconds or 0.0)
        )  # at the start, after each epoch, at the end
    first, *later = np.diff(ends[:5]).tolist()
    return load_dataset(training.data).images["train"] / statistics.median(later), first - statistics.median(later)


if __name__ == "__main__":
    main()
