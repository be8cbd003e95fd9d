"""Time the five trainings, ours against a peer written the ordinary way: `make bench`.

Ways of the same trainings take turns, each in a process of its own, so that its memory can be told apart: (a) the ordinary loop
and (b) that loop with what a careful user would turn on, one seed after another on all cores, each to its track's target; (c) a
stage of this pipeline, its seeds side by side, and (d) such a stage by a shorter recipe. All validate after each epoch. It
writes benchmarks/results/<device>.json and <device>.md. Data are prepared from what --distillation and --baselines name.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peer
from pipeline.core.provenance import machine
from pipeline.data.dataset import load_dataset
from pipeline.data.prepared import load_training_data
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.networks.checkpoints import new_classifier
from pipeline.networks.description import checkpoint_path
from pipeline.networks.inference import choose_device, choose_precision
from pipeline.training.loop import auc
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds

ROOT = Path(__file__).parents[1]
WAYS = {"a": "ordinary loop", "b": "careful loop", "c": "this pipeline", "d": "this pipeline, one_cycle"}
SHORT = {"schedule": "one_cycle", "epochs": 3, "lr": 0.006}  # of (d); studies/one_cycle.yaml chose it
TARGETS = {"baselines": ("auc", 0.99), "distillation": ("accuracy", 0.985)}  # on validation images
THREADS = 1  # of a training of (c) and (d), the default of params.yaml
BATCH = {"baselines": 64, "distillation": 128}
KD = {"name": "kd", "temperature": 5.0, "alpha": 0.7, "divergence": "forward"}
ARCHITECTURES = {  # track, architecture, arguments
    "simple_cnn": ("baselines", "simple_cnn", {}),
    "resnet18": ("baselines", "resnet18", {"stem": "imagenet"}),
    "teacher": ("distillation", "compact_cnn", {"width": 32, "hidden": 128}),
    "student_distilled": ("distillation", "compact_cnn", {"width": 16, "hidden": 64}),
    "student_alone": ("distillation", "compact_cnn", {"width": 16, "hidden": 64}),
}


def main() -> None:
    """Parse the command line; measure, or, as `--worker`, do the trainings of one way and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--distillation", default="mnist", help="data set of the distillation track")
    parser.add_argument("--baselines", default="pneumoniamnist", help="data set of the baselines")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training and validation images")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per training, of (a) and (b) at most")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of (c) and (d) at a time")
    parser.add_argument("--peer-seeds", type=int, default=1, help="trainings of (a) and (b)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each way is repeated")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", nargs=5, metavar=("WAY", "MODEL", "SEEDS", "FIRST", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, model, seeds, first, folder = arguments.worker
        data = cut(Path(folder), ARCHITECTURES[model][0], arguments.share)
        train, device = ours if way in "cd" else peers, torch.device(arguments.device)
        print(json.dumps(train(way, model, data, int(seeds), Path(folder), device, arguments.epochs, first=int(first))))
    else:
        measure(arguments)


def cut(folder: Path, track: str, share: float) -> Path:
    """The folder of a prepared set with that share of a track's training and validation images."""
    made = folder / f"{track} {share:g}"
    if not made.exists():
        dataset, images = load_dataset(folder / track), {}
        for split in ("train", "val"):
            (made / split).mkdir(parents=True)
            images[split] = int(share * dataset.images[split])
            for name in ("images.npy", "labels.npy"):
                np.save(made / split / name, np.load(folder / track / split / name, mmap_mode="r")[: images[split]])
        (made / "dataset.json").write_text(dataset.model_copy(update={"images": images}).model_dump_json())
    return made


def recipe(
    model: str, data: Path, seed: int, device: torch.device, epochs: int, teachers: tuple[Path, ...] = (), **settings: Any
) -> Recipe:
    """A training of (c) or, with other settings, (d)."""
    track, architecture, arguments = ARCHITECTURES[model]
    settings = {"epochs": epochs, "lr": 1e-3, "batch_size": BATCH[track], "precision": "auto"} | settings
    settings["selection"] = TARGETS[track][0]
    distilled = {"method": KD, "teachers": teachers} if teachers else {}
    return Recipe(model, architecture, arguments, settings, seed, data, device.type, THREADS, **distilled)


