"""Time the five trainings, ours against a peer written the ordinary way: `make bench`.

Three ways of the same trainings take turns, each in a process of its own, so that its memory can be told apart: (a) the ordinary
loop and (b) that loop with what a careful user would turn on, one seed after another with PyTorch's own number of threads, and
(c) a stage of this pipeline, which trains its seeds side by side. It writes benchmarks/results/<device>.json and <device>.md.
Data are prepared by this pipeline from the sets that --distillation and --baselines name.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
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
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds

ROOT = Path(__file__).parents[1]
WAYS = {"a": "ordinary loop", "b": "careful loop", "c": "this pipeline"}
THREADS = 1  # of a training of (c), the default of params.yaml
BATCH = {"baselines": 64, "distillation": 128}
KD = {"name": "kd", "temperature": 5.0, "alpha": 0.7, "divergence": "forward"}
ARCHITECTURES = {  # track, architecture, arguments
    "simple_cnn": ("baselines", "simple_cnn", {}),
    "resnet18": ("baselines", "resnet18", {"stem": "imagenet"}),
    "teacher": ("distillation", "compact_cnn", {"width": 32, "hidden": 128}),
    "student_distilled": ("distillation", "compact_cnn", {"width": 16, "hidden": 64}),
    "student_alone": ("distillation", "compact_cnn", {"width": 16, "hidden": 64}),
}
STAGES = (  # module and argument, in the order of the graph
    "fetch_data baselines",
    "fetch_data distillation",
    "train_baselines simple_cnn",
    "train_baselines resnet18",
    "train_teacher",
    "train_student_alone",
    "distill_student baselines",
    "distill_student distillation",
    "evaluate baselines",
    "evaluate distillation",
    "export_student distillation",
    "evaluate_export distillation",
    "measure_cost distillation",
    "report distillation",
)


def main() -> None:
    """Parse the command line; measure, or, as `--worker`, do the trainings of one way and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--distillation", default="mnist", help="data set of the distillation track")
    parser.add_argument("--baselines", default="pneumoniamnist", help="data set of the baselines")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training images that 1x stands for")
    parser.add_argument("--epochs", type=int, default=1, help="epochs per training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each way at a time")
    parser.add_argument("--repeats", type=int, default=3, help="how often each way is repeated")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", nargs=5, metavar=("WAY", "MODEL", "SHARE", "SEEDS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, model, share, seeds, folder = arguments.worker
        data = cut(Path(folder), ARCHITECTURES[model][0], float(share))
        train = ours if way == "c" else peers
        figures = train(way, model, data, int(seeds), Path(folder), torch.device(arguments.device), arguments.epochs)
        print(json.dumps(figures | {"images": load_dataset(data).images["train"]}))
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


def recipe(model: str, data: Path, seed: int, device: torch.device, epochs: int, teachers: tuple[Path, ...] = ()) -> Recipe:
    """A training of (c)."""
    track, architecture, arguments = ARCHITECTURES[model]
    settings = {"epochs": epochs, "batch_size": BATCH[track], "lr": 1e-3, "precision": "auto"}
    distilled = {"method": KD, "teachers": teachers} if teachers else {}
    return Recipe(model, architecture, arguments, settings, seed, data, device.type, THREADS, **distilled)


def ours(
    way: str, model: str, data: Path, seeds: int, folder: Path, device: torch.device, epochs: int, jobs: int | str = "auto"
) -> dict[str, float]:
    """Train seeds 0 to `seeds` - 1 as a stage does, from the start of the first training to the end of the last."""
    teachers = (checkpoint_path(folder / "c teacher", 0),) if model == "student_distilled" else ()
    if teachers and not teachers[0].exists():
        ours(way, "teacher", data, 1, folder, device, epochs)
    recipes = [recipe(model, data, seed, device, epochs, teachers) for seed in range(seeds)]
    finished, peaks = [], []
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for record in train_seeds(recipes, Path(root), jobs, folder / f"c {model}"):
            finished += [record] if record.finished else []
            peaks += [peak_memory(child.pid) for child in psutil.Process().children(recursive=True) if record.loads]
    spent = max(record.started + record.seconds for record in finished) - min(record.started for record in finished)
    return {
        "seconds_per_epoch": spent / seeds / epochs,
        "wall_seconds": spent,
        "accuracy": statistics.median(record.history[-1].val_accuracy for record in finished),
        "peak_memory_mib": max(peaks),
    }


