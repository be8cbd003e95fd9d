"""Augmentation by a finite set of views, so that a teacher's answer to every view of every image can be kept.

A view is the image, shifted by -2, 0 or 2 pixels each way and perhaps mirrored left to right; what comes from beyond the border
repeats the border's pixels.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from pipeline.core.errors import UserError

SHIFTS = (0, -2, 2)  # pixels
FLIPS = {"none": None, "shifts": (False,), "flips_and_shifts": (False, True)}
# The public sets whose images mean the same when mirrored: cells and tissue, skin, eyes, breasts, and chest X-rays as long as the
# question is not on which side. Not digits, nor the organ sets, which have a class for the left and one for the right kidney.
MIRRORED = ("pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist", "tissuemnist")


def check_augmentation(kind: str, dataset: str) -> None:
    """Raises UserError if `kind` mirrors the images of a public set for which nobody has said that they mean the same then.

    `dataset` is the name of a public set, perhaps with its size (`pathmnist_64`), or that of a user's file (`name.npz`), of which
    only the user knows.
    """
    if kind == "flips_and_shifts" and "." not in dataset and dataset.partition("_")[0] not in MIRRORED:
        raise UserError(f"augmentation = {kind}: images of {dataset} mean something else when mirrored: take shifts")


def view_indices(kind: str, height: int, width: int) -> Tensor | None:
    """Which pixel of an image each pixel of a view shows: int64 (V, H * W), the image itself first; None for `kind` "none".

    V is 9 for "shifts" and 18 for "flips_and_shifts".
    """
    if not (flips := FLIPS[kind]):
        return None
    views = []
    for flip, down, right in product(flips, SHIFTS, SHIFTS):
        rows = torch.arange(height).sub(down).clamp(0, height - 1)
        columns = torch.arange(width).sub(right).clamp(0, width - 1)
        columns = width - 1 - columns if flip else columns
        views.append((rows[:, None] * width + columns).flatten())
    return torch.stack(views)


def view(images: Tensor, numbers: Tensor, indices: Tensor) -> Tensor:
    """The views with those `numbers`, int64 (B,), of images (B, H, W, C); all tensors on one device."""
    pixels = images.flatten(1, 2)
    return pixels.gather(1, indices[numbers][..., None].expand_as(pixels)).view_as(images)


def single_view(number: int, indices: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that makes the view `number` of every image."""
    return lambda images: view(images, torch.full((len(images),), number, device=images.device), indices)
