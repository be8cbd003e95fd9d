"""What trainings side by side cost, by the stages themselves: `python -m benchmarks.side_by_side` (minutes, quiet machine).

SimpleCNN on PneumoniaMNIST (DATA_MIRROR may hold it), with params.yaml's epochs, in clones of this checkout:
two checkouts at once against one after the other; two trainings of one thread at a time against one of two threads; five seeds
two at a time and as `jobs: auto` spreads them; one training alone with one and with two threads. The ways take turns; printed
are medians, and their ranges, as Markdown.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tabulate import tabulate

from pipeline.core.provenance import commit, machine

ROOT = Path(__file__).parents[1]
WAYS = {  # checkouts, those of a group at once; then of params.yaml: seeds, threads, jobs
    "two checkouts, 2 seeds each, one after the other": (((0,), (1,)), 2, 1, "auto"),
    "two checkouts, 2 seeds each, at once": (((0, 1),), 2, 1, "auto"),
    "2 seeds, 2 jobs of 1 thread": (((0,),), 2, 1, 2),
    "2 seeds, 1 job of 2 threads": (((0,),), 2, 2, 1),
    "5 seeds, 2 jobs": (((0,),), 5, 1, 2),
    "5 seeds, jobs: auto": (((0,),), 5, 1, "auto"),
    "1 seed, 1 thread": (((0,),), 1, 1, 1),
    "1 seed, 2 threads": (((0,),), 1, 2, 1),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="simple_cnn", choices=["simple_cnn", "resnet18"])
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        checkouts = [clone(Path(folder, name)) for name in ("first", "second")]
        for _ in range(arguments.repeats):
            for way, (groups, *settings) in WAYS.items():
                taken = [run([checkouts[number] for number in group], arguments.model, *settings) for group in groups]
                seconds[way].append(sum(taken))
    rows = [
        [way, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"] for way, values in seconds.items()
    ]
    print(f"{arguments.model}, PneumoniaMNIST, {arguments.repeats} runs of each way, commit {commit()[:12]}, {machine()}\n")
    print(tabulate(rows, ["way", "seconds, median", "range"], tablefmt="github"))


def clone(folder: Path) -> Path:
    """A checkout with prepared data."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    write(folder, 1, 1, 1)
    subprocess.run([sys.executable, "-m", "pipeline.fetch_data", "baselines"], cwd=folder, check=True, env=environment())
    return folder


def write(folder: Path, seeds: int, threads: int, jobs: int | str) -> None:
    """Put settings into a checkout's params.yaml."""
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params |= {"seeds": [*range(seeds)], "threads": threads, "jobs": jobs}
    params["baselines"] |= {"dataset": "pneumoniamnist", "pretrained": False}
    path.write_text(yaml.safe_dump(params))


def environment() -> dict[str, str]:
    """The variables of this process, without what would lead out of a clone or set its threads."""
    left_out = ("DVC_", "MLFLOW_", "OMP_", "MKL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


def run(checkouts: list[Path], model: str, seeds: int, threads: int, jobs: int | str) -> float:
    """Seconds that a training stage takes in these checkouts, at once, from nothing."""
    for folder in checkouts:
        write(folder, seeds, threads, jobs)
        shutil.rmtree(folder / ".trainings", ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "pipeline.train_baselines", model]
    stages = [
        subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for folder in checkouts
    ]
    if any(stage.wait() for stage in stages):
        sys.exit("a stage failed")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
