"""Prepared data: its layout, and how the stages read it and put it on the device.

A prepared set is a folder: `dataset.json` describes it, and `train/`, `val/` and `test/` hold `images.npy`, uint8 of shape
(N, H, W, C), and `labels.npy`, int64 of shape (N,). A stage depends on, and reads, only the splits that it may see.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.data.dataset import Dataset, load_dataset
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


def load_training_data(folder: Path, device: torch.device) -> TrainingData:
    """A prepared set without its test split, each split as from `load_split`."""
    return TrainingData(load_dataset(folder), load_split(folder, "train", device), load_split(folder, "val", device))