def ours(
    way: str,
    model: str,
    data: Path,
    seeds: int,
    folder: Path,
    device: torch.device,
    epochs: int,
    jobs: int | str = "auto",
    first: int = 0,
) -> dict[str, Any]:
    """Train seeds `first` and following as a stage does. Seconds are shares of the wall time of all.

    That is from the start of the first training to the end of the last: with the teacher's answers, without a stage's imports.
    """
    teachers = (checkpoint_path(folder / f"{way} teacher", first),) if model == "student_distilled" else ()
    if teachers and not teachers[0].exists():
        ours(way, "teacher", data, 1, folder, device, epochs, first=first)
    settings = {"epochs": epochs} | (SHORT if way == "d" else {})
    recipes = [recipe(model, data, seed, device, teachers=teachers, **settings) for seed in range(first, first + seeds)]
    finished, peaks = [], []
    ends = {seed: [0.0] for seed in range(first, first + seeds)}  # of its epochs
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for record in train_seeds(recipes, Path(root), jobs, folder / f"{way} {model}"):
            finished += [record] if record.finished else []
            ends[record.seed] += [record.seconds] if len(record.history) == len(ends[record.seed]) else []
            peaks += [peak_memory(child.pid) for child in psutil.Process().children(recursive=True) if record.loads]
    spent = max(record.started + record.seconds for record in finished) - min(record.started for record in finished)
    share = spent / sum(of_seed[-1] for of_seed in ends.values())  # of a second that passes for one of several at a time
    target = f"val_{TARGETS[ARCHITECTURES[model][0]][0]}"
    histories = sorted((record.seed, record.history) for record in finished)
    return {
        "seconds": [(share * np.diff(of_seed)).tolist() for of_seed in ends.values()],
        "figures": [[getattr(epoch, target) for epoch in history] for _, history in histories],
        "seconds_per_epoch": spent / seeds / len(finished[0].history),
        "wall_seconds": spent,
        "peak_memory_mib": max(peaks),
    }


def peers(
    way: str, model: str, data: Path, seeds: int, folder: Path, device: torch.device, epochs: int, first: int = 0
) -> dict[str, Any]:
    """Train seeds `first` and following, one after another, with the peer's loop."""
    dataset, *splits = load_training_data(data, torch.device("cpu"))
    train_set, val_set = (
        peer.Images(split.images.clone().numpy(), split.labels.numpy(), dataset.mean, dataset.std) for split in splits
    )
    weights, teacher = folder / f"{way} teacher.pt", None
    if model == "student_distilled":
        teacher = peer.network("teacher", dataset.image_shape[2], len(dataset.classes)).to(device).eval()
        if weights.exists():
            teacher.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    track = ARCHITECTURES[model][0]
    name, target = TARGETS[track]
    settings = {"epochs": epochs, "batch_size": BATCH[track], "careful": way == "b", "teacher": teacher}
    settings |= {"classes": len(dataset.classes), "device": device}
    settings |= {"figure": {"auc": auc, "accuracy": peer.accuracy}[name], "target": target}
    start = time.perf_counter()
    trained = [peer.train(model, train_set, val_set, seed=seed, **settings) for seed in range(first, first + seeds)]
    if model == "teacher":
        torch.save(trained[0].model.state_dict(), weights)
    used = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return {
        "seconds": [seed.seconds for seed in trained],
        "figures": [seed.figures for seed in trained],
        "seconds_per_epoch": statistics.median(spent for seed in trained for spent in seed.seconds),
        "wall_seconds": time.perf_counter() - start,
        "peak_memory_mib": (used[1] - used[0]) / 2**20 if device.type == "cuda" else peak_memory(os.getpid()),
    }


