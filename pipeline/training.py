"""Fit a model: the loop, once, for all trainings. Needs PyTorch alone."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.checkpoints import Epoch
from pipeline.data.prepared import Split
from pipeline.inference import predict


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
    precision : "fp32", "bf16" or "auto"
        Of the forward and backward pass; weights and loss stay float32.
    on_epoch : callable (epoch from 1, Epoch)
        Called after each epoch.
    title : str
        Of the progress bar.
    """
    device = train.images.device
    order = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    count = len(train.labels)
    used = count - (count % batch_size == 1)
    history, best_epoch, best_state = [], 0, {}
    with tqdm(total=epochs * -(-used // batch_size), desc=title, unit="step", disable=None, leave=False) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            loss_sum = torch.zeros((), device=device)
            correct = torch.zeros((), device=device, dtype=torch.int64)
            for batch in torch.randperm(count, generator=order, device=device)[:used].split(batch_size):
                labels = train.labels[batch]
                with autocast(device, precision):
                    logits = model(train.images[batch])
                batch_loss = loss(logits.float(), labels, *(target[batch] for target in targets))
                optimizer.zero_grad()
                batch_loss.backward()
                optimizer.step()
                loss_sum += batch_loss.detach() * len(batch)
                correct += (logits.argmax(1) == labels).sum()
                bar.update()
            val_logits = predict(model, val.images)
            result = Epoch(
                train_loss=loss_sum.item() / used,
                train_accuracy=correct.item() / used,
                val_loss=F.cross_entropy(val_logits, val.labels).item(),
                val_accuracy=(val_logits.argmax(1) == val.labels).float().mean().item(),
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


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which a forward pass runs at `precision`; "auto" is float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
