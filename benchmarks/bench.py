"""Time the five trainings, ours against a peer written the ordinary way: `make bench`.

Three ways of the same training take turns, each in a process of its own, so that its memory can be told apart: (a) the ordinary
loop, (b) that loop with what a careful user would turn on, (c) this pipeline's. It writes benchmarks/results/<device>.json and
<device>.md. Data come from the prepared folders of this pipeline, written here from the sets that --distillation and
--baselines name.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peer
from faults.checkout import SMALL, copy_checkout
from pipeline.networks.checkpoints import new_classifier
from pipeline.fetching.preparation import prepare
from pipeline.data.prepared import Split, TrainingData, load_training_data
from pipeline.fetching.sources import read_source
from pipeline.training.losses import DistillationLoss
from pipeline.networks.inference import choose_device, choose_precision, predict
from pipeline.core.provenance import machine
from pipeline.training.loop import fit

ROOT = Path(__file__).parents[1]
WAYS = {"a": "ordinary loop", "b": "careful loop", "c": "this pipeline"}
BATCH = {"baselines": 64, "distillation": 128}
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
    "distill_student",
    "train_student_alone",
    "evaluate baselines",
    "evaluate distillation",
    "export_student",
    "evaluate_export",
    "measure_cost distillation",
    "report distillation",
)


def main() -> None:
    """Parse the command line; measure, or, as `--worker`, do one training and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--distillation", default="mnist", help="data set of the distillation track")
    parser.add_argument("--baselines", default="pneumoniamnist", help="data set of the baselines")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training images that 1x stands for")
    parser.add_argument("--epochs", type=int, default=1, help="epochs per training")
    parser.add_argument("--repeats", type=int, default=3, help="how often each training is repeated")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--worker", nargs=5, metavar=("WAY", "MODEL", "SHARE", "SEEDS", "FOLDER"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.worker:
        way, model, share, seeds, folder = arguments.worker
        figures = work(way, model, float(share), int(seeds), Path(folder), arguments.device, arguments.epochs)
        print(json.dumps(figures))
    else:
        measure(arguments)


def work(
    way: str, model: str, share: float, seeds: int, folder: Path, device_name: str, epochs: int
) -> dict[str, float]:
    """Train `model` on a share of its training images, for seeds 0 to `seeds` - 1, and say what it took."""
    device = choose_device(device_name) if way == "c" else torch.device(device_name)
    track = ARCHITECTURES[model][0]
    data = load_training_data(folder / track, device if way == "c" else torch.device("cpu"))
    train, val = (Split(*(tensor[: int(share * len(tensor))].clone() for tensor in split)) for split in data[1:])
    data = data._replace(train=train, val=val)
    start, seconds, accuracy = time.perf_counter(), [], 0.0
    for seed in range(seeds):
        if way == "c":
            spent, accuracy = _ours(model, data, seed, folder, device, epochs)
        else:
            spent, accuracy = _peer(model, data, seed, folder, device, epochs, careful=way == "b")
        seconds += spent
    return {
        "seconds_per_epoch": statistics.median(seconds),
        "wall_seconds": time.perf_counter() - start,
        "images": len(train.labels),
        "accuracy": accuracy,
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _peak_memory(),
    }


