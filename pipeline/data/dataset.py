"""What a prepared set holds. Needs no PyTorch."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from pipeline.core.errors import user_error

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


def load_dataset(folder: Path) -> Dataset:
    """The description of a prepared set. Raises UserError if it is missing or damaged."""
    path = folder / "dataset.json"
    with user_error(f"{path}: cannot be read", OSError, ValidationError, then=f"dvc repro fetch_data@{folder.name} makes it"):
        return Dataset.model_validate_json(path.read_bytes())
