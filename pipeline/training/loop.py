"""Fit a model: the loop, once, for all trainings. Needs PyTorch alone.

The images lie on the device as one uint8 tensor, or come from the disk a few batches ahead; an epoch is a permutation and its
slices, of each of which every process of a training takes its part; the host waits for the device once per epoch. A step
(gather, forward, loss, backward, update) is the same code everywhere: on a CPU it runs as it stands, on CUDA it is captured once
as a graph and replayed, since these networks are so small that launching their kernels takes longer than running them.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam
from tqdm import tqdm

from pipeline import processes
from pipeline.networks.description import Epoch
from pipeline.data.prepared import Split
from pipeline.data.streaming import batches
from pipeline.core.errors import UserError
from pipeline.networks.inference import autocast

NEVER = 2**62


class State(NamedTuple):
    """A training after an epoch. The tensors are the training's own until it goes on: copy what is to be kept."""

    history: list[Epoch]
    best_epoch: int
    tensors: dict[str, Tensor]  # model.*, best.* if they differ, adam.<field>.<number of the parameter>, order


class Fit(NamedTuple):
    """The record of a training; the model itself holds the weights after `best_epoch` (1-based)."""

    history: list[Epoch]
    best_epoch: int


def fit(
    model: nn.Module,
    train: Split,
    val: Split,
    loss: Callable[..., Tensor],
    *targets: Tensor,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    precision: str = "fp32",
    micro_batches: int = 1,
    rows: Tensor | None = None,
    on_epoch: Callable[["State"], None] | None = None,
    resume: "State | None" = None,
    title: str = "training",
) -> Fit:
    """Train `model` in place with Adam and leave it with the weights of its best epoch on `val`.

    The best epoch is the one of highest validation accuracy, of lowest validation loss among equals. The order of the
    images depends on `seed` and their number alone, so that models trained with the same seed see the same batches. Where
    several processes train together (processes.join), all call this, each computes its part of every batch, and all end with
    the same weights.

    Parameters
    ----------
    model : module from images to logits, on the same device as the data
    train, val : Split
    loss : callable (logits, labels, *targets of the batch) -> scalar
    targets : tensors with one row per training image
        Further arguments of the loss, for example a teacher's logits.
    epochs, batch_size : int
        The last batch of an epoch is smaller; a last batch of one image, which batch norm cannot take, is left out.
    lr : float
        Adam's learning rate.
    precision : "fp32" or "bf16"
        Of the forward and backward pass; weights, loss and update are float32.
    micro_batches : int
        How many parts a batch is computed in, by all processes together, their gradients added up. It saves memory. The order of
        the sum, and so the rounding, depends on it; batch norm sees what the processes compute at the same time.
    rows : Tensor, optional
        Which training images an epoch consists of, int64; all, once each, by default.
    on_epoch : callable (State)
        Called after each epoch.
    resume : State, optional
        Go on from there: the result is, to the bit, that of a training that was never interrupted.
    title : str
        Of the progress bar.

    Raises UserError after an epoch in which the loss became infinite or no number, and for batches of fewer images than parts.
    """
    device = train.labels.device
    order = torch.Generator(device).manual_seed(seed)
    count = len(train.labels if rows is None else rows)
    used = count - (count % batch_size == 1)
    pieces = max(1, micro_batches // processes.count())
    if min(batch_size, used % batch_size or batch_size) < pieces * processes.count():
        raise UserError(
            f"{title}: {count} images in batches of {batch_size} leave a batch of fewer images than its"
            f" {pieces * processes.count()} parts: choose another batch size, or fewer processes or micro_batches"
        )
    model.to(memory_format=torch.channels_last)
    step = _Step(model, loss, (train.images, train.labels, *targets), lr, precision, pieces)
    capture = device.type == "cuda" and used >= batch_size and processes.count() == 1
    full_step = _captured(step, batch_size) if capture else step
    history, best_epoch, best_state = [], 0, {}
    if resume:
        history, best_epoch = list(resume.history), resume.best_epoch
        best_state = _named(resume.tensors, "best") or _named(resume.tensors, "model")
        model.load_state_dict(_named(resume.tensors, "model"))
        for name, tensor in step.adam_state().items():  # in place: a captured graph keeps the addresses
            tensor.copy_(resume.tensors[f"adam.{name}"])
        order.set_state(resume.tensors["order"])
    quiet = processes.rank() > 0 or None  # None: where there is no terminal
    with tqdm(total=epochs * -(-used // batch_size), desc=title, unit="step", disable=quiet, leave=False) as bar:
        bar.update(len(history) * -(-used // batch_size))
        for epoch in range(len(history) + 1, epochs + 1):
            model.train()
            step.reset()
            numbers = torch.randperm(count, generator=order, device=device)[:used]
            wholes = (numbers if rows is None else rows[numbers]).split(batch_size)
            parts = [processes.part(whole) for whole in wholes]
            for whole, (batch, images) in zip(wholes, batches(train.images, parts, device), strict=True):
                weight = len(batch) * processes.count() / len(whole)  # as many images as it has, so much it counts
                (full_step if len(whole) == batch_size else step)(batch, images, weight)
                bar.update()
            step.add_up()
            if (bad := step.first_bad.item()) < NEVER:
                raise UserError(
                    f"{title}: the loss is no longer finite from step {bad + 1} of epoch {epoch} on, at a learning rate of"
                    f" {lr:g}: try a tenth of it, precision: fp32, or a smaller kd.temperature. Nothing of this training was kept"
                )
            logits = processes.predict_together(model, val.images, precision)
            result = Epoch(
                train_loss=step.loss_sum.item() / used,
                train_accuracy=step.correct.item() / step.known.item(),
                val_loss=F.cross_entropy(logits, val.labels).item(),
                val_accuracy=(logits.argmax(1) == val.labels).float().mean().item(),
            )
            history.append(result)
            if not best_epoch or _rank(result) > _rank(history[best_epoch - 1]):
                best_epoch, best_state = epoch, copy.deepcopy(model.state_dict())
            if on_epoch:
                parts = {"model": model.state_dict(), "adam": step.adam_state()}
                if best_epoch < epoch:
                    parts["best"] = best_state
                tensors = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
                on_epoch(State(history, best_epoch, tensors | {"order": order.get_state()}))
    model.load_state_dict(best_state)
    return Fit(history, best_epoch)


def _named(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _rank(epoch: Epoch) -> tuple[float, float]:
    return epoch.val_accuracy, -epoch.val_loss


class _Step:
    """One optimisation step, a pure function of tensors that stay where they are: it never waits for the device."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        data: tuple[Tensor, ...],
        lr: float,
        precision: str,
        pieces: int = 1,
    ) -> None:
        device = data[1].device
        self.model = model
        self.forward = processes.together(model)
        self.loss = loss
        self.data = data  # images, labels, further targets
        self.precision = precision
        self.pieces = pieces  # of a batch, one after the other
        self.lr = lr
        self.fused = device.type in ("cpu", "cuda")
        self.parameters = list(model.parameters())
        self.adam = {  # one tensor per parameter
            "step": [torch.zeros((), device=device if self.fused else "cpu") for _ in self.parameters],
            "exp_avg": [torch.zeros_like(parameter) for parameter in self.parameters],
            "exp_avg_sq": [torch.zeros_like(parameter) for parameter in self.parameters],
        }
        self.loss_sum = torch.zeros((), device=device)  # over the images since the last reset
        self.correct = torch.zeros((), device=device, dtype=torch.int64)  # of those whose label is known
        self.known = torch.zeros((), device=device, dtype=torch.int64)
        self.steps = torch.zeros((), device=device, dtype=torch.int64)
        self.first_bad = torch.full((), NEVER, device=device)  # the first step (from 0) whose loss was not finite

    def __call__(self, batch: Tensor, images: Tensor | None = None, weight: float = 1.0) -> None:
        """Train on the images whose numbers are in `batch`, int64 of shape (B,): on `images`, or else on those of the data.

        `weight` is how much the batch counts in the mean over the processes.
        """
        images = self.data[0][batch] if images is None else images
        rows = (images, *(rows[batch] for rows in self.data[1:]))
        self.model.zero_grad()
        for number, piece in enumerate(zip(*(tensor.tensor_split(self.pieces) for tensor in rows), strict=True), 1):
            with processes.alone(self.forward) if number < self.pieces else contextlib.nullcontext():
                self._add_gradient(*piece, share=weight * len(piece[1]) / len(batch))
        self._update()
        self.steps += 1

    def _add_gradient(self, images: Tensor, labels: Tensor, *targets: Tensor, share: float) -> None:
        """Add `share` of the gradient of the mean loss over some images."""
        with autocast(images.device, self.precision):
            logits = self.forward(images).float()
        loss = self.loss(logits, labels, *targets)
        (loss if share == 1 else loss * share).backward()
        self.loss_sum += loss.detach() * len(labels)
        self.correct += (logits.argmax(1) == labels).sum()
        self.known += (labels >= 0).sum()
        self.first_bad.copy_(torch.where(loss.isfinite() | (self.first_bad < NEVER), self.first_bad, self.steps))

    @torch.no_grad()
    def _update(self) -> None:
        """Adam's step, by the function behind torch.optim.Adam: the class imports the compiler, which takes a second."""
        adam(
            self.parameters,
            [parameter.grad for parameter in self.parameters],
            self.adam["exp_avg"],
            self.adam["exp_avg_sq"],
            [],
            self.adam["step"],
            fused=self.fused,
            capturable=self.loss_sum.is_cuda,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0,
            eps=1e-8,
            maximize=False,
        )

    def add_up(self) -> None:
        """Make the sums of an epoch those over all processes."""
        processes.add_up(self.loss_sum, self.correct, self.known)
        processes.least(self.first_bad)

    def adam_state(self) -> dict[str, Tensor]:
        """The optimiser's tensors, by field and number of the parameter."""
        return {f"{field}.{n}": tensor for field, tensors in self.adam.items() for n, tensor in enumerate(tensors)}

    def reset(self) -> None:
        """Start the sums of an epoch."""
        self.loss_sum.zero_()
        self.correct.zero_()
        self.known.zero_()
        self.steps.zero_()
        self.first_bad.fill_(NEVER)


def _captured(step: _Step, batch_size: int) -> Callable[[Tensor, Tensor | None, float], None]:
    """`step` for batches of `batch_size` as one CUDA graph. The model is as before; the step's sums are undefined until reset.

    See "Whole-network capture" in PyTorch's notes on CUDA graphs: a few warm-up steps on a side stream come first.
    """
    before = copy.deepcopy(step.model.state_dict())
    every, labels, *_ = step.data
    batch = torch.arange(batch_size, device=labels.device)
    images = None if every.device == batch.device else every[:batch_size].to(batch.device)
    step.model.train()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(batch, images)
    torch.cuda.current_stream().wait_stream(stream)
    step.model.load_state_dict(before)  # copies in place: the graph keeps the addresses
    for tensor in step.adam_state().values():
        tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(batch, images)

    def replay(numbers: Tensor, found: Tensor | None, _: float) -> None:
        batch.copy_(numbers)
        if found is not None:
            images.copy_(found)
        graph.replay()

    return replay
