"""Prepared data: its layout, and how the stages read it and put it on the device.

A prepared set is a folder: `dataset.json` describes it, and `train/`, `val/` and `test/` hold `images.npy`, uint8 of shape
(N, H, W, C), and `labels.npy`, int64 of shape (N,). The splits are separate folders so that a stage depends on, and reads,
only those that it may see.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from pipeline.errors import UserError

SPLITS = ("train", "val", "test")


class Dataset(BaseModel):
    """What a prepared set holds. The same images give the same description, wherever they came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    classes: list[str]
    image_shape: tuple[int, int, int]  # height, width, channels
    mean: float  # input scaling: (pixel / 255 - mean) / std
    std: float
    images: dict[str, int]  # per split
    validation: str  # where the validation split comes from
    fingerprint: str  # SHA-256 over every split's images and labels


class Split(NamedTuple):
    """Images, uint8 of shape (N, H, W, C), and labels, int64 of shape (N,), on one device."""

    images: Tensor
    labels: Tensor


class TrainingData(NamedTuple):
    """What a training may see of a prepared set."""

    dataset: Dataset
    train: Split
    val: Split


def load_dataset(folder: Path) -> Dataset:
    """The description of a prepared set. Raises UserError if it is missing or damaged."""
    try:
        return Dataset.model_validate_json((folder / "dataset.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / 'dataset.json'}: cannot be read: {error}") from error


def load_split(folder: Path, split: str, device: torch.device) -> Split:
    """One split of a prepared set, as tensors on `device`. Raises UserError if a file is missing or damaged."""
    tensors = []
    for name in Split._fields:
        path = folder / split / f"{name}.npy"
        try:
            tensors.append(torch.from_numpy(np.load(path, allow_pickle=False)).to(device))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    return Split(*tensors)


def load_training_data(folder: Path, device: torch.device) -> TrainingData:
    """A prepared set without its test split, as tensors on `device`. Raises UserError as `load_split`."""
    return TrainingData(load_dataset(folder), load_split(folder, "train", device), load_split(folder, "val", device))