def peers(way: str, model: str, data: Path, seeds: int, folder: Path, device: torch.device, epochs: int) -> dict[str, float]:
    """Train seeds 0 to `seeds` - 1, one after another, with the peer's loop."""
    dataset, *splits = load_training_data(data, torch.device("cpu"))
    train_set, val_set = (
        peer.Images(split.images.clone().numpy(), split.labels.numpy(), dataset.mean, dataset.std) for split in splits
    )
    weights, teacher = folder / f"{way} teacher.pt", None
    if model == "student_distilled":
        teacher = peer.network("teacher", dataset.image_shape[2], len(dataset.classes)).to(device).eval()
        if weights.exists():
            teacher.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    settings = {"epochs": epochs, "batch_size": BATCH[ARCHITECTURES[model][0]], "careful": way == "b", "teacher": teacher}
    start, seconds = time.perf_counter(), []
    for seed in range(seeds):
        trained = peer.train(model, train_set, val_set, len(dataset.classes), device, seed=seed, **settings)
        seconds += trained.seconds
    if model == "teacher":
        torch.save(trained.model.state_dict(), weights)
    used = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return {
        "seconds_per_epoch": statistics.median(seconds),
        "wall_seconds": time.perf_counter() - start,
        "accuracy": trained.accuracy,
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
    device = choose_device(arguments.device)
    precision = choose_precision("auto", device)  # of (c)
    rates = {kind: matmul_rate(device, kind) for kind in dict.fromkeys(("fp32", precision))}
    with tempfile.TemporaryDirectory() as name:
        datasets = {
            track: prepare(read_source(dataset), 0.1, Path(name) / track)
            for track, dataset in (("baselines", arguments.baselines), ("distillation", arguments.distillation))
        }
        runs, growth = take_turns(arguments, device, name)
    trainings = {
        model: {
            way: summarise(figures, flops_per_image(model, datasets), rates[precision if way == "c" else "fp32"])
            for way, figures in ways.items()
        }
        for model, ways in runs.items()
    }
    result = {
        "device": describe(device),
        **{name: getattr(arguments, name) for name in ("share", "epochs", "seeds", "repeats")},
        "threads": THREADS,
        "datasets": {track: dataset.name for track, dataset in datasets.items()},
        "matmul_gflops_per_second": rates,
        "precision": precision,
        "trainings": trainings,
        "growth": growth,
        "stages": stage_overheads(),
    }
    path = arguments.results / f"{re.sub(r'[^a-z0-9]+', '-', result['device']['name'].lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def take_turns(arguments: argparse.Namespace, device: torch.device, folder: str) -> tuple[dict, dict]:
    """The figures of every repeat by model and way, and those of (c) on more and more images by model."""

    def worker(way: str, model: str, share: float, seeds: int) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.bench", "--device", device.type, "--epochs", arguments.epochs]
        command += ["--worker", way, model, share, seeds, folder]
        done = subprocess.run(map(str, command), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        spent = f"{figures['seconds_per_epoch']:.2f} s per epoch"
        print(f"({way}) {model}, {share:g} of the images, {seeds} seed(s): {spent}", file=sys.stderr, flush=True)
        return figures

    runs: dict[str, dict[str, list]] = {model: {way: [] for way in WAYS} for model in arguments.models}
    for _ in range(arguments.repeats):
        for model in arguments.models:
            for way in WAYS:
                runs[model][way].append(worker(way, model, arguments.share, arguments.seeds))
    growth = {
        model: {f"{factor}x": worker("c", model, arguments.share * factor / 4, 1) for factor in (1, 2, 4)}
        | {"1x, 2 seeds": worker("c", model, arguments.share / 4, 2)}
        for model in arguments.models
    }
    return runs, growth


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
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def flops_per_image(model: str, datasets: dict[str, Any]) -> float:
    """Multiplications and additions of one image's forward and backward pass, counted by PyTorch."""
    track, architecture, arguments = ARCHITECTURES[model]
    classifier = new_classifier(architecture, arguments, datasets[track], 0).to("meta")
    images = torch.zeros((8, *datasets[track].image_shape), dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        classifier(images).sum().backward()
    return counter.get_total_flops() / 8


def summarise(runs: list[dict[str, float]], flops: float, rate: float) -> dict[str, Any]:
    """Median, minimum and maximum over the repeats, and the rates that follow; `rate` is the matrix product's, GFLOP/s."""
    seconds = [run["seconds_per_epoch"] for run in runs]
    images_per_second = runs[0]["images"] / statistics.median(seconds)
    achieved = flops * images_per_second / 1e9
    return {
        "seconds_per_epoch": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "images_per_second": images_per_second,
        "accuracy": statistics.median(run["accuracy"] for run in runs),
        "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
        "gflops_per_second": achieved,
        "share_of_matmul_rate": achieved / rate,
    }


def stage_overheads() -> dict[str, dict[str, float]]:
    """What each stage takes beyond training, and `dvc repro` with nothing to do: in a copy of the checkout, on mnist5k."""
    with tempfile.TemporaryDirectory() as name:
        checkout = copy_checkout(Path(name) / "checkout")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        options = {"cwd": checkout, "env": environment | {"PATH": path, "RETRAIN": "1"}, "text": True, "check": True}

        def run(*command: str) -> tuple[float, str]:
            start = time.perf_counter()
            output = subprocess.run(command, **options, stdout=subprocess.PIPE).stdout
            return time.perf_counter() - start, output

        run("dvc", "repro")
        overheads = {stage: _overheads(stage, run) for stage in STAGES}
        nothing = [run("dvc", "repro")[0] for _ in range(3)]
        overheads["dvc repro, nothing to do"] = {"median": statistics.median(nothing), "max": max(nothing)}
    return overheads


def copy_checkout(folder: Path) -> Path:
    """A copy of the project as it lies here, without results, as a git repository: mnist5k, one seed, one epoch."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text()) | {"seeds": [0]}
    params["baselines"] |= {"dataset": "mnist5k", "pretrained": False, "epochs": 1}
    params["distillation"] |= {"dataset": "mnist5k", "epochs": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def _overheads(stage: str, run: Callable[..., tuple[float, str]]) -> dict[str, float]:
    beyond = []
    for _ in range(3):
        seconds, output = run(sys.executable, "-m", *f"pipeline.{stage}".split())
        beyond.append(seconds - sum(float(spent) for spent in re.findall(r"; ([\d.]+) s on", output)))
    return {"median": statistics.median(beyond), "max": max(beyond)}


def markdown(result: dict[str, Any]) -> str:
    """The results as tables."""
    device = result["device"]
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in result["matmul_gflops_per_second"].items())
    lines = [
        f"# {device['name']}",
        "",
        f"{device['cpu']}; Python {device['python']}, torch {device['torch']}. Matrix product: {rates}.",
        f"Data: {', '.join(result['datasets'].values())}, {result['share']:g} of the images; {result['epochs']} epoch(s),"
        f" {result['repeats']} repeats, the ways in turn, each in a process of its own.",
        f"(c) ran in {result['precision']} and includes validation after each epoch, the teacher's logits and start-up.",
    ]
    if "seeds" in result:  # measured since (c) is a whole stage
        lines.append(
            f"Each way trained {result['seeds']} seeds: (a) and (b) one after another with all threads, (c) side by side"
            f" with {result['threads']} thread(s) each. Seconds are per seed; memory is that of one process."
        )
    lines += [
        "",
        "| training | way | s / epoch, median (min-max) | images / s | of (a) | of (b) | accuracy | peak MiB | of matmul rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(model, way, ways) for model, ways in result["trainings"].items() for way in ways]
    models = [model for model, (track, _, _) in ARCHITECTURES.items() if track == "distillation"]
    if set(models) <= set(result["trainings"]):
        total = {way: sum(result["trainings"][model][way]["seconds_per_epoch"]["median"] for model in models) for way in WAYS}
        spent = ", ".join(f"({way}) {seconds:.1f} s" for way, seconds in total.items())
        ratios = ", ".join(f"({way})/(c) = {total[way] / total['c']:.2f}" for way in "ab")
        lines += ["", f"The distillation track, one seed: {spent} per epoch of all three; {ratios}."]
    lines += ["", "How this pipeline's cost grows, s / epoch (two seeds: wall seconds of both):", ""]
    for model, sizes in result["growth"].items():
        grown = ", ".join(
            f"{size} ({figures['images']:,} images) {figures['wall_seconds' if 'seeds' in size else 'seconds_per_epoch']:.2f}"
            for size, figures in sizes.items()
        )
        lines.append(f"- {model}: {grown}")
    lines += ["", "Seconds per stage beyond training, on mnist5k, median (max) of 3:", ""]
    lines += [f"- {stage}: {spent['median']:.1f} ({spent['max']:.1f})" for stage, spent in result["stages"].items()]
    return "\n".join(lines) + "\n"


def _row(model: str, way: str, ways: dict[str, Any]) -> str:
    figures, spent = ways[way], ways[way]["seconds_per_epoch"]
    ratio = {other: ways[other]["seconds_per_epoch"]["median"] / spent["median"] for other in "ab"}
    return (
        f"| {model} | ({way}) {WAYS[way]} | {spent['median']:.2f} ({spent['min']:.2f}-{spent['max']:.2f})"
        f" | {figures['images_per_second']:,.0f} | {ratio['a']:.2f}x | {ratio['b']:.2f}x"
        f" | {figures['accuracy']:.4f} | {figures['peak_memory_mib']:,.0f} | {figures['share_of_matmul_rate']:.0%} |"
    )


if __name__ == "__main__":
    main()
