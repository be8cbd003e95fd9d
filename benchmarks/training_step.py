"""Where a training step goes, in bfloat16 by one thread: `python -m benchmarks.training_step`.

The networks and batches are those of `make bench`. Each convolution and linear layer is also run alone on what it gets, forward
and backward: what the libraries give at these shapes. The other operations compute little, but read and write memory: their
bytes are counted. What binds a step is the layers' seconds and those that a copy of as many bytes takes. Printed, as Markdown,
are medians of seconds of CPU, which other work on the machine changes little.
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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bench import ARCHITECTURES, BATCH, copy_rate
from pipeline.core.provenance import commit, machine
from pipeline.networks.architectures import Classifier, build
from pipeline.networks.inference import autocast, choose_device
from pipeline.training.seeds import MEMORY

CLASSES = {"baselines": 2, "distillation": 10}
TIMED = {nn.Conv2d: "convolution", nn.Linear: "linear", nn.BatchNorm2d: "batch norms"}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    a, b = torch.randn(2, 2048, 2048).bfloat16()
    rate = 2 * 2048**3 / seconds(lambda: a @ b)
    memory = 1e9 * copy_rate(torch.device("cpu"))
    rates = f"a bf16 matrix product: {rate / 1e9:.0f} GFLOP/s; a copy in memory: {memory / 1e9:.1f} GB/s, read and written"
    print(f"Commit {commit()[:12]}, {machine()}; {rates}")
    for model in ("teacher", "student_alone", "simple_cnn", "resnet18"):
        track, name, arguments = ARCHITECTURES[model]
        shape = {"in_channels": 1, "image_size": (28, 28), "num_classes": CLASSES[track]}
        print(f"\n## {model}, {BATCH[track]} images of 28x28\n")
        network = build(name, **arguments, **shape)
        print(tabulate(parts_of(network, BATCH[track], CLASSES[track], rate, memory), "firstrow", "github"))


class Passes(TorchDispatchMode):
    """Counts the bytes that operations read and write, but for convolutions, matrix products, and views."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.__name__
        if not (function.is_view or "convolution" in name or name.startswith(("mm.", "addmm.", "empty"))):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


def parts_of(network: nn.Module, images: int, classes: int, rate: float, memory: float) -> list[list[object]]:
    """A table of the parts of a network's training step; `rate`: of a matrix product, `memory`: bytes of a copy, per second."""
    device, seen = choose_device("cpu"), []
    model = Classifier(network, 0.5, 0.2).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    pixels, labels = torch.randint(256, (images, 28, 28, 1), dtype=torch.uint8), torch.randint(classes, (images,))

    def step() -> None:
        with autocast(device, "bf16"):
            logits = model(pixels).float()
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((layer, inputs[0].detach(), output.shape))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, tuple(TIMED))]
    step()
    for hook in hooks:
        hook.remove()
    of_step, parts, flop = seconds(step), {}, 0
    with Passes() as passes:
        step()
    for number, (layer, x, y) in enumerate(seen):
        part, work = next(name for kind, name in TIMED.items() if isinstance(layer, kind)), 0
        if not isinstance(layer, nn.BatchNorm2d):
            taps = layer.weight[0].numel()
            if isinstance(layer, nn.Conv2d):
                part = "{1} to {0}, {2}x{3}".format(*layer.weight.shape) + f", {x.shape[2]}x{x.shape[3]} to {y[2]}x{y[3]}"
                if y[2:] == (1, 1):  # computed with those that meet a pixel
                    taps = x[0].numel()
            work = 2 * y.numel() * taps * (3 if number else 2)  # the images need no gradient
        parts.setdefault((part, work), []).append(seconds(functools.partial(run_layer, layer, x, number > 0)))
        flop += work
    parts |= {("Adam", 0): [seconds(optimizer.step)]}
    rows = [["part", "layers", "ms", "of the step", "of the matrix product's rate"]]
    layers = sum(sum(times) for (_, work), times in parts.items() if work)
    copied = passes.bytes / memory
    sums = {
        ("convolutions and linear layers", flop): [layers],
        (f"a copy of the {passes.bytes / 1e6:.0f} MB of the other operations", 0): [copied],
        ("both: what binds the step", 0): [layers + copied],
        ("the whole step", flop): [of_step],
    }
    for (part, work), times in (parts | sums).items():
        of_rate = f"{work * len(times) / sum(times) / rate:.0%}" if work else ""
        rows.append([part, len(times), f"{1000 * sum(times):.2f}", f"{sum(times) / of_step:.0%}", of_rate])
    return rows


def run_layer(layer: nn.Module, x: Tensor, with_gradient: bool) -> None:
    """A layer's forward and backward pass; `with_gradient`: of `x`, too."""
    x = x.detach().requires_grad_(with_gradient)
    with autocast(x.device, "bf16"):
        y = layer(x)
    torch.autograd.grad(y, [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad], y.detach())


def seconds(work: Callable[[], object]) -> float:
    """Of CPU, the median of twenty."""
    return statistics.median(repeat(work, number=1, repeat=23, timer=time.process_time)[3:])


if __name__ == "__main__":
    if not MEMORY.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.training_step"], os.environ | MEMORY)  # noqa: S606
    main()
