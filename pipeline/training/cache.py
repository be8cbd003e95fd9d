"""Trainings on disk: `.trainings/<digest>/` of the main checkout, named by the digest of everything that decides a training.

A folder holds what is needed to resume while a training runs, its checkpoint and record when it is over. DVC, which empties a
stage's outputs before it runs and deletes a failed experiment's copy, does not reach it. Needs no PyTorch until tensors are read.
"""

import contextlib
import hashlib
import io
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import UserError, user_error
from pipeline.core.files import main_checkout, md5, write_atomic
from pipeline.networks.description import Description, Digest, read_description

MOST_GB = 5.0  # that .trainings/ may hold; TRAININGS_MAX_GB says otherwise


class Record(Description):
    """A training as it lies on the disk, finished or not: what MLflow mirrors."""

    model_config = ConfigDict(frozen=False)  # it grows

    epochs: int  # wanted
    started: float | None = None  # Unix time of its first start; None: not known
    seconds: float | None = None  # spent on training so far
    loads: list[dict[str, float]] = Field(
        default_factory=list
    )  # of the machine, after each epoch, by MLflow's names for system metrics
    checkpoint_md5: Digest | None = None  # of a finished training
    failed: str | None = None  # why it ended without a checkpoint

    @model_validator(mode="after")
    def _is_whole(self) -> "Record":
        if self.finished and not 1 <= self.best_epoch <= len(self.history):
            raise ValueError(f"best_epoch {self.best_epoch} of {len(self.history)}")
        return self

    @property
    def finished(self) -> bool:
        """Whether it has its checkpoint."""
        return self.checkpoint_md5 is not None

    @classmethod
    def of_checkpoint(cls, path: Path) -> "Record":
        """The record of a finished training, without times and loads, from its checkpoint. Raises UserError."""
        description = read_description(path)
        return cls(**description.model_dump(), epochs=len(description.history), checkpoint_md5=md5(path))


def trainings_folder() -> Path:
    """Where this checkout and its experiments' temporary copies keep their trainings."""
    return main_checkout() / ".trainings"


def read_record(root: Path, digest: str) -> Record | None:
    """The record of a training; None if it is missing, damaged, another training's, or by code with other records."""
    path = root / digest / "record.json"
    try:
        record = Record.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError):
        return None
    return record if record and record.digest == digest else None


class Entry:
    """The folder of one training, which this process alone has while it is open."""

    def __init__(self, root: Path, digest: str) -> None:
        self.folder = root / digest
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.state = self.folder / "state.pt"
        self.record = read_record(root, digest)

    def is_finished(self) -> bool:
        """Whether checkpoint and record are there and belong together."""
        try:
            complete = self.record and self.record.finished and self.checkpoint.is_file()
            return bool(complete and md5(self.checkpoint) == self.record.checkpoint_md5 and self._describes_this())
        except OSError:
            return False

    def _describes_this(self) -> bool:
        try:
            return read_description(self.checkpoint).digest == self.folder.name
        except UserError:
            return False

    def save(self, record: Record, state: dict[str, Any]) -> None:
        """Keep what a training needs to resume: its record, and a dict of tensors, numbers, strings and dicts of them."""
        import torch

        torch.save(state | {"record": record.model_dump_json()}, buffer := io.BytesIO())
        write_atomic(self.state, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer())
        self.write(record)

    def load(self) -> tuple[Record, dict[str, Any]] | None:
        """What was saved last; None if nothing was or it is damaged. No code in it is run."""
        import torch

        saved = self.state.read_bytes() if self.state.is_file() else b""
        if hashlib.sha256(saved[32:]).digest() != saved[:32]:
            return None
        try:
            state = torch.load(io.BytesIO(saved[32:]), weights_only=True)
            record = Record.model_validate_json(state.pop("record"))
        except Exception:  # of a dozen types, on what somebody else has written there
            return None
        return (record, state) if record.digest == self.folder.name else None

    def write(self, record: Record) -> None:
        """Put `record` into the folder; with the checkpoint's MD5, what was needed to resume goes."""
        self.record = record
        write_atomic(self.folder / "record.json", record.model_dump_json() + "\n")
        if record.finished:
            self.state.unlink(missing_ok=True)


@contextlib.contextmanager
def open_entry(root: Path, digest: str, waiting: Callable[[], None] = lambda: None) -> Iterator[Entry]:
    """The folder of a training; another process that has it is waited for, and `waiting` called before.

    With the variable RETRAIN set, what is there is removed, unless another process has just made it.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{digest}.lock")
    try:
        lock.acquire(blocking=False)
        if os.environ.get("RETRAIN"):
            shutil.rmtree(root / digest, ignore_errors=True)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield (entry := Entry(root, digest))
        if entry.folder.exists():
            os.utime(entry.folder)  # as used just now
    finally:
        lock.release()


@contextlib.contextmanager
def working_place(root: Path, count: int) -> Iterator[None]:
    """One of `count` places for trainings at work, which all stages of the checkout share: waits until one is free."""
    root.mkdir(parents=True, exist_ok=True)
    for lock in itertools.cycle(FileLock(root / f"place{number}.lock", blocking=False) for number in range(count)):
        try:
            lock.acquire()
            break
        except Timeout:
            time.sleep(0.2 / count)
    try:
        yield
    finally:
        lock.release()


def prune(root: Path) -> None:
    """Remove the trainings that were not used for longest until all take at most TRAININGS_MAX_GB; those at work stay.

    Raises UserError if that is no number.
    """
    limit = os.environ.get("TRAININGS_MAX_GB") or str(MOST_GB)
    with user_error(f"TRAININGS_MAX_GB = {limit!r}: a number is wanted", ValueError):
        left = float(limit) * 1e9
        if math.isnan(left):
            raise ValueError("not a number")
    folders = [path for path in root.iterdir() if path.is_dir()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        left -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if left < 0:
            with contextlib.suppress(Timeout), FileLock(root / f"{folder.name}.lock", blocking=False):
                shutil.rmtree(folder, ignore_errors=True)
