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
    state: dict[str, Any] = field(default_factory=dict)  # model, best (if it is another), optimizer, order


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
    order = torch.Generator(labels.device).manual_seed(seed)
    count = len(labels if rows is None else rows)
    used = count - (count % settings.batch_size == 1)
    step = _Step(model, loss, (labels, *targets), settings)
    full_step = step
    if labels.is_cuda and used >= settings.batch_size:
        full_step = _captured(step, torch.empty_like(images[: settings.batch_size], device=labels.device))
    progress = resume or Progress()
    best = _load(progress.state, step, order) if resume else {}
    for number in range(len(progress.history) + 1, settings.epochs + 1):
        model.train()
        indices = torch.randperm(count, generator=order, device=labels.device)[:used]
        slices = (indices if rows is None else rows[indices]).split(settings.batch_size)
        for batch, batch_images in zip(slices, batches(images, slices), strict=True):
            (full_step if len(batch) == settings.batch_size else step)(batch, batch_images)
        epoch = _epoch(step.take_sums(), used, number, settings.lr, validate(model, *val, settings.precision))
        if not best or _rank(epoch) > _rank(progress.history[progress.best_epoch - 1]):
            progress.best_epoch, best = number, copy.deepcopy(model.state_dict())
        progress.history.append(epoch)
        progress.state = {"model": model.state_dict(), "optimizer": step.optimizer.state_dict(), "order": order.get_state()}
        if progress.best_epoch < number:
            progress.state["best"] = best
        yield progress
    model.load_state_dict(best)


def _rank(epoch: Epoch) -> tuple[float, float]:
    return epoch.val_accuracy, -epoch.val_loss


def _epoch(sums: Mapping[str, float], images: int, number: int, lr: float, validation: tuple[float, float]) -> Epoch:
    """The record of an epoch from the sums over its images. Raises NotFiniteError."""
    correct, labelled, *_ = sums.values()
    terms = {name: value / images for name, value in list(sums.items())[2:]}
    if not all(map(math.isfinite, terms.values())):
        raise NotFiniteError(
            f"the loss of epoch {number} is not finite at a learning rate of {lr:g}: try a tenth of it, precision: fp32,"
            " or a smaller kd.temperature"
        )
    return Epoch(sum(terms.values()), correct / labelled, *validation, terms)


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


class _Step:
    """One optimisation step: a function of tensors that stay where they are, which never waits for the device."""

    def __init__(self, model: nn.Module, loss: Loss, targets: tuple[Tensor, ...], settings: Settings) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.loss, self.targets, self.precision = loss, targets, settings.precision
        device = targets[0].device
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(model.parameters(), settings.lr, fused=fused, capturable=device.type == "cuda")
        self.sums = {name: torch.zeros((), device=device, dtype=torch.int64) for name in ("correct", "labelled")}

    def __call__(self, rows: Tensor, images: Tensor) -> None:
        """Train on `images`, uint8 (B, H, W, C), which are those of the training set's `rows`, int64 (B,)."""
        labels, *targets = (values[rows] for values in self.targets)
        with _autocast(images.device, self.precision):
            logits = self.model(images).float()
        terms = self.loss(logits, labels, *targets)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        self.sums["correct"] += (logits.argmax(1) == labels).sum()
        self.sums["labelled"] += (labels >= 0).sum()
        for name, term in terms.items():
            self.sums.setdefault(name, torch.zeros_like(term)).add_(term.detach() * len(rows))

    def take_sums(self) -> dict[str, float]:
        """Correct and labelled images, and each of the loss's terms, summed since the last call: waits for the device."""
        values = {name: total.item() for name, total in self.sums.items()}
        for total in self.sums.values():
            total.zero_()
        return values


def _load(state: Mapping[str, Any], step: _Step, order: torch.Generator) -> dict[str, Tensor]:
    """Put a saved state in place; the weights of the best epoch."""
    step.model.load_state_dict(state["model"])
    if step.optimizer.state:  # a captured graph has its addresses
        for parameter, values in zip(step.optimizer.param_groups[0]["params"], state["optimizer"]["state"].values(), strict=True):
            for name, value in values.items():
                step.optimizer.state[parameter][name].copy_(value)
    else:
        step.optimizer.load_state_dict(state["optimizer"])
    order.set_state(state["order"].cpu())
    return copy.deepcopy(state.get("best", state["model"]))


def _captured(step: _Step, images: Tensor) -> Callable[[Tensor, Tensor], None]:
    """`step` for batches of the size of `images`, a buffer, as one CUDA graph. Model and optimiser are as before.

    See "Whole-network capture" in PyTorch's notes on CUDA graphs: a few warm-up steps on a side stream come first.
    """
    before = copy.deepcopy(step.model.state_dict())
    rows = torch.arange(len(images), device=images.device)
    step.model.train()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(rows, images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(rows, images)
    step.model.load_state_dict(before)  # copies in place: the graph keeps the addresses
    for values in step.optimizer.state.values():
        for tensor in values.values():
            tensor.zero_()
    step.take_sums()

    def replay(batch: Tensor, batch_images: Tensor) -> None:
        rows.copy_(batch)
        images.copy_(batch_images)
        graph.replay()

    return replay
