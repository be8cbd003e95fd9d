"""Train one network: the loop, once, for all trainings. Needs PyTorch alone.

Images are one uint8 tensor; an epoch is a permutation and its slices. The host waits for the device once per epoch. On CUDA a
full-size step is captured once as a graph and replayed: launching these small kernels takes longer than running them.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[..., Mapping[str, Tensor]]
Batches = Callable[[Tensor, Sequence[Tensor]], Iterator[Tensor]]
Step = Callable[[Tensor, Tensor], None]  # one of the optimiser, from rows, int64 (B,), and images, uint8 (B, H, W, C)


class NotFiniteError(ArithmeticError):
    """The loss became infinite or no number. The message says when, at which learning rate, and what to try."""


class Epoch(NamedTuple):
    """Means over the images of one epoch: losses in nats, accuracies 0-1."""

    train_loss: float  # the sum of `terms`, while the weights were changing
    train_accuracy: float  # likewise, of the labelled images
    val_loss: float  # cross-entropy after the epoch, whatever was minimised
    val_accuracy: float
    terms: dict[str, float]  # of the training loss, by name


@dataclass(frozen=True)
class Settings:
    """What decides a training besides data, first weights, loss and seed."""

    epochs: int
    batch_size: int
    lr: float  # of Adam, per step
    precision: str = "fp32"  # or bf16: forward and backward pass; weights, loss and update are float32


@dataclass
class Progress:
    """A training after an epoch. The tensors are the training's own until it continues: copy what is to outlive that."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0  # 1-based: of highest validation accuracy, of lowest validation loss among equals
    state: dict[str, Any] = field(default_factory=dict)  # model, optimizer, order and, if another epoch was best, best