def _peak_memory() -> float:
    """The process's largest resident set so far, MiB; `ru_maxrss` would start from its parent's."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 2**10


def _ours(
    model: str, data: TrainingData, seed: int, folder: Path, device: torch.device, epochs: int
) -> tuple[list[float], float]:
    track, architecture, arguments = ARCHITECTURES[model]
    precision = choose_precision("auto", device)
    classifier = new_classifier(architecture, arguments, data.dataset, seed).to(device)
    start = time.perf_counter()
    loss, targets = F.cross_entropy, ()
    if model == "student_distilled":
        teacher = new_classifier(*ARCHITECTURES["teacher"][1:], data.dataset, 0).to(device)
        if (weights := folder / "c.teacher").exists():
            teacher.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
        loss, targets = DistillationLoss(5.0, 0.7, "forward"), (predict(teacher, data.train.images, precision),)
    result = fit(
        classifier,
        data.train,
        data.val,
        loss,
        *targets,
        epochs=epochs,
        batch_size=BATCH[track],
        lr=1e-3,
        seed=seed,
        precision=precision,
    )
    seconds = (time.perf_counter() - start) / epochs  # with validation and, once, the teacher's logits and the graph
    if model == "teacher":
        torch.save(classifier.state_dict(), folder / "c.teacher")
    return [seconds] * epochs, result.history[-1].val_accuracy


def _peer(
    model: str, data: TrainingData, seed: int, folder: Path, device: torch.device, epochs: int, *, careful: bool
) -> tuple[list[float], float]:
    dataset = data.dataset
    train_set, val_set = (
        peer.Images(split.images.numpy(), split.labels.numpy(), dataset.mean, dataset.std)
        for split in (data.train, data.val)
    )
    kept = folder / f"{'b' if careful else 'a'}.teacher"
    teacher = None
    if model == "student_distilled":
        teacher = peer.network("teacher", dataset.image_shape[2], len(dataset.classes)).to(device).eval()
        if kept.exists():
            teacher.load_state_dict(torch.load(kept, map_location=device, weights_only=True))
    trained = peer.train(
        model,
        train_set,
        val_set,
        len(dataset.classes),
        device,
        epochs=epochs,
        batch_size=BATCH[ARCHITECTURES[model][0]],
        seed=seed,
        careful=careful,
        teacher=teacher,
    )
    if model == "teacher":
        torch.save(trained.model.state_dict(), kept)
    return trained.seconds, trained.accuracy


def measure(arguments: argparse.Namespace) -> None:
    """Run everything and write the two result files."""
    device = choose_device(arguments.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets = {
            track: prepare(read_source(dataset), 0.1, folder / track)
            for track, dataset in (("baselines", arguments.baselines), ("distillation", arguments.distillation))
        }
        precision = choose_precision("auto", device)  # of (c)
        rates = {kind: matmul_rate(device, kind) for kind in ("fp32", "bf16")}

        def worker(way: str, model: str, share: float, seeds: int = 1) -> dict[str, float]:
            command = [
                sys.executable,
                "-m",
                "benchmarks.bench",
                "--device",
                device.type,
                "--epochs",
                str(arguments.epochs),
            ]
            command += ["--worker", way, model, str(share), str(seeds), name]
            print(f"({way}) {model}, {share:g} of the images, {seeds} seed(s)", file=sys.stderr, flush=True)
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            print(f"    {figures['seconds_per_epoch']:.2f} s per epoch", file=sys.stderr, flush=True)
            return figures

        runs: dict[str, dict[str, list]] = {model: {way: [] for way in WAYS} for model in arguments.models}
        for _ in range(arguments.repeats):
            for model in arguments.models:
                for way in WAYS:
                    runs[model][way].append(worker(way, model, arguments.share))
        grow = {
            model: {f"{factor}x": worker("c", model, arguments.share * factor / 4) for factor in (1, 2, 4)}
            | {"1x, 2 seeds": worker("c", model, arguments.share / 4, 2)}
            for model in arguments.models
        }
        result = {
            "device": describe(device),
            "share": arguments.share,
            "epochs": arguments.epochs,
            "repeats": arguments.repeats,
            "datasets": {track: dataset.name for track, dataset in datasets.items()},
            "matmul_gflops_per_second": rates,
            "precision": precision,
            "trainings": {
                model: {
                    way: summarise(
                        runs[model][way], flops_per_image(model, datasets), rates[precision if way == "c" else "fp32"]
                    )
                    for way in WAYS
                }
                for model in arguments.models
            },
            "growth": grow,
            "stages": stage_overheads(),
        }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = results_file(arguments.results, result["device"]["name"])
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def results_file(folder: Path, device_name: str) -> Path:
    """Where a device's results lie."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def describe(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions."""
    found = machine()
    name = found["gpu"] if device.type == "cuda" else f"{found['processor']}, {found['cores']} cores"
    capability = torch.backends.cpu.get_cpu_capability()
    native = choose_precision("auto", torch.device("cpu")) == "bf16"
    return {
        "name": name,
        "type": device.type,
        "cpu": f"{capability}{' with native bf16' if native else ''}, {found['threads']} threads",
        "python": found["python"],
        "torch": found["torch"],
    }


