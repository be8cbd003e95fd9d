"""Check the trainings on a GPU, and time them there: `make gpu-check` (minutes; no network, neither DVC nor MLflow).

What runs on a GPU alone is a training's step as a captured CUDA graph. Checked is that it trains to the weights of the step that
is not captured, that an interrupted training resumes to them, and that bf16 arithmetic does not cost accuracy. Timed are several
trainings on one device, and each training of `make bench` in three ways that take turns. Data are made here unless --distillation
or --baselines name an .npz file. It writes benchmarks/results/<device>-check.md, and fails if a check does. With `--device cpu`
nothing is captured: a small run shows that every other line works.
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
from pipeline.data.dataset import Dataset
from pipeline.data.prepared import load_training_data
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import Source, read_source
from pipeline.networks.inference import choose_device, choose_precision
from pipeline.training import loop
from pipeline.training import recipe as recipes
from pipeline.training.recipe import Recipe, train

SIZES = {"distillation": (10, 54_000, 6_000), "baselines": (2, 4_708, 524)}  # classes, images for training and validation
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model of the bench, changes of its recipe and settings
    "compact_cnn, distilled": ("student_distilled", {}, {}),
    "compact_cnn, distilled, views, cosine": ("student_distilled", {"augmentation": "shifts"}, {"schedule": "cosine"}),
    "compact_cnn, a tenth of the labels, one_cycle": ("student_distilled", {"label_fraction": 0.1}, {"schedule": "one_cycle"}),
    "simple_cnn, class weights, cosine": ("simple_cnn", {"class_weights": "balanced"}, {"schedule": "cosine"}),
    "simple_cnn, views, weight decay, steps": (
        "simple_cnn",
        {"augmentation": "flips_and_shifts"},
        {"schedule": "steps", "weight_decay": 0.01},
    ),
    "resnet18, class weights, one_cycle": ("resnet18", {"class_weights": "balanced"}, {"schedule": "one_cycle"}),
    "resnet18, views": ("resnet18", {"augmentation": "shifts"}, {}),
}
EPOCHS = 5  # of a timed training, as in params.yaml
AS_GOOD = 0.02  # in accuracy, of bf16 and fp32


class Place(NamedTuple):
    """Where and on what everything runs."""

    device: torch.device
    folder: Path
    datasets: dict[str, Dataset]
    data: dict[str, Path]  # all images of a track
    few: dict[str, Path]  # some of them


class Table(NamedTuple):
    """What a part of the check found."""

    header: list[str]
    rows: list[list[Any]]
    words: str
    failures: int = 0


def main() -> None:
    """Parse the command line, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--distillation", type=Path, help="data of the students' track, .npz")
    parser.add_argument("--baselines", type=Path, help="data of the baselines, .npz")
    parser.add_argument("--repeats", type=int, default=3, help="how often each way of a training is timed")
    parser.add_argument("--results", type=Path, default=bench.ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    start, device = time.perf_counter(), choose_device(arguments.device)
    rates = {kind: bench.matmul_rate(device, kind) for kind in ("fp32", "bf16")}
    with tempfile.TemporaryDirectory() as name:
        place = prepared(device, Path(name), {track: getattr(arguments, track) for track in SIZES})
        parts = {
            "The step": lambda: equal(place),
            "Seeds on one device": lambda: seeds(place),
            "Against the ordinary loop": lambda: speed(place, arguments.repeats, rates),
        }
        tables = {title: caught(title, part) for title, part in parts.items()}
    facts = (
        machine() | {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        if device.type == "cuda"
        else machine()
    )
    text = markdown(facts, place.datasets, rates, tables, time.perf_counter() - start)
    slug = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", f"{facts['processor']}-{facts['cores']}-cores")).lower()).strip("-")
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{slug}-check.md").write_text(text)
    sys.exit(any(table.failures for table in tables.values()))


def caught(title: str, part: Callable[[], Table]) -> Table:
    """What `part` finds, printed too; a failure is a finding."""
    try:
        table = part()
    except Exception as error:
        traceback.print_exc()
        table = Table([], [], f"{type(error).__name__}: {error}", 1)
    print(*section(title, table), sep="\n", flush=True)
    return table


def prepared(device: torch.device, folder: Path, files: dict[str, Path | None]) -> Place:
    """Prepared sets from these files, or of images made here; on a CPU a part of them."""
    datasets = {}
    for track, file in files.items():
        source = read_source(str(file.resolve())) if file else made(*SIZES[track])
        datasets[track] = prepare(source, 0.1, folder / track)
    share = {"cuda": 1.0, "cpu": 0.02}[device.type]
    data = {track: bench.cut(folder, track, share) for track in SIZES}
    few = {track: bench.cut(folder, track, share * part) for track, part in (("distillation", 0.1), ("baselines", 0.5))}
    return Place(device, folder, datasets, data, few)


def made(classes: int, train_images: int, val_images: int) -> Source:
    """Images, 28x28 and grey: a smooth pattern per class, shifted by up to 4 pixels each way, with noise."""
    random = np.random.default_rng(0)
    patterns = random.normal(size=(classes, 9, 9)).repeat(4, axis=1).repeat(4, axis=2) * 50 + 128
    splits = {}
    for split, count in {"train": train_images, "val": val_images, "test": 100}.items():
        labels, offsets = random.integers(classes, size=count), random.integers(9, size=(2, count, 1, 1))
        rows, columns = (np.arange(28).reshape(shape) + offset for shape, offset in zip(((28, 1), (1, 28)), offsets, strict=True))
        images = patterns[labels[:, None, None], rows, columns] + random.normal(scale=80, size=(count, 28, 28))
        splits[split] = images.clip(0, 255).astype(np.uint8)[..., None], labels
    return Source("made.npz", [str(number) for number in range(classes)], splits)


def recipe(place: Place, model: str, data: dict[str, Path], epochs: int, **settings: Any) -> Recipe:
    """The bench's training of a model, with a teacher for the distilled student."""
    teachers = ()
    if model == "student_distilled":
        teachers = (train(recipe(place, "teacher", place.few, 1), place.folder / "teachers", lambda _: None),)
    new = bench.recipe(model, data[bench.ARCHITECTURES[model][0]], 0, place.device, epochs, teachers)
    return replace(new, settings=new.settings | settings)


def equal(place: Place) -> Table:
    """Train each variant in both precisions: captured, not captured, and interrupted after the first of three epochs."""
    rows, failures = [], 0
    for title, (model, changes, settings) in VARIANTS.items():
        accuracies = {}
        for precision in ("fp32", "bf16"):
            training = replace(recipe(place, model, place.few, 3, precision=precision, **settings), **changes)
            with tempfile.TemporaryDirectory(dir=place.folder) as name:
                ways = {way: Path(name, way) for way in ("captured", "again", "resumed", "eager")}
                with contextlib.suppress(InterruptedError):
                    train(training, ways["resumed"], interrupt)
                with not_captured():
                    train(training, ways["eager"], lambda _: None)
                records = []
                weights = {way: load_file(train(training, root, records.append)) for way, root in ways.items()}
            apart = {way: distance(weights["captured"], weights[way]) for way in ways}
            accuracies[precision] = records[-1].history[-1].val_accuracy
            failures += apart["again"] > 0 or apart["resumed"] > 0 or apart["eager"] > 0
            rows.append([title, precision, *map(bits, [apart[way] for way in ways][1:]), f"{accuracies[precision]:.4f}"])
        failures += abs(accuracies["bf16"] - accuracies["fp32"]) > AS_GOOD
    header = ["training", "precision", "trained again", "resumed after epoch 1", "not captured", "accuracy"]
    words = "Three epochs. The largest difference of a weight from the captured training's, in all of them: checked to be none."
    words += f" Accuracies on validation images of the last epoch: bf16's checked to be within {AS_GOOD:g} of fp32's."
    return Table(header, rows, words, failures)


def interrupt(record: Any) -> None:
    """End a training after its first epoch."""
    if record.history:
        raise InterruptedError


def not_captured() -> contextlib.AbstractContextManager:
    """Trainings in this process launch every kernel of every step."""
    return mock.patch.object(loop, "_captured", lambda step, *_: step)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two networks' weights."""
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def bits(apart: float) -> str:
    return f"{apart:.1e}" if apart else "to the bit"


def seeds(place: Place) -> Table:
    """Trainings of the lone student on one device: processes, as a stage starts them, and threads of one process."""
    count, images = (8, place.datasets["distillation"].images["train"]) if place.device.type == "cuda" else (2, 0)
    jobs = [number for number in (1, 2, 4, 8) if number <= count]
    data, rows = place.data["distillation"], []
    images = bench.load_dataset(data).images["train"]
    for number in jobs:
        stage = bench.ours("c", "student_alone", data, count, place.folder, place.device, EPOCHS, number)
        rows.append([f"{number} process(es) at a time", f"{stage['wall_seconds'] / count:.2f}", ""])
    for number in jobs:
        rate = threads(place, number) * images
        rows.append([f"{number} stream(s) of one process, under way", f"{EPOCHS * images / rate:.2f}", f"{rate:,.0f}"])
    words = f"{count} seeds of student_alone, {EPOCHS} epochs of {images:,} images; processes with their start."
    return Table(["way", "seconds per training", "images / s"], rows, words)


def threads(place: Place, count: int) -> float:
    """Epochs per second of `count` trainings, all together, each in a thread with a stream of its own, after their first."""
    training = recipe(place, "student_alone", place.data, 1 + EPOCHS, precision=choose_precision("auto", place.device))
    data = load_training_data(training.data, place.device)
    trainings = [recipes._training(replace(training, seed=seed), place.device, data, None)[1] for seed in range(count)]
    for epochs in trainings:
        next(epochs)
    synchronize(place.device)

    def rest(epochs: Iterator) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if place.device.type == "cuda" else contextlib.nullcontext():
            for _ in epochs:
                pass

    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(rest, trainings))
    synchronize(place.device)
    return count * EPOCHS / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed(place: Place, repeats: int, rates: dict[str, float]) -> Table:
    """Images per second of the bench's trainings: (a), our loop with and without capture, and a stage of five seeds."""
    precision, rows, track = choose_precision("auto", place.device), [], {"a": 0.0, "c": 0.0}
    for model, (name, _, _) in bench.ARCHITECTURES.items():
        data, figures = place.data[name], {way: [] for way in ("a", "eager", "captured", "stage", "start")}
        images = bench.load_dataset(data).images["train"]
        for _ in range(repeats):
            figures["a"].append(ordinary(place, model, data))
            with not_captured():
                figures["eager"].append(under_way(place, model)[0])
            again = under_way(place, model)
            figures["captured"].append(again[0])
            figures["start"].append(again[1])
            stage = bench.ours("c", model, data, 5, place.folder, place.device, EPOCHS)
            figures["stage"].append(stage["seconds_per_epoch"])
        seconds = {way: statistics.median(values) for way, values in figures.items()}
        ratios = [a / c for a, c in zip(figures["a"], figures["stage"], strict=True)]
        share = bench.flops_per_image(model, place.datasets) * images / seconds["captured"] / 1e9 / rates[precision]
        if name == "distillation":
            track = {"a": track["a"] + seconds["a"], "c": track["c"] + seconds["stage"]}
        of_ways = [f"{images / seconds[way]:,.0f}" for way in ("a", "eager", "captured", "stage")]
        row = [model, *of_ways, f"{seconds['start']:.2f}", f"{seconds['a'] / seconds['captured']:.1f}"]
        rows.append([*row, f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})", f"{share:.2%}"])
    header = [
        "training",
        "(a)",
        "not captured",
        "captured",
        "stage",
        "s to start",
        "captured / (a)",
        "stage / (a) (range)",
        "of the rate",
    ]
    words = (
        f"Images per second, medians of {repeats}: (a) an epoch of the ordinary loop; our loop in {precision}, after the first"
    )
    words += (
        f" epoch; a stage of five seeds of {EPOCHS} epochs with its processes' start, per seed. The rate is the matrix product's."
    )
    words += f" One seed's distillation track, a stage against (a): {track['a'] / track['c']:.1f} times as fast."
    return Table(header, rows, words)


def ordinary(place: Place, model: str, data: Path) -> float:
    """Seconds of an epoch of (a), with what PyTorch does by default."""
    used = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_deterministic_debug_mode("default")
    seconds = bench.peers("a", model, data, 1, place.folder, place.device, 1)["seconds_per_epoch"]
    torch.set_num_threads(used)
    choose_device(place.device.type)
    return seconds


def under_way(place: Place, model: str) -> tuple[float, float]:
    """Seconds of an epoch of our loop after the first, median, and those up to the end of the first beyond that, in this process."""
    ends = []
    with tempfile.TemporaryDirectory(dir=place.folder) as root:
        train(recipe(place, model, place.data, 4), Path(root), lambda record: ends.append(record.seconds))
    ends = [0.0 if end is None else end for end in ends][:5]  # at the start, and after each epoch
    first, *later = np.diff(ends).tolist()
    return statistics.median(later), first - statistics.median(later)


def markdown(facts: dict, datasets: dict[str, Dataset], rates: dict[str, float], tables: dict[str, Table], seconds: float) -> str:
    """The results as tables."""
    sets = "; ".join(f"{track}: {data.name}, {data.images['train']:,} images for training" for track, data in datasets.items())
    lines = [
        f"# {facts.get('gpu', facts['processor'])}",
        "",
        f"Written by `make gpu-check` in {seconds:.0f} s, commit {commit()[:12]}.",
        f"{', '.join(f'{name}: {value}' for name, value in facts.items())}. {sets}.",
        f"Matrix product: {', '.join(f'{kind} {rate:,.0f} GFLOP/s' for kind, rate in rates.items())}.",
    ]
    for title, table in tables.items():
        lines += section(title, table)
    return "\n".join(lines) + "\n"


def section(title: str, table: Table) -> list[str]:
    """The lines about a part of the check."""
    lines = ["", f"## {title}", "", table.words + (f" **{table.failures} FAILED.**" if table.failures else "")]
    return lines + ["", tabulate(table.rows, table.header, tablefmt="github", disable_numparse=True)] if table.rows else lines


if __name__ == "__main__":
    main()
