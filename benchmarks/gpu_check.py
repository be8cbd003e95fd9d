"""Check the trainings on a GPU, and time them there: `make gpu-check` (five minutes; neither network nor DVC nor MLflow).

What runs on a GPU alone is a training's step as a captured CUDA graph. Checked is that it trains to the weights of the step that
is not captured, also beside others, that an interrupted training resumes to them, and that bf16 costs no accuracy. Timed are
several trainings on one device, and each training of `make bench` in four ways that take turns. Data are made here unless
--distillation and --baselines name .npz files. It writes benchmarks/results/<device>-check.md, and fails if a check does. With
`--device cpu` nothing is captured: a small run shows that every other line works.
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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor

from benchmarks import bench
from pipeline.core.files import md5
from pipeline.core.provenance import commit
from pipeline.data.dataset import load_dataset
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import Source, read_source
from pipeline.networks.inference import choose_device, choose_precision
from pipeline.training import loop
from pipeline.training.recipe import Recipe, train

SIZES = {"distillation": (10, 54_000, 6_000), "baselines": (2, 4_708, 524)}  # classes, images for training and validation
FEW = {"distillation": 0.1, "baselines": 0.5}  # of them, for what is slow
PARAMS = yaml.safe_load((bench.ROOT / "params.yaml").read_text())
STUDENT = "student_distilled"
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model of the bench, changes of its recipe and settings
    "compact_cnn, kd, views, cosine": (STUDENT, {"augmentation": "shifts"}, {"schedule": "cosine"}),
    "compact_cnn, kd, a tenth of the labels, one_cycle": (STUDENT, {"label_fraction": 0.1}, {"schedule": "one_cycle"}),
    **{
        f"compact_cnn, {name}": (STUDENT, {"method": {"name": name} | PARAMS[name]}, {})
        for name in ("dkd", "dist", "wttm", "rkd")
    },
    "simple_cnn, views, weight decay": ("simple_cnn", {"augmentation": "shifts"}, {"weight_decay": 0.01}),
    "resnet18, class weights, one_cycle": ("resnet18", {"class_weights": "balanced"}, {"schedule": "one_cycle"}),
    "resnet18, steps": ("resnet18", {}, {"schedule": "steps"}),
}
EPOCHS, SEEDS = 5, 5  # of a timed stage, as in params.yaml
AS_GOOD = 0.02  # in accuracy, of bf16 and fp32

Found = tuple[str, list[list[str]], int]  # of a part: its words, a table with its header, and how many checks failed


class Place(NamedTuple):
    """Where, and on which prepared sets by track, everything runs."""

    device: torch.device
    folder: Path
    data: dict[str, Path]
    few: dict[str, Path]
    repeats: int


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
    facts, failures = bench.describe(device), 0
    text = f"# {facts['name']}: trainings checked and timed\n\nWritten by `make gpu-check` at commit {commit()[:12]}"
    text += f": {', '.join(f'{name} {value}' for name, value in facts.items())}.\n"
    with tempfile.TemporaryDirectory() as name:
        place = prepared(device, Path(name), {track: getattr(arguments, track) for track in SIZES}, arguments.repeats)
        for title, part in {"The step": steps, "Seeds on one device": seeds, "Against the ordinary loop": speed}.items():
            try:
                words, rows, failed = part(place)
            except Exception as error:  # is a finding
                traceback.print_exc()
                words, rows, failed = f"{type(error).__name__}: {error}", [], 1
            text += f"\n## {title}\n\n{words}{f' **{failed} FAILED.**' if failed else ''}\n"
            text += f"\n{tabulate(rows, 'firstrow', 'github', disable_numparse=True)}\n" if rows else ""
            failures += failed
    text += f"\nAll in {time.perf_counter() - start:.0f} s.\n"
    path = arguments.results / f"{re.sub(r'[^a-z0-9]+', '-', facts['name'].lower()).strip('-')}-check.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)
    sys.exit(bool(failures))


def prepared(device: torch.device, folder: Path, files: dict[str, Path | None], repeats: int) -> Place:
    """Prepared sets of these files, or of images made here; on a CPU of a fiftieth of the images."""
    for track, file in files.items():
        prepare(read_source(str(file.resolve())) if file else made(*SIZES[track]), 0.1, folder / track)
    share = 1.0 if device.type == "cuda" else 0.02
    data, few = (
        {track: bench.cut(folder, track, share * part[track]) for track in files} for part in (dict.fromkeys(FEW, 1), FEW)
    )
    return Place(device, folder, data, few, repeats)


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
    if model == STUDENT:
        teachers = (train(recipe(place, "teacher", place.few, 1), place.folder / "teachers", lambda _: None),)
    new = bench.recipe(model, data[bench.ARCHITECTURES[model][0]], 0, place.device, epochs, teachers)
    return replace(new, settings=new.settings | settings)


def steps(place: Place) -> Found:
    """Train each variant in both precisions: captured, not captured, and interrupted after the first of two epochs."""
    rows, failures = [["training", "precision", "not captured", "resumed after epoch 1", "accuracy"]], 0
    for title, (model, changes, settings) in VARIANTS.items():
        of_precisions = []  # of each precision: weights and accuracy
        for precision in ("fp32", "bf16"):
            training = replace(recipe(place, model, place.few, 2, precision=precision, **settings), **changes)
            try:
                weights, accuracy = three_ways(training, place.folder / title / precision)
            except Exception as error:
                traceback.print_exc()
                rows.append([title, precision, f"{type(error).__name__}: {error}"[:100], "", ""])
                failures += 1
                continue
            apart = [distance(weights[0], others) for others in weights[1:]]
            rows.append([title, precision, *(f"{by:.1e}" if by else "to the bit" for by in apart), f"{accuracy:.4f}"])
            failures += any(apart)
            of_precisions.append((weights[0], accuracy))
        failures += len(of_precisions) == 2 and (
            distance(of_precisions[0][0], of_precisions[1][0]) == 0 or abs(of_precisions[0][1] - of_precisions[1][1]) > AS_GOOD
        )
    words = (
        "Two epochs. How far weights of the training not captured, and of the resumed one, are from the captured one's: checked"
        " to be nowhere. Accuracy on validation images: bf16, whose weights are checked to be others, checked to be within"
        f" {AS_GOOD:g} of fp32's."
    )
    return words, rows, failures


def three_ways(training: Recipe, folder: Path) -> tuple[list[dict[str, Tensor]], float]:
    """The weights of a training captured, not captured, and resumed after its first epoch; the first's accuracy at its end."""
    records = []

    def interrupt(record: Any) -> None:
        if record.history:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        train(training, folder / "resumed", interrupt)
    with not_captured():
        train(training, folder / "eager", lambda _: None)
    weights = [load_file(train(training, folder / way, records.append)) for way in ("captured", "eager", "resumed")]
    return weights, records[-1].history[-1].val_accuracy