def matmul_rate(device: torch.device, precision: str, size: int = 2048) -> float:
    """GFLOP/s of a square matrix product on this device: the best of several."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    size = size if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        one @ other
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
    images = runs[0]["images"]
    achieved = flops * images / statistics.median(seconds) / 1e9
    return {
        "seconds_per_epoch": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "images_per_second": images / statistics.median(seconds),
        "accuracy": statistics.median(run["accuracy"] for run in runs),
        "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
        "gflops_per_second": achieved,
        "share_of_matmul_rate": achieved / rate,
    }


def stage_overheads() -> dict[str, dict[str, float]]:
    """What each stage takes beyond training, and `dvc repro` with nothing to do: in a copy of the checkout, on mnist5k."""
    small = {"baselines__epochs": 1, "distillation__epochs": 1, "seeds": [0]}
    with tempfile.TemporaryDirectory() as name:
        checkout = copy_checkout(Path(name) / "checkout", **SMALL, **small)

        def run(*command: str) -> tuple[float, str]:
            start = time.perf_counter()
            output = checkout.run(*command, timeout=3600).stdout
            return time.perf_counter() - start, output

        run("dvc", "repro")
        overheads = {stage: _overheads(stage, run) for stage in STAGES}
        nothing = [run("dvc", "repro")[0] for _ in range(3)]
        overheads["dvc repro, nothing to do"] = {"median": statistics.median(nothing), "max": max(nothing)}
    return overheads


def _overheads(stage: str, run: Any) -> dict[str, float]:
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
        "",
        "| training | way | s / epoch, median (min-max) | images / s | of (a) | of (b) | accuracy | peak MiB | of matmul rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, ways in result["trainings"].items():
        for way, figures in ways.items():
            spent = figures["seconds_per_epoch"]
            ratio = {other: ways[other]["seconds_per_epoch"]["median"] / spent["median"] for other in "ab"}
            lines.append(
                f"| {model} | ({way}) {WAYS[way]} | {spent['median']:.2f} ({spent['min']:.2f}-{spent['max']:.2f})"
                f" | {figures['images_per_second']:,.0f} | {ratio['a']:.2f}x | {ratio['b']:.2f}x"
                f" | {figures['accuracy']:.4f} | {figures['peak_memory_mib']:,.0f} | {figures['share_of_matmul_rate']:.0%} |"
            )
    models = [model for model, (track, _, _) in ARCHITECTURES.items() if track == "distillation"]
    if set(models) <= set(result["trainings"]):
        total = {
            way: sum(result["trainings"][model][way]["seconds_per_epoch"]["median"] for model in models) for way in WAYS
        }
        lines += ["", f"The distillation track, one seed: {_ratio(total)}."]
    lines += ["", "How this pipeline's cost grows, s / epoch (two seeds: wall seconds of both):", ""]
    for model, sizes in result["growth"].items():
        grown = ", ".join(
            f"{size} ({figures['images']:,} images) "
            f"{figures['wall_seconds' if 'seeds' in size else 'seconds_per_epoch']:.2f}"
            for size, figures in sizes.items()
        )
        lines.append(f"- {model}: {grown}")
    lines += ["", "Seconds per stage beyond training, on mnist5k, median (max) of 3:", ""]
    lines += [f"- {stage}: {spent['median']:.1f} ({spent['max']:.1f})" for stage, spent in result["stages"].items()]
    return "\n".join(lines) + "\n"


def _ratio(total: dict[str, float]) -> str:
    spent = ", ".join(f"({way}) {seconds:.1f} s" for way, seconds in total.items())
    return f"{spent} per epoch of all three; (a)/(c) = {total['a'] / total['c']:.2f}, (b)/(c) = {total['b'] / total['c']:.2f}"


if __name__ == "__main__":
    main()