def peak_memory(pid: int) -> float:
    """A process's largest resident set so far, MiB, 0 if it has ended; `ru_maxrss` would start from its parent's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(peak.group(1)) / 2**10 if peak else 0.0


def measure(arguments: argparse.Namespace) -> None:
    """Run everything and write the two result files."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    device = choose_device(arguments.device)
    precision = choose_precision("auto", device)  # of (c) and (d)
    rates = {kind: matmul_rate(device, kind) for kind in dict.fromkeys(("fp32", precision))}
    with tempfile.TemporaryDirectory() as name:
        datasets = {
            track: prepare(read_source(dataset), 0.1, Path(name) / track)
            for track, dataset in (("baselines", arguments.baselines), ("distillation", arguments.distillation))
        }
        runs = take_turns(arguments, device, name)
    images = {track: arguments.share * dataset.images["train"] for track, dataset in datasets.items()}
    work = {model: images[ARCHITECTURES[model][0]] * flops_per_image(model, datasets) / 1e9 for model in runs}
    trainings = {
        model: {
            way: summarise(model, of_way, work[model], rates["fp32" if way in "ab" else precision])
            for way, of_way in ways.items()
        }
        for model, ways in runs.items()
    }
    result = {
        "device": describe(device),
        **{name: getattr(arguments, name) for name in ("share", "epochs", "seeds", "peer_seeds", "repeats")},
        "threads": THREADS,
        "datasets": {track: dataset.name for track, dataset in datasets.items()},
        "matmul_gflops_per_second": rates,
        "copy_gb_per_second": copy_rate(device),
        "precision": precision,
        "trainings": trainings,
    }
    path = arguments.results / f"{re.sub(r'[^a-z0-9]+', '-', result['device']['name'].lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def take_turns(arguments: argparse.Namespace, device: torch.device, folder: str) -> dict[str, dict[str, list]]:
    """What the workers return, by model and way, of every repeat."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    runs: dict[str, dict[str, list]] = {}
    for repeat in range(arguments.repeats):
        for model in arguments.models:
            for way in WAYS if ARCHITECTURES[model][0] == "distillation" else "abc":
                seeds = arguments.seeds if way in "cd" else arguments.peer_seeds
                command = [sys.executable, "-m", "benchmarks.bench", "--device", device.type, "--epochs", arguments.epochs]
                command += ["--share", arguments.share, "--worker", way, model, seeds, repeat * seeds, folder]
                options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True, "check": True}
                done = subprocess.run([str(word) for word in command], **options)
                run = json.loads(done.stdout.splitlines()[-1])
                runs.setdefault(model, {}).setdefault(way, []).append(run)
                spent = f"{run['seconds_per_epoch']:.2f} s per epoch and seed, {run['wall_seconds']:.0f} s"
                print(f"({way}) {model}, {seeds} seed(s): {spent}", file=sys.stderr, flush=True)
    return runs


def describe(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions."""
    here = machine()
    native = choose_precision("auto", torch.device("cpu")) == "bf16"
    cpu = f"{torch.backends.cpu.get_cpu_capability()}{' with native bf16' if native else ''}"
    return {
        "name": here["gpu"] if device.type == "cuda" else f"{here['processor']}, {here['cores']} cores",
        "type": device.type,
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "python": here["python"],
        "torch": here["torch"],
    }


