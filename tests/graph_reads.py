"""What a stage reads and writes: its code by the imports, its parameters and files by watching it run."""

import ast
import contextlib
import importlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import params as params_module
from pipeline.networks.description import checkpoint_path
from pipeline.params import Block, Params
from pipeline.training.cache import Record
from pipeline.training.recipe import Recipe, train

ROOT = Path(__file__).parents[1]
DECIDE_NO_BYTE = ("core", "tracking", "serving", "params.py")  # of any output, and so no dependencies


@dataclass
class Reads:
    """Paths are relative to the folder that the stage ran in."""

    code: set[str]
    params: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)


def imported_code(stage: str) -> set[str]:
    """The stage's file and every package that it reaches, but those that decide no byte; imports inside functions count too."""
    reached: set[str] = set()
    waiting = [f"pipeline/{stage}.py"]
    while waiting:
        current = waiting.pop()
        if current in reached:
            continue
        reached.add(current)
        for node in ast.walk(ast.parse((ROOT / current).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            candidates = (Path(*name.split(".")).with_suffix(".py") for name in names if name.startswith("pipeline."))
            waiting.extend(str(path) for path in candidates if (ROOT / path).is_file() and path.parts[1] not in DECIDE_NO_BYTE)
    return {path if path.count("/") == 1 else str(Path(path).parent) for path in reached}


def observe(cmd: str) -> Reads:
    """Run a stage's command, `python -m pipeline.<stage> [argument]`, in this process and folder, and watch it."""
    module_name, *arguments = cmd.removeprefix("python -m ").split()
    module = importlib.import_module(module_name)
    reads = Reads(imported_code(module_name.partition(".")[2]))
    with pytest.MonkeyPatch.context() as patch, _files(reads):
        if hasattr(module, "train_seeds"):
            patch.setattr(module, "train_seeds", train_in_this_process)
        _watch_params(patch, module, reads.params)
        module.main(*arguments)
    return reads


def train_in_this_process(recipes: list[Recipe], root: Path, jobs: object, folder: Path) -> Iterator[Record]:
    """As training.seeds.train_seeds, where it can be watched."""
    records: list[Record] = []
    for recipe in recipes:
        path = train(recipe, root, records.append)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, checkpoint_path(folder, recipe.seed))
    return iter(records)


def _watch_params(patch: pytest.MonkeyPatch, module: object, record: set[str]) -> None:
    """Make the module's parameters note the dotted name of each value that is read."""
    place: dict[int, str] = {}

    def spy(self: Block, name: str) -> object:
        value = object.__getattribute__(self, name)
        if id(self) in place:
            prefix = place[id(self)]
            if name == "model_dump":
                record.update(leaves(self, prefix))
            elif name in type(self).model_fields and not isinstance(value, Block):
                record.add(prefix + name)
        return value

    def load() -> Params:
        params = params_module.load_params()
        remember(params, "")
        return params

    def remember(block: Block, prefix: str) -> None:
        place[id(block)] = prefix
        for name in type(block).model_fields:
            if isinstance(value := object.__getattribute__(block, name), Block):
                remember(value, f"{prefix}{name}.")

    patch.setattr(Block, "__getattribute__", spy)
    if hasattr(module, "load_params"):  # a stage may read no parameter
        patch.setattr(module, "load_params", load)


def leaves(block: Block, prefix: str = "") -> set[str]:
    """The dotted names of all values in a block."""
    names = set()
    for name in type(block).model_fields:
        value = object.__getattribute__(block, name)
        names |= leaves(value, f"{prefix}{name}.") if isinstance(value, Block) else {prefix + name}
    return names


_watching: list[Reads] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watching or event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str | Path):
        return
    path = os.path.normpath(re.sub(r"\.[^/]+\.\d+\.partial(/|$)", "", os.path.relpath(arguments[0])))  # on its way to its name
    if path.startswith(("data/", "models/", "metrics/")) and not path.startswith("data/downloads"):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        (_watching[-1].written if writes else _watching[-1].files).add(path)


@contextlib.contextmanager
def _files(reads: Reads) -> Iterator[None]:
    if not hasattr(sys, "_pipeline_audit"):  # an audit hook stays for the life of the process
        sys.addaudithook(_audit)
        sys._pipeline_audit = True
    _watching.append(reads)
    try:
        yield
    finally:
        _watching.pop()
