"""Fit a model: the loop, once, for all trainings. Needs PyTorch alone.

The images lie on the device as one uint8 tensor; an epoch is a permutation and its slices; the host waits for the device once
per epoch. A step (gather, forward, loss, backward, update) is the same code everywhere: on a CPU it runs as it stands, on CUDA
it is captured once as a graph and replayed, since these networks are so small that launching their kernels takes longer than
running them.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.checkpoints import Epoch
from pipeline.data.prepared import Split
from pipeline.inference import autocast, predict


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
    on_epoch: Callable[[int, Epoch], None] | None = None,
    title: str = "training",
) -> Fit:
    """Train `model` in place with Adam and leave it with the weights of its best epoch on `val`.

    The best epoch is the one of highest validation accuracy, of lowest validation loss among equals. The order of the
    images depends on `seed` and their number alone, so that models trained with the same seed see the same batches.

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
    on_epoch : callable (epoch from 1, Epoch)
        Called after each epoch.
    title : str
        Of the progress bar.
    """
    device = train.images.device
    order = torch.Generator(device).manual_seed(seed)
    count = len(train.labels)
    used = count - (count % batch_size == 1)
    model.to(memory_format=torch.channels_last)
    step = _Step(model, loss, (train.images, train.labels, *targets), lr, precision)
    full_step = _captured(step, batch_size) if device.type == "cuda" and used >= batch_size else step
    history, best_epoch, best_state = [], 0, {}
    with tqdm(total=epochs * -(-used // batch_size), desc=title, unit="step", disable=None, leave=False) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            step.reset()
            for batch in torch.randperm(count, generator=order, device=device)[:used].split(batch_size):
                (full_step if len(batch) == batch_size else step)(batch)
                bar.update()
            logits = predict(model, val.images, precision)
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
                on_epoch(epoch, result)
    model.load_state_dict(best_state)
    return Fit(history, best_epoch)


def _rank(epoch: Epoch) -> tuple[float, float]:
    return epoch.val_accuracy, -epoch.val_loss


class _Step:
    """One optimisation step, a pure function of tensors that stay where they are: it never waits for the device."""

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], data: tuple[Tensor, ...], lr: float, precision: str
    ) -> None:
        device = data[0].device
        self.model = model
        self.loss = loss
        self.data = data  # images, labels, further targets
        self.precision = precision
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"), capturable=device.type == "cuda"
        )
        self.loss_sum = torch.zeros((), device=device)  # over the images since the last reset
        self.correct = torch.zeros((), device=device, dtype=torch.int64)  # of those whose label is known
        self.known = torch.zeros((), device=device, dtype=torch.int64)

    def __call__(self, batch: Tensor) -> None:
        """Train on the images whose numbers are in `batch`, int64 of shape (B,)."""
        images, labels, *targets = (rows[batch] for rows in self.data)
        with autocast(images.device, self.precision):
            logits = self.model(images).float()
        loss = self.loss(logits, labels, *targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach() * len(batch)
        self.correct += (logits.argmax(1) == labels).sum()
        self.known += (labels >= 0).sum()

    def reset(self) -> None:
        """Start the sums of an epoch."""
        self.loss_sum.zero_()
        self.correct.zero_()
        self.known.zero_()


def _captured(step: _Step, batch_size: int) -> Callable[[Tensor], None]:
    """`step` for batches of `batch_size` as one CUDA graph. The model is as before; the step's sums are undefined until reset.

    See "Whole-network capture" in PyTorch's notes on CUDA graphs: a few warm-up steps on a side stream come first.
    """
    before = copy.deepcopy(step.model.state_dict())
    batch = torch.arange(batch_size, device=step.data[0].device)
    step.model.train()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    step.model.load_state_dict(before)  # copies in place: the graph keeps the addresses
    for state in step.optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(batch)

    def replay(numbers: Tensor) -> None:
        batch.copy_(numbers)
        graph.replay()

    return replay