def matmul_rate(device: torch.device, precision: str) -> float:
    """GFLOP/s of a square matrix product on this device: the best of several."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, device) / 1e9


def copy_rate(device: torch.device) -> float:
    """GB/s, read and written, of copying half a gigabyte in this device's memory: the best of several."""
    source = torch.ones(2**27, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: copy.copy_(source), device) / 1e9


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of ten."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def flops_per_image(model: str, datasets: dict[str, Any]) -> float:
    """Multiplications and additions of one image's forward and backward pass, counted by PyTorch."""
    track, architecture, arguments = ARCHITECTURES[model]
    classifier = new_classifier(architecture, arguments, datasets[track], 0).to("meta")
    images = torch.zeros((8, *datasets[track].image_shape), dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        classifier(images).sum().backward()
    return counter.get_total_flops() / 8


def summarise(model: str, runs: list[dict[str, Any]], work: float, rate: float) -> dict[str, Any]:
    """What is shown of a way's repeats; `work`: GFLOP of an epoch, `rate`: the matrix product's, GFLOP/s."""
    epochs = [pd.DataFrame(run["seconds"]).mean().tolist() for run in runs]  # of the seeds that had as many
    middle, target = np.median(np.concatenate(epochs)), TARGETS[ARCHITECTURES[model][0]][1]
    seeds = [pair for run in runs for pair in zip(run["seconds"], run["figures"], strict=True)]
    reached = [next((sum(spent[: n + 1]) for n, value in enumerate(of) if value >= target), None) for spent, of in seeds]
    return {
        "seconds_per_epoch": epochs,  # means over the seeds, by repeat
        "seconds_to_target": reached,  # by seed; None: did not reach it
        "figure": statistics.median(max(of_seed) for _, of_seed in seeds),
        "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
        "share_of_matmul_rate": work / middle / rate,
    }


def markdown(result: dict[str, Any]) -> str:
    """The results as tables."""
    device, trainings = result["device"], result["trainings"]
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in result["matmul_gflops_per_second"].items())
    targets = ", ".join(f"{name} {value:g} ({track})" for track, (name, value) in TARGETS.items())
    lines = [
        f"# {device['name']}",
        "",
        f"{device['cpu']}; Python {device['python']}, torch {device['torch']}. By all threads: matrix product {rates};"
        f" copy in memory {result['copy_gb_per_second']:.1f} GB/s.",
        f"Data: {', '.join(result['datasets'].values())}, {result['share']:g} of the images; {result['repeats']} repeat(s), the"
        " ways in turn, each in a process of its own, validation after each epoch included.",
        f"(a) and (b) train {result['peer_seeds']} seed(s), one after another by all threads in fp32, to their target or for"
        f" {result['epochs']} epochs; (c) {result['seeds']} seeds side by side by {result['threads']} thread(s) each in"
        f" {result['precision']}, for {result['epochs']} epochs; (d) likewise, but {', '.join(map(str, SHORT.values()))}"
        f" as {', '.join(SHORT)}. Target, on validation images: {targets}. Seconds are per seed: side by side,",
        "shares of what passes. (a) / it, (b) / it: the seconds of the same epoch of (a), (b), divided; median and range.",
        "",
        "| training | way | s / epoch | (a) / it | (b) / it | s to the target | reached by | best | peak MiB | of matrix rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(model, way, ways) for model, ways in trainings.items() for way in ways]
    for track in result["datasets"]:
        names = [model for model, (name, _, _) in ARCHITECTURES.items() if name == track]
        if set(names) <= set(trainings):
            sums = [_track(way, [trainings[name] for name in names]) for way in trainings[names[0]]]
            lines += ["", f"The {track} track, a seed of each training: {'; '.join(sums)}."]
    return "\n".join(lines) + "\n"


def _row(model: str, way: str, ways: dict[str, Any]) -> str:
    figures = ways[way]
    ratios = [[a / it for a, it in _pairs(ways[other], figures)] for other in "ab"]
    reached = [seconds for seconds in figures["seconds_to_target"] if seconds is not None]
    cells = [_spread(np.concatenate(figures["seconds_per_epoch"])), *map(_spread, ratios), _spread(reached) if reached else ""]
    cells += [f"{len(reached)} of {len(figures['seconds_to_target'])}", f"{figures['figure']:.4f}"]
    cells += [f"{figures['peak_memory_mib']:,.0f}", f"{figures['share_of_matmul_rate']:.0%}"]
    return f"| {model} | ({way}) {WAYS[way]} | {' | '.join(cells)} |"


def _pairs(way: dict[str, Any], other: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds of the epochs that both have, repeat by repeat."""
    repeats = zip(way["seconds_per_epoch"], other["seconds_per_epoch"], strict=True)
    return [pair for epochs in repeats for pair in zip(*epochs, strict=False)]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _track(way: str, trainings: list[dict[str, Any]]) -> str:
    """Sums over a track's trainings."""
    epoch = sum(np.median(np.concatenate(ways[way]["seconds_per_epoch"])) for ways in trainings)
    reached = [[s for s in ways[way]["seconds_to_target"] if s is not None] for ways in trainings]
    target = f"{sum(map(statistics.median, reached)):.1f} s to the target" if all(reached) else "not all reach the target"
    return f"({way}) {epoch:.1f} s per epoch, {target}"


if __name__ == "__main__":
    main()
