"""Prepared data: its layout, and how the stages read it and put it on the device.

A prepared set is a folder: `dataset.json` describes it, and `train/`, `val/` and `test/` hold `images.npy`, uint8 of shape
(N, H, W, C), and `labels.npy`, int64 of shape (N,). A stage depends on, and reads, only the splits that it may see.

In test/, `patients.npy`, int64 (N,), says whose an image is, if that is known. Of a cross-validation, train/ and test/ hold the
same images, and `folds.npy`, int64 (N,), says which fold each is in: the seed decides which of them a training sees (`held_out`).
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.data.dataset import UNKNOWN, Dataset, held_out, load_dataset
from pipeline.data.npy import read_npy
from pipeline.data.streaming import fits


class Split(NamedTuple):
    """Images, uint8 of shape (N, H, W, C), and labels, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor


class TrainingData(NamedTuple):
    """What a training may see of a prepared set."""

    dataset: Dataset
    train: Split
    val: Split


class EvaluationData(NamedTuple):
    """What an evaluation sees of a prepared set."""

    dataset: Dataset
    test: Split
    val: Split  # of a cross-validation, as test
    folds: np.ndarray | None = None  # of a cross-validation, the fold of each test image, int64 (N,)
    patients: np.ndarray | None = None  # whose each test image is, int64 (N,), if that is known

    def rows(self, split: str, seed: int) -> np.ndarray | slice:
        """The images of a split that are for a training by `seed`: bool (N,), or all."""
        return slice(None) if self.folds is None else held_out(self.folds, self.dataset.folds, seed, split)


def load_split(folder: Path, split: str, device: torch.device) -> Split:
    """One split of a prepared set. Its labels are on `device`, its images too where they fit, mapped from the disk otherwise.

    On a CPU they are mapped always. Neither is to be written to. Raises UserError if a file is missing or damaged.
    """
    images, labels = (read_npy(folder / split / f"{name}.npy") for name in Split._fields)
    if (images.dtype, images.ndim, labels.dtype, labels.shape) != (np.uint8, 4, np.int64, images.shape[:1]):
        shapes = f"{images.dtype} of shape {images.shape}, {labels.dtype} of shape {labels.shape}"
        raise UserError(f"{folder / split}: not prepared images and labels: {shapes}")
    with warnings.catch_warnings(action="ignore"):  # that they are not to be written to
        images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    return Split(images.to(device) if fits(images.nbytes, device) else images, labels.to(device))


def load_training_data(folder: Path, device: torch.device, seed: int = 0) -> TrainingData:
    """A prepared set without its test split, each split as from `load_split`; of a cross-validation, what `seed` may see."""
    dataset, train = load_dataset(folder), load_split(folder, "train", device)
    if not dataset.folds:
        return TrainingData(dataset, train, load_split(folder, "val", device))
    folds = read_npy(folder / "train" / "folds.npy")
    test, val = (held_out(folds, dataset.folds, seed, split) for split in ("test", "val"))
    labelled = train.labels.cpu().numpy() != UNKNOWN
    return TrainingData(dataset, take(train, ~(test | val)), take(train, val & labelled))


def load_evaluation_data(folder: Path, device: torch.device) -> EvaluationData:
    """A prepared set without its training images, each split as from `load_split`."""
    dataset, test = load_dataset(folder), load_split(folder, "test", device)
    paths = (folder / "test" / f"{name}.npy" for name in ("folds", "patients"))
    folds, patients = (read_npy(path) if path.exists() else None for path in paths)
    return EvaluationData(dataset, test, test if dataset.folds else load_split(folder, "val", device), folds, patients)


def take(split: Split, rows: np.ndarray | slice) -> Split:
    """The images of a split, and their labels, in `rows`, bool (N,), or all of them."""
    if isinstance(rows, slice):
        return split
    numbers = torch.from_numpy(np.flatnonzero(rows))
    return Split(split.images[numbers.to(split.images.device)], split.labels[numbers.to(split.labels.device)])
