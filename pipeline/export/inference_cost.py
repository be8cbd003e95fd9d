"""What models cost to run on the CPU, each measured in a process of its own so that the peak memory is the model's alone.

`python -m pipeline.export.inference_cost FILE` opens a checkpoint or an ONNX file, the latter without importing PyTorch. It
writes three lines of JSON, the second and the third when it was sent a line: `null` when the model is ready, the figures of
`measure`, those of `network_cost`.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.cli import run
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from pipeline.networks.architectures import Classifier

BATCH = 256  # images


def inference_costs(paths: Sequence[Path]) -> list[dict[str, float]]:
    """The figures of each model. All processes start, and count what networks need, side by side; they measure one by one.

    Raises UserError if a process ends before.
    """
    command = [sys.executable, "-m", "pipeline.export.inference_cost"]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}  # a line at a time
    with contextlib.ExitStack() as stack:
        processes = [subprocess.Popen([*command, str(path)], **options) for path in paths]  # noqa: S603 (ourselves)
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)  # when all have answered, or one has failed
        for process in processes:
            _answer(process)
        measured = []
        for process in processes:
            _ask(process)
            measured.append(_answer(process))
        for process in processes:
            _ask(process)
        return [figures | _answer(process) for figures, process in zip(measured, processes, strict=True)]


def _ask(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):  # there will be no answer
        process.stdin.write("\n")


def _answer(process: subprocess.Popen) -> Any:
    if line := process.stdout.readline():
        return json.loads(line)
    raise UserError(f"{process.args[-1]}: could not be measured, see above")


def measure(model: Callable[[np.ndarray], Any], image_shape: tuple[int, int, int]) -> dict[str, float]:
    """Latency of one image (ms, median and 95th percentile), images per second in batches of 256, peak memory (MiB).

    All cores are used. The memory is the whole process's, libraries included; left out on systems without /proc.
    """
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *image_shape), dtype=np.uint8)
    single = repeat(lambda: model(images[:1]), number=1, repeat=110)[10:]  # seconds, after a warm-up
    batch = repeat(lambda: model(images), number=1, repeat=7)[2:]
    figures = {
        "latency_ms": 1000 * float(np.median(single)),
        "latency_p95_ms": 1000 * float(np.quantile(single, 0.95)),
        "images_per_second": BATCH / float(np.median(batch)),
    }
    if (status := Path("/proc/self/status")).exists():
        figures["peak_memory_mib"] = int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return figures


def network_cost(classifier: "Classifier", image_shape: tuple[int, int, int]) -> dict[str, int]:
    """What a network needs on any machine: parameters, multiply-adds of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros((1, *image_shape), dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier.to("meta")(image)
    parameters = sum(tensor.numel() for tensor in classifier.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


def _open(path: Path) -> tuple[Callable[[np.ndarray], Any], tuple[int, int, int], "Classifier | None"]:
    """A function that predicts images with the model in `path`, the shape (H, W, C) of its images, a checkpoint's network."""
    if path.suffix == ".onnx":
        from pipeline.export.onnx_model import Student

        student = Student(path)
        return lambda images: student.session.run(None, {"images": images}), student.shape, None
    import torch

    from pipeline.networks.checkpoints import load_checkpoint
    from pipeline.networks.inference import predict

    classifier, description = load_checkpoint(path, torch.device("cpu"))
    image_shape = description.dataset.image_shape
    return lambda images: predict(classifier, torch.from_numpy(images)).softmax(dim=1), image_shape, classifier


def main(file: str) -> None:
    """What the process of one model does."""
    model, image_shape, classifier = _open(Path(file))
    print("null", flush=True)
    sys.stdin.readline() or sys.exit()  # the one who asks is gone
    print(json.dumps(measure(model, image_shape)), flush=True)
    sys.stdin.readline() or sys.exit()
    print(json.dumps(network_cost(classifier, image_shape) if classifier else {}))


if __name__ == "__main__":
    run(main, file=None)
