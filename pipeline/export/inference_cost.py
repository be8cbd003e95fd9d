"""What one model costs to run on the CPU, measured in a process of its own so that its memory can be told apart.

`python -m pipeline.export.inference_cost FILE HEIGHT WIDTH CHANNELS` prints the figures of a checkpoint or an ONNX file as JSON. An ONNX
file is run without importing PyTorch.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

LATENCY_PASSES = 200
THROUGHPUT_PASSES = 30
THROUGHPUT_BATCH = 256


def inference_cost(path: Path, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """The figures of `measure`, from a fresh process."""
    command = [sys.executable, "-m", "pipeline.export.inference_cost", str(path), *map(str, image_shape)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 (ourselves)
    return json.loads(done.stdout)


def measure(path: Path, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """Latency of one image (ms, median and 95th percentile), images per second in batches of 256, peak memory (MiB).

    The memory is the whole process's, libraries included; it is left out where the system does not tell.
    """
    run = _onnx(path) if path.suffix == ".onnx" else _torch(path)
    images = np.random.default_rng(0).integers(0, 256, (THROUGHPUT_BATCH, *image_shape), dtype=np.uint8)
    single = _times(run, images[:1], LATENCY_PASSES)
    batch = _times(run, images, THROUGHPUT_PASSES)
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


def _times(run: Callable[[np.ndarray], None], images: np.ndarray, passes: int) -> list[float]:
    """Seconds of each pass, after some that do not count."""
    seconds = []
    for number in range(-(passes // 10) - 3, passes):
        start = time.perf_counter()
        run(images)
        if number >= 0:
            seconds.append(time.perf_counter() - start)
    return seconds


def _onnx(path: Path) -> Callable[[np.ndarray], None]:
    from pipeline.export.onnx_model import Student

    session = Student(path).session
    return lambda images: session.run(None, {"images": images})


def _torch(path: Path) -> Callable[[np.ndarray], None]:
    import torch

    from pipeline.networks.checkpoints import load_checkpoint
    from pipeline.networks.inference import choose_device, predict

    classifier, _ = load_checkpoint(path, choose_device("cpu"))
    return lambda images: torch.softmax(predict(classifier, torch.from_numpy(images)), dim=1)


if __name__ == "__main__":
    file, *shape = sys.argv[1:]
    print(json.dumps(measure(Path(file), tuple(map(int, shape)))))
