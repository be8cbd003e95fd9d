"""Trainings on disk: `.trainings/<digest>/` of the main checkout, named by the digest of everything that decides a training.

A folder holds what is needed to resume while a training runs, its checkpoint and record when it is over. DVC, which empties a
stage's outputs before it runs and deletes a failed experiment's copy, does not reach it. Needs no PyTorch until tensors are read.
"""

import contextlib
import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.core.errors import UserError
from pipeline.core.files import main_checkout, md5, write_atomic
from pipeline.data.dataset import Dataset
from pipeline.networks.description import Description, Epoch, read_description

MOST_GB = 5.0  # that .trainings/ may hold; TRAININGS_MAX_GB says otherwise


class Record(BaseModel):
    """A training on the disk, finished or not: what MLflow mirrors."""

    model_config = ConfigDict(extra="forbid")

    key: str  # Description.digest
    setting: str
    model: str
    architecture: str
    arguments: dict[str, Any]
    dataset: Dataset
    seed: int
    parameters: dict[str, Any]
    teacher_md5: str | None = None  # of the teacher's checkpoint
    device: str
    epochs: int  # wanted
    started: float | None = None  # Unix time of its first start; None: not known
    seconds: float | None = None  # spent on training so far
    history: list[Epoch] = []
    loads: list[dict[str, float]] = []  # of the machine, after each epoch, by MLflow's names for system metrics
    best_epoch: int = 0
    checkpoint_md5: str | None = None  # of a finished training
    failed: str | None = None  # why it ended without a checkpoint

    @property
    def finished(self) -> bool:
        """Whether it has its checkpoint."""
        return self.checkpoint_md5 is not None

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.model}/seed{self.seed}"

    @classmethod
    def of_description(cls, description: Description, checkpoint_md5: str | None = None) -> "Record":
        """What a checkpoint's description says of its training: all but times and loads."""
        shared = {name: getattr(description, name) for name in cls.model_fields if name in Description.model_fields}
        epochs = len(description.history)
        return cls(key=description.digest, epochs=epochs, checkpoint_md5=checkpoint_md5, **shared)

    @classmethod
    def of_checkpoint(cls, path: Path) -> "Record":
        """The record of a finished training from its checkpoint alone. Raises UserError if that is damaged."""
        return cls.of_description(read_description(path), md5(path))


def trainings_folder() -> Path:
    """Where this checkout and its experiments' temporary copies keep their trainings."""
    return main_checkout() / ".trainings"


def record_path(root: Path, key: str) -> Path:
    """Where the record of a training lies."""
    return root / key / "record.json"


def read_record(root: Path, key: str) -> Record | None:
    """The record of a training; None if it is missing, damaged, or by code with other records."""
    try:
        return Record.model_validate_json(record_path(root, key).read_bytes())
    except (OSError, ValidationError):
        return None


class Entry:
    """The folder of one training, which this process alone has while it is open."""

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / key
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.state = self.folder / "state.pt"
        self.record = read_record(root, key)

    def is_finished(self) -> bool:
        """Whether checkpoint and record are there and belong together."""
        try:
            return bool(self.record and self.record.finished and md5(self.checkpoint) == self.record.checkpoint_md5)
        except OSError:
            return False

    def save(self, record: Record, state: dict[str, Any]) -> None:
        """Keep what a training needs to resume: tensors, numbers, strings, lists and dicts of them."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.state, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer())
        self.write(record)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None if there is none or it is damaged. No code in it is run."""
        import torch

        try:
            with self.state.open("rb") as file:
                digest, content = file.read(32), file.read()
            if hashlib.sha256(content).digest() == digest:
                return torch.load(io.BytesIO(content), weights_only=True)
        except OSError:
            pass
        return None

    def write(self, record: Record) -> None:
        """Put `record` into the folder."""
        self.record = record
        write_atomic(self.folder / "record.json", record.model_dump_json() + "\n")

    def finish(self, record: Record) -> None:
        """Note that the checkpoint is there; what was needed to resume goes."""
        self.write(record.model_copy(update={"checkpoint_md5": md5(self.checkpoint), "failed": None}))
        self.state.unlink(missing_ok=True)


@contextlib.contextmanager
def open_entry(root: Path, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[Entry]:
    """The folder of a training; another process that has it is waited for, and `waiting` called before.

    With the variable RETRAIN set, what is there is removed, unless another process has just made it.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{key}.lock")
    waited = False
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waited = True
        waiting()
        lock.acquire()
    try:
        if os.environ.get("RETRAIN") and not waited:
            shutil.rmtree(root / key, ignore_errors=True)
        entry = Entry(root, key)
        yield entry
        if entry.folder.exists():
            os.utime(entry.folder)  # as used just now
    finally:
        lock.release()


@contextlib.contextmanager
def working_place(root: Path, count: int) -> Iterator[None]:
    """One of `count` places for trainings at work, which all stages of the checkout share: waits until one is free."""
    root.mkdir(parents=True, exist_ok=True)
    locks = [FileLock(root / f"place{number}.lock") for number in range(count)]
    while True:
        for lock in locks:
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            try:
                yield
            finally:
                lock.release()
            return
        time.sleep(0.2)


def prune(root: Path) -> None:
    """Remove the trainings that were not used for longest until all take at most TRAININGS_MAX_GB; those at work stay.

    Raises UserError if that is no number.
    """
    try:
        most = float(os.environ.get("TRAININGS_MAX_GB") or MOST_GB) * 1e9
    except ValueError as error:
        raise UserError(f"TRAININGS_MAX_GB = {os.environ['TRAININGS_MAX_GB']!r}: a number is wanted") from error
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders}
    total = sum(sizes.values())
    for folder in folders:
        if total <= most:
            return
        with contextlib.suppress(Timeout), FileLock(root / f"{folder.name}.lock", blocking=False):
            shutil.rmtree(folder, ignore_errors=True)
            (root / f"{folder.name}.lock").unlink(missing_ok=True)
            total -= sizes[folder]
