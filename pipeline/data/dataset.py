"""What a prepared set holds. Needs no PyTorch."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from pipeline.core.errors import user_error

SPLITS = ("train", "val", "test")
UNKNOWN = -1  # the label of an image that has none, or whose label may not be used
Resize = Literal["pad", "crop", "stretch"]  # rules of pipeline/core/images.py
Side = Annotated[int, Field(ge=1, le=65_536)]
_ABSENT = Field(exclude_if=lambda value: not value)


class Dataset(BaseModel):
    """What a prepared set holds. The same images give the same description, wherever they came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    classes: list[str]
    image_shape: tuple[Side, Side, Side]  # height, width, channels
    mean: FiniteFloat  # input scaling: (pixel / 255 - mean) / std
    std: Annotated[FiniteFloat, Field(gt=0)]
    images: dict[str, int]  # per split; `unlabelled` ones, if there are any, lie behind the training images
    validation: str  # where the validation split comes from
    fingerprint: str  # SHA-256 over every split's images and labels
    # Left out where there is nothing to say: most sets are described, and their trainings named, without these.
    resize: Annotated[Resize | None, _ABSENT] = None  # how the images got their size, if it is known
    ordered: Annotated[bool, _ABSENT] = False  # whether the classes are grades, from the lowest to the highest
    shared_images: Annotated[dict[str, int], _ABSENT] = {}  # "train/test": test images that are training images too, if any
    # Of a cross-validation, the number of its folds: train/ and test/ both hold all images, val/ none; `images` counts seed 0's.
    folds: Annotated[int, _ABSENT] = 0


def held_out(of_images: np.ndarray, folds: int, seed: int, split: str) -> np.ndarray:
    """Which images, bool (N,), a training by `seed` is tested ("test") or validated ("val") on, by the fold that each is in."""
    return of_images == (seed + (split == "val")) % folds


def load_dataset(folder: Path) -> Dataset:
    """The description of a prepared set. Raises UserError if it is missing or damaged."""
    path = folder / "dataset.json"
    with user_error(f"{path}: cannot be read", OSError, ValidationError, then=f"dvc repro fetch_data@{folder.name} makes it"):
        return Dataset.model_validate_json(path.read_bytes())
