"""Where a training step of ResNet18 goes: 64 grey images of 28x28, bfloat16, one thread: `python -m benchmarks.resnet18_step`.

Each convolution is also run alone at its shapes, forward and backward: what the library gives. Printed, as Markdown, are medians
of seconds of CPU, which other work on the machine hardly changes.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from timeit import repeat

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from pipeline.core.provenance import commit, machine
from pipeline.networks.architectures import Classifier, build
from pipeline.networks.inference import autocast, choose_device
from pipeline.training.seeds import MEMORY


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    device, seen = choose_device("cpu"), []
    network = build("resnet18", stem="imagenet", in_channels=1, image_size=(28, 28), num_classes=2)
    model = Classifier(network, 0.5, 0.2).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = torch.randint(256, (64, 28, 28, 1), dtype=torch.uint8), torch.randint(2, (64,))

    def step() -> None:
        with autocast(device, "bf16"):
            logits = model(images).float()
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, x, y: seen.append((layer, x[0].shape, y.shape)))
    step()
    a, b = torch.randn(2, 2048, 2048).bfloat16()
    rate, of_step, parts, flop = 2 * 2048**3 / seconds(lambda: a @ b), seconds(step), {}, 0
    for layer, x, y in seen[: len(layers)]:
        part, work = "batch norms", 0
        if isinstance(layer, nn.Conv2d):
            work = 2 * y.numel() * layer.weight[0].numel() * (3 if layer is not layers[0] else 2)
            part = "{1} to {0}, {2}x{3}".format(*layer.weight.shape) + f", {x[2]}x{x[3]} to {y[2]}x{y[3]}"
        parts.setdefault((part, work), []).append(seconds(functools.partial(run_layer, layer, x)))
        flop += work
    parts |= {("Adam", 0): [seconds(optimizer.step)], ("the whole step", flop): [of_step]}
    rows = []
    for (part, work), times in parts.items():
        of_rate = f"{work * len(times) / sum(times) / rate:.0%}" if work else ""
        rows.append([part, len(times), f"{1000 * sum(times):.1f}", f"{sum(times) / of_step:.0%}", of_rate])
    print(f"Commit {commit()[:12]}, {machine()}; a bf16 matrix product: {rate / 1e9:.0f} GFLOP/s\n")
    print(tabulate(rows, ["channels, kernel, pixels", "layers", "ms", "of the step", "of the matrix product's rate"], "github"))


def run_layer(layer: nn.Module, shape: torch.Size) -> None:
    """A layer's forward and backward pass on images of that shape."""
    x = torch.ones(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(shape[1] > 1)
    with autocast(x.device, "bf16"):
        y = layer(x)
    torch.autograd.grad(y, [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad], torch.ones_like(y))


def seconds(work: Callable[[], object]) -> float:
    """Of CPU, the median of ten."""
    return statistics.median(repeat(work, number=1, repeat=12, timer=time.process_time)[2:])


if __name__ == "__main__":
    if not MEMORY.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.resnet18_step"], os.environ | MEMORY)  # noqa: S606
    main()