def not_captured() -> contextlib.AbstractContextManager:
    """Where trainings of this process launch every kernel of every step."""
    return mock.patch.object(loop, "_captured", lambda step, *_: step)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two networks' weights."""
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def seeds(place: Place) -> Found:
    """Stages by how many seeds train at a time; failed are those whose weights depend on that."""
    rows, failures = [["training", "images", "at a time", "s / training", "images / s", "weights"]], 0
    numbers = (1, 2, 4, 8) if place.device.type == "cuda" else (1, 2)
    for model, of_track, ways in (
        ("student_alone", place.data, numbers),
        (STUDENT, place.few, numbers[:: len(numbers) - 1]),
        ("resnet18", place.few, numbers[:: len(numbers) - 1]),
    ):
        data, before = of_track[bench.ARCHITECTURES[model][0]], {}
        images = load_dataset(data).images["train"]
        for number in ways:
            spent = bench.ours("c", model, data, numbers[-1], place.folder, place.device, EPOCHS, number)["wall_seconds"]
            spent /= numbers[-1]
            weights = {path.name: md5(path) for path in (place.folder / f"c {model}").iterdir()}
            before, same = before or weights, weights == (before or weights)
            failures += not same
            row = [model, f"{images:,}", str(number), f"{spent:.2f}", f"{EPOCHS * images / spent:,.0f}"]
            rows.append([*row, "the same" if same else "OTHERS"])
    words = (
        f"{numbers[-1]} seeds of {EPOCHS} epochs, with their start. On a GPU they share a process, each in a thread and stream."
        " Weights are checked to be those of one at a time."
    )
    return words, rows, failures


def speed(place: Place) -> Found:
    """Images per second of the bench's trainings: (a), our loop with and without capture, and a stage."""
    precision = choose_precision("auto", place.device)
    rate, track = bench.matmul_rate(place.device, precision), {"a": 0.0, "stage": 0.0}  # seconds per image
    rows = [["training", "(a)", "not captured", "captured", "stage", "captured / (a)", "stage / (a)", "of rate", "s to start"]]
    for model, (name, _, _) in bench.ARCHITECTURES.items():
        dataset, figures = load_dataset(place.data[name]), {way: [] for way in ("a", "eager", "captured", "stage", "start")}
        for _ in range(place.repeats):
            figures["a"].append(ordinary(place, model))
            with not_captured():
                figures["eager"].append(under_way(place, model, place.few)[0])
            for way, value in zip(("captured", "start"), under_way(place, model, place.data), strict=True):
                figures[way].append(value)
            spent = bench.ours("c", model, place.data[name], SEEDS, place.folder, place.device, EPOCHS)["seconds_per_epoch"]
            figures["stage"].append(dataset.images["train"] / spent)
        middle = {way: statistics.median(values) for way, values in figures.items()}
        ratios = [stage / a for stage, a in zip(figures["stage"], figures["a"], strict=True)]
        of_rate = bench.flops_per_image(model, {name: dataset}) * middle["captured"] / 1e9 / rate
        track = {way: spent + (name == "distillation") / middle[way] for way, spent in track.items()}
        row = [f"{middle[way]:,.0f}" for way in ("a", "eager", "captured", "stage")] + [f"{middle['captured'] / middle['a']:.1f}"]
        row += [f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})", f"{of_rate:.2%}"]
        rows.append([model, *row, f"{middle['start']:.2f}"])
    words = (
        f"Images per second, medians of {place.repeats} in turn: (a), the loop of benchmarks/peer.py; one training under way, not"
        f" captured and captured, validation and saving included; a stage of {SEEDS} seeds of {EPOCHS} epochs, with its start,"
        f" and its ratio's range. Of rate: captured, of the {precision} matrix product's, {rate:,.0f} GFLOP/s. To start: in a"
        " process that has trained before."
    )
    if track["stage"]:
        words += f" The distillation track as stages: {track['a'] / track['stage']:.1f} times as fast as (a)."
    return words, rows, 0


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
