"""Train one network: the loop, once, for all trainings. Needs PyTorch alone.

Images are one uint8 tensor; an epoch is a permutation and its slices. The host waits for the device once per epoch. On CUDA a
full-size step is captured once as a graph and replayed: launching these small kernels takes longer than running them.
"""

import copy
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

Loss = Callable[..., Mapping[str, Tensor]]
Batches = Callable[[Tensor, Sequence[Tensor]], Iterator[Tensor]]
View = Callable[[Tensor, Tensor], Tensor]  # of images (B, H, W, C), those views whose numbers, int64 (B,), are the second
# One step of the optimiser, from rows, int64 (B,), images, uint8 (B, H, W, C), and with views their numbers, int64 (B,).
Step = Callable[..., None]
_GRAPHS = threading.Lock()  # of the process: held while a step is captured, and to replay one


class NotFiniteError(ArithmeticError):
    """The loss became infinite or no number. The message says when, at which learning rate, and what to try."""


class Epoch(NamedTuple):
    """Means over the images of one epoch: losses in nats, accuracies 0-1."""

    train_loss: float  # the sum of `terms`, while the weights were changing
    train_accuracy: float  # likewise, of the labelled images
    val_loss: float | None  # cross-entropy after the epoch, whatever was minimised; None without validation images
    val_accuracy: float | None
    terms: dict[str, float]  # of the training loss, by name
    val_auc: float | None = None  # where it selects the epoch


@dataclass(frozen=True)
class Settings:
    """What decides a training besides data, first weights, loss and seed."""

    epochs: int
    batch_size: int
    lr: float  # of Adam, per step; where it changes, the largest
    precision: str = "fp32"  # or bf16: forward and backward pass; weights, loss and update are float32
    schedule: str = "constant"  # or, step by step: cosine, to zero; one_cycle; steps, a tenth from 50 % and again from 75 % on
    weight_decay: float = 0.0  # AdamW's
    selection: str = "accuracy"  # on validation images, of the epoch whose weights stay; or auc, loss, last


@dataclass
class Progress:
    """A training after an epoch. The tensors are the training's own until it continues: copy what is to outlive that."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0  # 1-based: by Settings.selection; of equal accuracy or AUC, that of lowest validation loss
    # Of model, optimizer, order, rng and, if there is one, scheduler; the best weights, if they are an earlier epoch's.
    state: dict[str, Any] = field(default_factory=dict)


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
    view: View | None = None,
    views: int = 1,
    resume: Progress | None = None,
) -> Iterator[Progress]:
    """Train `model` in place with Adam, yielding after each epoch; at the end it holds the weights of its best epoch on `val`.

    The order of the images, and their views, depend on `seed` and their number alone, so that models trained with the same seed
    see the same batches. The last batch of an epoch is smaller; one of a single image, which batch norm cannot take, is left out.

    `model` maps uint8 images (B, H, W, C) to logits (B, K). `train` and `val` are images, uint8 (N, H, W, C), and labels, int64
    (N,); a negative label in `train` is an unknown one. Labels, model, `targets` and `rows` are on one device. `loss` maps
    (logits, labels, done, *targets of the batch) to its terms by name, scalars whose sum is minimised; `done` is a scalar
    tensor, the epochs begun as a share of all. `targets` have a row per training image or, with a `view`, one for each of its
    `views` views, image by image. `rows`, int64: which training images an epoch consists of; all, once each, by default.
    `batches` maps (images, rows of each batch) to an iterator of the batches' images on that device, for images that are not
    there. `view` maps images and a number for each, below `views` and drawn anew in every epoch, to what the model is trained on.
    `resume`: a progress to continue from; the result is, to the bit, that of a training that was never interrupted.

    Raises NotFiniteError after an epoch in which the loss became infinite or no number.
    """
    images, labels = train
    device, progress = labels.device, resume or Progress()
    model.to(memory_format=torch.channels_last)
    count = len(labels if rows is None else rows)
    used = count - (count % settings.batch_size == 1)
    optimizer, scheduler = _optimizer(model, settings, -(-used // settings.batch_size), device)
    order = torch.Generator(device).manual_seed(seed)
    best = _restore(progress.state, model, optimizer, scheduler, order) if resume else {}
    sums = {name: torch.zeros((), device=device, dtype=torch.int64) for name in ("correct", "labelled")}
    done = torch.zeros((), device=device)
    step = full_step = _step(model, loss, optimizer, labels, done, targets, settings.precision, sums, view, views)
    if device.type == "cuda" and used >= settings.batch_size:
        batch_images = torch.empty_like(images[: settings.batch_size], device=device)
        full_step = _captured(step, model, optimizer, sums, batch_images, view is not None)
    for number in range(len(progress.history) + 1, settings.epochs + 1):
        model.train()
        done.fill_(number / settings.epochs)
        indices = torch.randperm(count, generator=order, device=device)[:used]
        slices = (indices if rows is None else rows[indices]).split(settings.batch_size)
        numbers = [torch.randint(views, (used,), generator=order, device=device).split(settings.batch_size)] if view else []
        for batch, batch_images, *batch_numbers in zip(slices, batches(images, slices), *numbers, strict=True):
            (full_step if len(batch) == settings.batch_size else step)(batch, batch_images, *batch_numbers)
            if scheduler:
                scheduler.step()
        terms, accuracy = _means(sums, used, number, settings.lr)
        val_loss, val_accuracy, val_auc = validate(model, *val, settings.precision, settings.selection == "auc")
        progress.history.append(Epoch(sum(terms.values()), accuracy, val_loss, val_accuracy, terms, val_auc))
        if not best or _is_better(progress.history[-1], progress.history[progress.best_epoch - 1], settings.selection):
            progress.best_epoch, best = number, copy.deepcopy(model.state_dict())
        progress.state = _state(model, optimizer, scheduler, order)
        progress.state |= {"best": best} if progress.best_epoch < number else {}
        yield progress
    model.load_state_dict(best)


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler | None, order: torch.Generator
) -> dict[str, Any]:
    """`Progress.state` without the best weights."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "order": order.get_state()}
    return state | {"rng": _rng_state(order.device)} | ({"scheduler": scheduler.state_dict()} if scheduler else {})


