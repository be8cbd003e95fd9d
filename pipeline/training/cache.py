"""Unfinished trainings: what a killed stage goes on from.

A file per training under `.progress/` of the main checkout, where DVC, which empties a stage's outputs before it runs and
deletes a failed experiment's copy, does not reach. Its name is a digest of everything that decides the result, so that only
the same training finds it. Written whole after each epoch; removed when the stage has finished all its seeds.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load, save
from torch import Tensor

from pipeline.core.files import main_checkout, write_atomic

CODE = (  # what decides the weights
    "checkpoints.py",
    "distillation.py",
    "inference.py",
    "models.py",
    "onednn.py",
    "processes.py",
    "progress.py",
    "runs.py",
    "training.py",
    "data/labels.py",
    "data/streaming.py",
)


class Unfinished(NamedTuple):
    """A training after some epoch: tensors by name, and what is no tensor."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Progress:
    """The unfinished trainings of one stage."""

    def __init__(self) -> None:
        self.done: list[Path] = []

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Forget the trainings if the stage has ended well."""
        if kind is None:
            for path in self.done:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)

    @contextlib.contextmanager
    def of(self, identity: Mapping[str, Any]) -> Iterator["File | None"]:
        """The file of the training that `identity` and the code decide; None while another process is at the same training."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for name in CODE:
            digest.update((Path(__file__).parent / name).read_bytes())
        digest.update(torch.__version__.encode())
        path = main_checkout() / ".progress" / f"{digest.hexdigest()[:32]}.safetensors"
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield None
            return
        try:
            self.done.append(path)
            yield File(path)
        finally:
            lock.release()


class File:
    """One training's file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, unfinished: Unfinished) -> None:
        """Put what is there by this, whole or not at all."""
        tensors = {name: tensor.cpu() for name, tensor in unfinished.tensors.items()}
        # Weights that are channels-last are written as they lie: to rearrange them takes longer than to write them.
        turned = [name for name, tensor in tensors.items() if tensor.dim() == 4 and not tensor.is_contiguous()]
        tensors |= {name: tensors[name].permute(0, 2, 3, 1) for name in turned}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = save(tensors, {"facts": json.dumps(unfinished.facts | {"turned": turned})})
        write_atomic(self.path, hashlib.sha256(content).digest(), content)

    def load(self) -> Unfinished | None:
        """What was saved; None if nothing was, or the file has changed since."""
        try:
            saved = self.path.read_bytes()
        except OSError:
            return None
        digest, content = saved[:32], saved[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # safetensors' format
        facts, tensors = json.loads(header["__metadata__"]["facts"]), load(content)
        tensors |= {name: tensors[name].permute(0, 3, 1, 2) for name in facts.pop("turned")}
        return Unfinished(tensors, facts)
