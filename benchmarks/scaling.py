"""What more of everything costs, measured: bigger images, sets that do not fit, more processes, more trainings.

    python -m benchmarks.scaling                  all parts, about half an hour on 2 cores and 25 GB of disk
    python -m benchmarks.scaling --only sizes     one part again

Writes benchmarks/results/scaling/<device>.json and <device>.md; docs/scaling.md shows the latter and says what follows from it.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.bench import ARCHITECTURES, describe, results_file
from benchmarks.scaling_study import measure as measure_study
from benchmarks.scaling_tables import BATCH, IMAGE, SIZES, markdown
from faults.checkout import ROOT, SMALL, Checkout, copy_checkout
from faults.outages import mlflow_server
from pipeline.networks.checkpoints import load_checkpoint, new_classifier
from pipeline.data.dataset import Dataset
from pipeline.data.prepared import Split, load_training_data
from pipeline.core.files import atomic_file, write_json, write_atomic
from pipeline.networks.inference import choose_device, choose_precision
from pipeline.core.provenance import code_is_committed, commit, machine
from pipeline.training.loop import fit

NETWORKS = {role: ARCHITECTURES[role][1:] for role in ("simple_cnn", "resnet18", "teacher")} | {
    "student": ARCHITECTURES["student_alone"][1:],
    "tiny": ("compact_cnn", {"width": 2, "hidden": 8}),  # so cheap that reading the images is what counts
}


def dataset(shape: tuple[int, int, int], count: int) -> Dataset:
    """The description of a generated set of two classes."""
    images = {"train": count, "val": BATCH, "test": 0}
    return Dataset(
        name="generated",
        classes=["dark", "light"],
        image_shape=shape,
        mean=0.5,
        std=0.5,
        images=images,
        validation="official",
        fingerprint="0" * 64,
    )


def generated(shape: tuple[int, int, int], count: int) -> Split:
    """`count` images of noise in memory, the light ones a little lighter."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 192, (count, *shape), dtype=torch.uint8)
    return Split(images + 64 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels)


def anonymous() -> float:
    """Resident memory of this process that is no file's, MiB."""
    return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 2**10


def work(role: str, side: int, count: int, folder: str | None, rows: int | None, epochs: int) -> dict[str, float]:
    """Train on `count` generated images in memory, or on `rows` (None: all) of a prepared set in `folder`.

    Images per second of the last epoch (the first has what is done once in it), and the anonymous memory that the training
    took, MiB, besides the model and Adam's state.
    """
    device = choose_device("auto")
    if folder:
        data = load_training_data(Path(folder), device)
        described, train, val = data
    else:
        shape = (side, side, 3)
        described = dataset(shape, count)
        train, val = (Split(*(rows.to(device) for rows in generated(shape, number))) for number in (count, BATCH))
    model = new_classifier(*NETWORKS[role], described, 0).to(device)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    chosen = torch.randperm(len(train.labels))[:rows].to(device) if rows else None
    before, peak = anonymous(), 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    ends = [time.perf_counter()]
    fit(
        model,
        train,
        val,
        F.cross_entropy,
        epochs=epochs,
        batch_size=BATCH,
        lr=1e-3,
        seed=0,
        precision=choose_precision("auto", device),
        rows=chosen,
        on_epoch=lambda _: ends.append(time.perf_counter()),
    )
    done.set()
    watcher.join()
    return {
        "images_per_second": (rows or len(train.labels)) / (ends[-1] - ends[-2]),
        "anonymous_mib": peak
        - before
        - 4 * 4 * parameters / 2**20,  # less the best weights, a gradient, Adam's two means
        "parameters": parameters,
    }


