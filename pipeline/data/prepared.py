"""Prepared data: its layout, and how the stages read it and put it on the device.

A prepared set is a folder: `dataset.json` describes it, and `train/`, `val/` and `test/` hold `images.npy`, uint8 of shape
(N, H, W, C), and `labels.npy`, int64 of shape (N,). The splits are separate folders so that a stage depends on, and reads,
only those that it may see.
"""

import warnings
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline.data.arrays import read_npy
from pipeline.data.streaming import fits
from pipeline.errors import UserError

SPLITS = ("train", "val", "test")
Side = Annotated[int, Field(ge=1, le=65_536)]


class Dataset(BaseModel):
    """What a prepared set holds. The same images give the same description, wherever they came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    classes: list[str]
    image_shape: tuple[Side, Side, Side]  # height, width, channels
    mean: FiniteFloat  # input scaling: (pixel / 255 - mean) / std
    std: Annotated[FiniteFloat, Field(gt=0)]
    images: dict[str, int]  # per split
    validation: str  # where the validation split comes from
    fingerprint: str  # SHA-256 over every split's images and labels


class Split(NamedTuple):
    """Images, uint8 of shape (N, H, W, C), and labels, int64 of shape (N,)."""

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
    """One split of a prepared set. Its labels are on `device`, its images too where they fit, mapped from the disk otherwise.

    On a CPU they are mapped always. Neither is to be written to. Raises UserError if a file is missing or damaged.
    """
    images, labels = (read_npy(folder / split / f"{name}.npy") for name in Split._fields)
    if (images.dtype, images.ndim, labels.dtype, labels.shape) != (np.uint8, 4, np.int64, images.shape[:1]):
        raise UserError(
            f"{folder / split}: not prepared images and labels: {images.dtype} of shape {images.shape},"
            f" {labels.dtype} of shape {labels.shape}"
        )
    with warnings.catch_warnings(action="ignore"):  # that they are not to be written to
        found = Split(torch.from_numpy(images), torch.from_numpy(labels).to(device))
    return found._replace(images=found.images.to(device)) if fits(images.nbytes, device) else found


def load_training_data(folder: Path, device: torch.device) -> TrainingData:
    """A prepared set without its test split, each split as from `load_split`."""
    return TrainingData(load_dataset(folder), load_split(folder, "train", device), load_split(folder, "val", device))


def load_initial_weights(folder: Path, model: str) -> dict[str, Tensor]:
    """What a baseline's training starts from instead of random weights, by name. Raises UserError as `load_split`."""
    path = folder / "initial" / f"{model}.safetensors"
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
