"""What one model costs to run on the CPU, measured in a process of its own so that the peak memory is the model's alone.

`python -m pipeline.export.inference_cost FILE` prints the figures of a checkpoint or an ONNX file as JSON. An ONNX file is
run without importing PyTorch.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LATENCY_PASSES = 200
THROUGHPUT_PASSES = 30
THROUGHPUT_BATCH = 256

Run = Callable[[np.ndarray], Any]


def inference_cost(path: Path) -> dict[str, float]:
    """The figures of `measure`, from a fresh process."""
    command = [sys.executable, "-m", "pipeline.export.inference_cost", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 (ourselves)
    return json.loads(done.stdout)


def measure(path: Path) -> dict[str, float]:
    """Latency of one image (ms, median and 95th percentile), images per second in batches of 256, peak memory (MiB).

    All cores are used. The memory is the whole process's, libraries included; left out on systems without /proc.
    """
    run, image_shape = (_open_onnx if path.suffix == ".onnx" else _open_checkpoint)(path)
    images = np.random.default_rng(0).integers(0, 256, (THROUGHPUT_BATCH, *image_shape), dtype=np.uint8)
    single = _seconds(run, images[:1], LATENCY_PASSES)
    batch = _seconds(run, images, THROUGHPUT_PASSES)
    figures = {
        "latency_ms": 1000 * float(np.median(single)),
        "latency_p95_ms": 1000 * float(np.quantile(single, 0.95)),
        "images_per_second": THROUGHPUT_BATCH / float(np.median(batch)),
    }
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        figures["peak_memory_mib"] = int(peak.group(1)) / 2**10
    return figures


def _seconds(run: Run, images: np.ndarray, passes: int) -> list[float]:
    """Seconds of each pass, after a warm-up."""
    seconds = []
    for number in range(-(passes // 10) - 3, passes):
        start = time.perf_counter()
        run(images)
        if number >= 0:
            seconds.append(time.perf_counter() - start)
    return seconds


def _open_onnx(path: Path) -> tuple[Run, tuple[int, int, int]]:
    from pipeline.export.onnx_model import Student

    student = Student(path)
    return lambda images: student.session.run(None, {"images": images}), student.shape


def _open_checkpoint(path: Path) -> tuple[Run, tuple[int, int, int]]:
    import torch

    from pipeline.networks.checkpoints import load_checkpoint
    from pipeline.networks.inference import predict

    classifier, description = load_checkpoint(path, torch.device("cpu"))
    return lambda images: predict(classifier, torch.from_numpy(images)).softmax(dim=1), description.dataset.image_shape


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