def worker(
    role: str, side: int = 224, count: int = 0, folder: Path | None = None, rows: int | None = None, epochs: int = 1
) -> dict[str, float]:
    """`work` in a process of its own."""
    asked = json.dumps(
        {"role": role, "side": side, "count": count, "folder": folder and str(folder), "rows": rows, "epochs": epochs}
    )
    print(f"  {asked}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker", asked]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def sizes(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Images per second of training by network and size of image, on one device."""
    return {
        role: {
            str(side): worker(role, side, count, epochs=2)
            for side, count in zip(SIZES, (8192, 2048, 512, 256), strict=True)
        }
        for role in ("simple_cnn", "resnet18", "teacher", "student")
    }


def streaming(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """A set larger than memory allows against one of the same images in memory."""
    count = int(asked.gigabytes * 1e9 / math.prod(IMAGE))
    for split, number in {"train": count, "val": BATCH}.items():
        write_set(folder / split, number)
    write_atomic(folder / "dataset.json", dataset(IMAGE, count).model_dump_json())
    found: dict[str, Any] = {"images": count, "bytes": count * math.prod(IMAGE), "in_memory": asked.rows}
    for role, rows in (("tiny", None), ("simple_cnn", asked.rows)):
        in_memory = worker(role, count=asked.rows, epochs=2)
        forget(folder / "train" / "images.npy")
        streamed = worker(role, folder=folder, rows=rows)
        found[role] = {"in_memory": in_memory, "streamed": streamed, "rows": rows or count}
    return found


def write_set(folder: Path, count: int) -> None:
    """A prepared split of generated images, a thousand at a time."""
    labels = np.arange(count) % 2
    with atomic_file(folder / "labels.npy") as file:
        np.save(file, labels)
    random = np.random.default_rng(0)
    noise = random.integers(0, 192, (1000, *IMAGE), dtype=np.uint8)
    with atomic_file(folder / "images.npy") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *IMAGE)}
        np.lib.format.write_array_header_1_0(file, header)
        for at in range(0, count, 1000):
            some = labels[at : at + 1000]
            file.write(noise[: len(some)] + 64 * some.astype(np.uint8).reshape(-1, 1, 1, 1))


def forget(path: Path) -> None:
    """Have the system drop a file from its cache, so that it is read from the disk again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def processes(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """The default baselines on PneumoniaMNIST by one process and by two, with the same threads each and in all."""
    checkout = copy_checkout(folder, baselines__dataset="pneumoniamnist", baselines__pretrained=False, seeds=[0])
    if mirror := os.environ.get("DATA_MIRROR"):
        checkout.environment["DATA_MIRROR"] = str(Path(mirror).resolve())
    checkout.run(*checkout.stage("fetch_data baselines"))
    found: dict[str, Any] = {}
    for role in ("simple_cnn", "resnet18"):
        seconds: dict[str, list[float]] = {}
        for _ in range(asked.repeats):
            for count, threads in ((1, 1), (1, 2), (2, 1)):
                name = f"{count} x {threads}"
                seconds.setdefault(name, []).append(training_seconds(checkout, role, count, threads))
        found[role] = {name: statistics.median(spent) for name, spent in seconds.items()}
    checkout.set(precision="fp32")
    found["losses"] = {str(parts): loss_difference(checkout, parts) for parts in (1, 2)}
    return found


def training_seconds(checkout: Checkout, role: str, count: int, threads: int) -> float:
    """What a stage says its training took."""
    checkout.set(processes=count)
    checkout.environment["OMP_NUM_THREADS"] = str(threads)
    done = checkout.run(*checkout.stage(f"train_baselines {role}"), timeout=1000)
    print(f"  {role}, {count} x {threads}: {done.stdout}", file=sys.stderr, flush=True)
    return float(re.search(r"; ([\d.]+) s on", done.stdout).group(1))


def loss_difference(checkout: Checkout, parts: int) -> list[float]:
    """By epoch, how far the training losses of two processes lie from those of one, relatively; in so many micro-batches."""
    losses = []
    for count in (1, 2):
        checkout.set(micro_batches=parts)
        training_seconds(checkout, "simple_cnn", count, 1)
        _, description = load_checkpoint(
            checkout.folder / "models/baselines/simple_cnn/seed0.safetensors", torch.device("cpu")
        )
        losses.append([epoch.train_loss for epoch in description.history])
    return [abs(two / one - 1) for one, two in zip(*losses, strict=True)]


COUNTED = """
import atexit, importlib, json, sys, time
import requests
from pipeline import errors
sent = {"requests": 0, "bytes": 0, "seconds": 0.0}
ask = requests.Session.request
def counted(self, *arguments, **named):
    start = time.perf_counter()
    answer = ask(self, *arguments, **named)
    sent["seconds"] += time.perf_counter() - start
    sent["requests"] += 1
    sent["bytes"] += len(answer.request.body or b"") + len(answer.content)
    return answer
requests.Session.request = counted
stage = importlib.import_module(sys.argv.pop(1))
atexit.register(lambda: print(json.dumps(sent)))
sys.modules["__main__"].__doc__ = stage.__doc__
errors.run(stage.main, **({"track": ("distillation",)} if "evaluate" in stage.__name__ else {}))
"""


def tracking(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """What a training and its evaluation send to MLflow's server and leave on disks."""
    seeds = [0, 1, 2, 3]
    checkout = copy_checkout(folder, **SMALL, distillation__epochs=5, seeds=seeds)
    checkout.run(*checkout.stage("fetch_data distillation"))
    found = {}
    with mlflow_server(checkout) as port:
        checkout.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        empty = size_of(checkout.folder / "server.db")
        for stage in ("train_teacher", "distill_student", "train_student_alone", "evaluate distillation"):
            module, *arguments = stage.split()
            command = [sys.executable, "-c", COUNTED, f"pipeline.{module}", *arguments]
            sent = json.loads(checkout.run(*command).stdout.splitlines()[-1])
            found[module] = {key: value / len(seeds) for key, value in sent.items()}
        trainings = 3 * len(seeds)
        found["database_bytes"] = (size_of(checkout.folder / "server.db") - empty) / trainings
        found["artifact_bytes"] = size_of(checkout.folder / "artifacts") / trainings
        found["checkpoint_bytes"] = size_of(checkout.folder / "models") / trainings
    return found


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "sizes": sizes,
    "streaming": streaming,
    "processes": processes,
    "tracking": tracking,
    "study": lambda folder, asked: measure_study(folder),
}


def main() -> None:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--gigabytes", type=float, default=20, help="of the set that does not fit")
    parser.add_argument("--rows", type=int, default=4000, help="how many images stand for a set in memory")
    parser.add_argument("--repeats", type=int, default=3, help="of the trainings by one process and two")
    parser.add_argument("--folder", type=Path, help="where the large set may lie for a while; by default the system's")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(work(**json.loads(asked.worker))))
        return
    found = machine()
    path = results_file(ROOT / "benchmarks" / "results" / "scaling", describe(choose_device("auto"))["name"])
    kept = json.loads(path.read_text()) if path.exists() else {}
    for part in [asked.only] if asked.only else PARTS:
        print(part, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            figures = PARTS[part](Path(folder) / part, asked)
        kept[part] = {
            "machine": found,
            "commit": commit()[:12] + ("" if code_is_committed() else " changed"),
            **figures,
        }
        write_json(path, kept)
    write_atomic(path.with_suffix(".md"), markdown(kept))
    print(markdown(kept))


if __name__ == "__main__":
    main()