def resident(images: Tensor, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of each batch, gathered where they are."""
    for rows in batches:
        yield images[rows]


def fit(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    loss: Loss,
    settings: Settings,
    seed: int,
    *targets: Tensor,
    rows: Tensor | None = None,
    batches: Batches = resident,
    resume: Progress | None = None,
) -> Iterator[Progress]:
    """Train `model` in place with Adam, yielding after each epoch; at the end it holds the weights of its best epoch on `val`.

    The order of the images depends on `seed` and their number alone, so that models trained with the same seed see the same
    batches. The last batch of an epoch is smaller; one of a single image, which batch norm cannot take, is left out.

    `model` maps uint8 images (B, H, W, C) to logits (B, K). `train` and `val` are images, uint8 (N, H, W, C), and labels, int64
    (N,); a negative label in `train` is an unknown one. Labels, model, `targets` and `rows` are on one device. `loss` maps
    (logits, labels, *targets of the batch) to its terms by name, scalars whose sum is minimised; `targets` have a row per
    training image. `rows`, int64: which training images an epoch consists of; all, once each, by default. `batches` maps
    (images, rows of each batch) to an iterator of the batches' images on that device, for images that are not there. `resume`:
    a progress to continue from; the result is, to the bit, that of a training that was never interrupted.

    Raises NotFiniteError after an epoch in which the loss became infinite or no number.
    """
    images, labels = train
    device, progress = labels.device, resume or Progress()
    model.to(memory_format=torch.channels_last)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), settings.lr, fused=fused, capturable=device.type == "cuda")
    order = torch.Generator(device).manual_seed(seed)
    best = {}
    if resume:
        model.load_state_dict(progress.state["model"])
        optimizer.load_state_dict(progress.state["optimizer"])
        order.set_state(progress.state["order"].cpu())
        best = copy.deepcopy(progress.state.get("best", progress.state["model"]))
    count = len(labels if rows is None else rows)
    used = count - (count % settings.batch_size == 1)
    sums = {name: torch.zeros((), device=device, dtype=torch.int64) for name in ("correct", "labelled")}
    step = full_step = _step(model, loss, optimizer, (labels, *targets), settings.precision, sums)
    if device.type == "cuda" and used >= settings.batch_size:
        full_step = _captured(step, model, optimizer, sums, torch.empty_like(images[: settings.batch_size], device=device))
    for number in range(len(progress.history) + 1, settings.epochs + 1):
        model.train()
        indices = torch.randperm(count, generator=order, device=device)[:used]
        slices = (indices if rows is None else rows[indices]).split(settings.batch_size)
        for batch, batch_images in zip(slices, batches(images, slices), strict=True):
            (full_step if len(batch) == settings.batch_size else step)(batch, batch_images)
        terms, accuracy = _means(sums, used, number, settings.lr)
        progress.history.append(Epoch(sum(terms.values()), accuracy, *validate(model, *val, settings.precision), terms))
        if not best or _rank(progress.history[-1]) > _rank(progress.history[progress.best_epoch - 1]):
            progress.best_epoch, best = number, copy.deepcopy(model.state_dict())
        progress.state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "order": order.get_state()}
        progress.state |= {"best": best} if progress.best_epoch < number else {}
        yield progress
    model.load_state_dict(best)


def _means(sums: Mapping[str, Tensor], images: int, number: int, lr: float) -> tuple[dict[str, float], float]:
    """Each term of the loss and the accuracy, means over an epoch; the sums start again at zero. Raises NotFiniteError."""
    correct, labelled, *totals = (total.item() for total in sums.values())
    for total in sums.values():
        total.zero_()
    if not all(map(math.isfinite, totals)):
        tries = "try a tenth of it, precision: fp32, or a smaller kd.temperature"
        raise NotFiniteError(f"the loss of epoch {number} is not finite at a learning rate of {lr:g}: {tries}")
    return {name: total / images for name, total in zip([*sums][2:], totals, strict=True)}, correct / labelled


def _rank(epoch: Epoch) -> tuple[float, float]:
    return epoch.val_accuracy, -epoch.val_loss


def validate(model: nn.Module, images: Tensor, labels: Tensor, precision: str = "fp32") -> tuple[float, float]:
    """Cross-entropy (nats) and accuracy (0-1) of `model`, which is in eval mode afterwards."""
    model.eval()
    batches = images.split(max(16, 250 * 28 * 28 // (images.shape[1] * images.shape[2])))
    with torch.no_grad(), _autocast(labels.device, precision):
        logits = torch.cat([model(batch.to(labels.device)).float() for batch in batches])
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    # Each weight is used once per pass: nothing to cache, and a cache would not survive a captured CUDA graph.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def _step(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    targets: Sequence[Tensor],
    precision: str,
    sums: dict[str, Tensor],
) -> Step:
    """A step as a function of tensors that stay where they are. It adds to `sums`, and never waits for the device."""

    def step(rows: Tensor, images: Tensor) -> None:
        labels, *batch_targets = (values[rows] for values in targets)
        with _autocast(images.device, precision):
            logits = model(images).float()
        terms = loss(logits, labels, *batch_targets)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        sums["correct"] += (logits.argmax(1) == labels).sum()
        sums["labelled"] += (labels >= 0).sum()
        for name, term in terms.items():
            sums.setdefault(name, torch.zeros_like(term)).add_(term.detach() * len(rows))

    return step


def _captured(step: Step, model: nn.Module, optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor], images: Tensor) -> Step:
    """`step` for batches of the size of `images`, a buffer, as one CUDA graph. Model and optimiser are as before.

    See "Whole-network capture" in PyTorch's notes on CUDA graphs: a few warm-up steps on a side stream come first.
    """
    rows = torch.arange(len(images), device=images.device)
    model.train()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(rows, images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(rows, images)
    model.load_state_dict(before[0])  # both are copied in place: the graph keeps the addresses
    for number, values in enumerate(optimizer.state.values()):
        for name, tensor in values.items():
            tensor.copy_(before[1][number][name]) if number in before[1] else tensor.zero_()

    for total in sums.values():
        total.zero_()

    def replay(batch: Tensor, batch_images: Tensor) -> None:
        rows.copy_(batch)
        images.copy_(batch_images)
        graph.replay()

    return replay
