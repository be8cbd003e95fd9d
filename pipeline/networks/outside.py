"""A teacher from outside as train_teacher leaves it: its logits for every image, instead of a checkpoint. Needs no PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import UserError, user_error
from pipeline.core.files import atomic_file
from pipeline.data.dataset import Dataset
from pipeline.data.npy import read_npz
from pipeline.networks.description import Description, Digest, checkpoint_path, read_description


class OutsideTeacher(BaseModel):
    """What the file of a teacher from outside says of itself. Equal teachers have equal files, whatever the seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["logits", "linear probe"]
    file: str  # that it comes from: the name alone
    file_md5: Digest
    setting: Digest  # of the file and of what decides which labels a probe sees: what the seeds have in common
    fingerprint: str  # of the data set
    parameters: dict[str, Any]  # of params.yaml that chose it, by dotted name
    splits: list[Literal["train", "val", "test"]]  # that there are logits of
    weights: Annotated[int, Field(ge=1)] | None = None  # of the probe: their number
    c: float | None = None  # of the probe: inverse strength of its L2 penalty


def write_outside(path: Path, teacher: OutsideTeacher, logits: Mapping[str, np.ndarray]) -> None:
    """Write a teacher and, by split, its float32 logits. Equal input, equal bytes."""
    arrays = {f"{split}_logits": logits[split] for split in teacher.splits}
    with atomic_file(path) as file:
        np.savez(file, description=np.array(teacher.model_dump_json()), **arrays)  # dates every member 1980-01-01


def read_outside(path: Path) -> OutsideTeacher:
    """What such a file says of itself. Raises UserError if it is missing, damaged or another file."""
    arrays = read_npz(path, ["description"])
    with user_error(f"{path}: damaged, or no teacher from outside", KeyError, ValidationError):
        return OutsideTeacher.model_validate_json(str(arrays["description"]))


def read_outside_logits(path: Path, split: str, dataset: Dataset) -> np.ndarray:
    """The logits of a split of `dataset`: float32 (N, K), of the training images with V views (N, V, K).

    Unlabelled images follow the training images. Raises UserError as `read_outside`, and for logits of other data.
    """
    images = dataset.images[split] + (dataset.images.get("unlabelled", 0) if split == "train" else 0)
    logits = read_npz(path, [f"{split}_logits"]).get(f"{split}_logits", np.empty(0))
    fits = logits.ndim > 1 and (len(logits), logits.shape[-1], logits.dtype) == (images, len(dataset.classes), np.float32)
    if not fits or read_outside(path).fingerprint != dataset.fingerprint:
        raise UserError(f"{path}: damaged, or made for other data than {dataset.name} in data/: run dvc repro")
    return logits


def read_teacher(path: Path) -> Description | OutsideTeacher:
    """What a teacher's file says of itself: a checkpoint, or a teacher from outside. Raises UserError."""
    return read_outside(path) if path.suffix == ".npz" else read_description(path)


def teacher_path(folder: Path, seed: int) -> Path:
    """Where the teacher of one seed lies: the one from outside if `folder` has it, else the checkpoint."""
    outside = folder / f"seed{seed}.npz"
    return outside if outside.exists() else checkpoint_path(folder, seed)


def outside_in(folder: Path) -> dict[int, Path]:
    """By seed, the teachers from outside in `folder`; none where a network is the teacher."""
    seeds = (path.stem.removeprefix("seed") for path in folder.glob("seed*.npz"))
    return {seed: folder / f"seed{seed}.npz" for seed in sorted(int(seed) for seed in seeds if seed.isdecimal())}


def is_measured(folder: Path) -> bool:
    """Whether a model in `folder` can be measured on the test images: not a teacher from outside without their logits."""
    return all("test" in read_outside(path).splits for path in outside_in(folder).values())