def _restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: lr_scheduler.LRScheduler | None,
    order: torch.Generator,
) -> dict[str, Tensor]:
    """Continue from `Progress.state`; the best weights so far."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if scheduler:
        scheduler.load_state_dict(state["scheduler"])
    order.set_state(state["order"].cpu())
    _set_rng_state(order.device, state["rng"].cpu())
    return copy.deepcopy(state.get("best", state["model"]))


def _means(sums: Mapping[str, Tensor], images: int, number: int, lr: float) -> tuple[dict[str, float], float]:
    """Each term of the loss and the accuracy, means over an epoch; the sums start again at zero. Raises NotFiniteError."""
    correct, labelled, *totals = (total.item() for total in sums.values())
    for total in sums.values():
        total.zero_()
    if not all(map(math.isfinite, totals)):
        tries = "try a tenth of it, or precision: fp32"
        raise NotFiniteError(f"the loss of epoch {number} is not finite at a learning rate of {lr:g}: {tries}")
    return {name: total / images for name, total in zip([*sums][2:], totals, strict=True)}, correct / labelled


def _is_better(epoch: Epoch, best: Epoch, selection: str) -> bool:
    if selection == "last":
        return True
    if selection == "loss":
        return epoch.val_loss < best.val_loss
    figure = operator.attrgetter(f"val_{selection}")
    return (figure(epoch), -epoch.val_loss) > (figure(best), -best.val_loss)


def _optimizer(
    model: nn.Module, settings: Settings, steps: int, device: torch.device
) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler | None]:
    """Adam, or AdamW where weights decay, and what changes its learning rate after each of an epoch's `steps`."""
    options = {"fused": device.type in ("cpu", "cuda"), "capturable": device.type == "cuda"}
    # A captured graph reads the rate from memory.
    changes = settings.schedule != "constant"
    lr = torch.tensor(settings.lr, device=device) if changes and device.type == "cuda" else settings.lr
    if settings.weight_decay:
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=settings.weight_decay, **options)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr, **options)
    total = settings.epochs * steps
    match settings.schedule:
        case "cosine":
            return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, total)
        case "one_cycle":
            # Adam's momentum stays: a captured graph has it as a constant. The step after the last is never taken.
            return optimizer, lr_scheduler.OneCycleLR(optimizer, settings.lr, total + 1, cycle_momentum=False)
        case "steps":
            return optimizer, lr_scheduler.MultiStepLR(optimizer, [total // 2, 3 * total // 4])
        case _:
            return optimizer, None


def _rng_state(device: torch.device) -> Tensor:
    """Of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def validate(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str = "fp32", with_auc: bool = False
) -> tuple[float | None, float | None, float | None]:
    """Cross-entropy (nats), accuracy (0-1) and, if wanted, AUC (0-1) of `model`, which is in eval mode afterwards.

    None each where there are no images.
    """
    model.eval()
    if not len(labels):
        return None, None, None
    batches = images.split(max(16, 250 * 28 * 28 // (images.shape[1] * images.shape[2])))
    with torch.no_grad(), _autocast(labels.device, precision):
        logits = torch.cat([model(batch.to(labels.device)).float() for batch in batches])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy, auc(logits, labels) if with_auc else None


def auc(logits: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, 0-1: of the second of two classes, else the mean over the labels' classes, each against the rest.

    The Mann-Whitney statistic: the share of pairs of an image of the class and another in which the first has the higher
    probability, half for a tie. 0.5 where the labels are all of one class.
    """
    probabilities, labels = logits.cpu().double().softmax(1), labels.cpu()
    areas = []
    for label in [1] if logits.shape[1] == 2 else labels.unique().tolist():
        ours, others = (probabilities[mask, label] for mask in (labels == label, labels != label))
        if len(ours) and len(others):
            others = others.sort().values
            below, not_above = (torch.searchsorted(others, ours, right=right) for right in (False, True))
            areas.append((below + not_above).double().mean().item() / (2 * len(others)))
    return sum(areas) / len(areas) if areas else 0.5


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    # Each weight is used once per pass: nothing to cache, and a cache would not survive a captured CUDA graph.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def _step(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    labels: Tensor,
    done: Tensor,
    targets: Sequence[Tensor],
    precision: str,
    sums: dict[str, Tensor],
    view: View | None,
    views: int,
) -> Step:
    """A step as a function of tensors that stay where they are. It adds to `sums`, and never waits for the device."""

    def step(rows: Tensor, images: Tensor, numbers: Tensor | None = None) -> None:
        batch_labels, places = labels[rows], rows
        if view:
            images, places = view(images, numbers), rows * views + numbers
        with _autocast(images.device, precision):
            logits = model(images).float()
        terms = loss(logits, batch_labels, done, *(values[places] for values in targets))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        sums["correct"] += (logits.argmax(1) == batch_labels).sum()
        sums["labelled"] += (batch_labels >= 0).sum()
        for name, term in terms.items():
            sums.setdefault(name, torch.zeros_like(term)).add_(term.detach() * len(rows))

    return step


def _captured(
    step: Step, model: nn.Module, optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor], images: Tensor, has_views: bool
) -> Step:
    """`step` for batches of the size of `images`, a buffer, as one CUDA graph. Model, optimiser and generator are as before.

    See "Whole-network capture" in PyTorch's notes on CUDA graphs: a few warm-up steps on a side stream come first. Other threads
    may train on the device meanwhile, but PyTorch replays no graph while one is captured.
    """
    rows = torch.arange(len(images), device=images.device)
    numbers = (torch.zeros_like(rows),) if has_views else ()
    model.train()
    rng = _rng_state(images.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(rows, images, *numbers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with _GRAPHS, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step(rows, images, *numbers)
    _set_rng_state(images.device, rng)
    model.load_state_dict(before[0])  # both are copied in place: the graph keeps the addresses
    for number, values in enumerate(optimizer.state.values()):
        for name, tensor in values.items():
            tensor.copy_(before[1][number][name]) if number in before[1] else tensor.zero_()

    for total in sums.values():
        total.zero_()

    def replay(batch: Tensor, batch_images: Tensor, *batch_numbers: Tensor) -> None:
        rows.copy_(batch)
        images.copy_(batch_images)
        for number, values in zip(numbers, batch_numbers, strict=True):
            number.copy_(values)
        with _GRAPHS:
            graph.replay()

    return replay
