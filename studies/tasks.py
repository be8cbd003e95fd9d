"""A study's points as tasks, each of which is done once in a workspace of its own.

A task is a stage of dvc.yaml, for one seed where the stage trains. Its digest is taken over everything that decides its
result, so that points share the trainings that they have in common, an interrupted study goes on, and a larger one reuses what
is there. The workspace, `.studies/<digest>/` of the main checkout, is laid out as a checkout: there the stage's own code runs,
as under DVC, on links to what other tasks made.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from filelock import FileLock

from pipeline.fetching.sources import own_file
from pipeline.core.errors import UserError, one_line
from pipeline.core.files import md5, write_json, write_atomic
from pipeline.params import Params

DONE = "done"  # the file that a workspace has once its task is done


class Stage(NamedTuple):
    """A stage of dvc.yaml; `module` and `arguments` are those of its command, `params` dotted names or blocks."""

    name: str
    module: str
    arguments: tuple[str, ...]
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]

    def code(self) -> list[str]:
        """The modules among its dependencies."""
        return [dep for dep in self.deps if dep.endswith(".py")]


@dataclass(frozen=True)
class Task:
    """A stage to run.

    Attributes
    ----------
    digest : str
        Of everything that decides the result; the workspace's name.
    stage : Stage
    seed : int or None
        The one to train; None for a stage that does not train.
    params : dict
        The content of its params.yaml.
    threads : int
        That PyTorch computes with.
    point : str
        The first point that needs the task.
    needs : tuple of Task
        Whose outputs it reads.
    """

    digest: str
    stage: Stage
    seed: int | None
    params: Mapping[str, Any]
    threads: int
    point: str
    needs: tuple["Task", ...]

    def __str__(self) -> str:
        return self.stage.name if self.seed is None else f"{self.stage.name}, seed {self.seed}"

    def uses_gpu(self) -> bool:
        """Whether it takes a GPU where there is one."""
        return "device" in self.stage.params and self.params["device"] in ("auto", "cuda")


def load_stages(root: Path) -> dict[str, Stage]:
    """The stages of a checkout's dvc.yaml by name."""
    from dvc.repo import Repo

    found = {}
    with Repo(str(root)) as repo:
        for stage in repo.index.stages:
            _, _, module, *arguments = shlex.split(stage.cmd)  # python -m module
            deps = tuple(dep.def_path for dep in stage.deps if not hasattr(dep, "params"))
            params = tuple(name for dep in stage.deps if hasattr(dep, "params") for name in dep.params)
            outs = tuple(out.def_path for out in stage.outs)
            found[stage.name] = Stage(stage.name, module, tuple(arguments), deps, params, outs)
    return found


def plan(root: Path, points: Mapping[str, Mapping[str, Any]], target: str, threads: int) -> dict[str, list[Task]]:
    """By point, the tasks of the stage `target`; tasks that are equal are one and the same, whichever points need them.

    `points` has by name what each would have in params.yaml. Raises UserError if dvc.yaml has no such stage.
    """
    stages = load_stages(root)
    if target not in stages:
        raise UserError(f"target = {target!r} is no stage of dvc.yaml; those are: {', '.join(sorted(stages))}")
    code = {name: _code(root, stage) for name, stage in stages.items()}
    upstream = {
        name: [other.name for other in stages.values() if _meet(stage.deps, other.outs)]
        for name, stage in stages.items()
    }
    own_md5 = functools.cache(md5)
    known: dict[str, Task] = {}

    def tasks(name: str, point: str, params: Params, found: dict[str, list[Task]]) -> list[Task]:
        if name not in found:
            stage = stages[name]
            needed = [task for other in upstream[name] for task in tasks(other, point, params, found)]
            own = [
                own_file(getattr(params, Path(dep).name).dataset) for dep in stage.deps if dep.startswith("data/own/")
            ]
            values = params.flat(*stage.params)
            found[name] = []
            for seed in params.seeds if "seeds" in values else [None]:
                needs = tuple(task for task in needed if seed is None or task.seed in (None, seed))
                facts = {
                    "stage": name,
                    "params": values if seed is None else values | {"seeds": [seed]},
                    "code": code[name],
                    "own": [own_md5(path) for path in own if path and path.is_file()],
                    "needs": [task.digest for task in needs],
                    "torch": torch.__version__,
                    "threads": threads,
                }
                digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
                if digest not in known:
                    content = dict(points[point]) if seed is None else {**points[point], "seeds": [seed]}
                    known[digest] = Task(digest, stage, seed, content, threads, point, needs)
                found[name].append(known[digest])
        return found[name]

    return {point: tasks(target, point, Params.model_validate(content), {}) for point, content in points.items()}


def _code(root: Path, stage: Stage) -> dict[str, str]:
    return {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in stage.code()}


def _meet(deps: Sequence[str], outs: Sequence[str]) -> bool:
    """Whether a dependency is an output, or below or above one."""
    return any(f"{dep}/".startswith(f"{out}/") or f"{out}/".startswith(f"{dep}/") for dep in deps for out in outs)


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """These tasks and all that they need, each once and after those that it needs."""
    found: dict[str, Task] = {}
    for task in tasks:
        if task.digest not in found:
            found |= {needed.digest: needed for needed in in_order(task.needs)}
            found[task.digest] = task
    return list(found.values())


def workspace(root: Path, task: Task) -> Path:
    """Where a task is done."""
    return root / ".studies" / task.digest


def is_done(root: Path, task: Task) -> bool:
    """Whether a task has been done."""
    return (workspace(root, task) / DONE).exists()


def begun(root: Path, task: Task) -> float:
    """When a task was last begun, as a Unix time; 0 if never."""
    try:
        return (workspace(root, task) / "params.yaml").stat().st_mtime
    except OSError:
        return 0


def environment(root: Path, commit: str) -> dict[str, str]:
    """The variables that a task is done with wherever it is done: what DVC would set, and the driver's own for store and data."""
    own = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    own |= {key: os.environ[key] for key in ("DATA_MIRROR", "TRACK_LATER") if key in os.environ}
    return own | {"DVC_ROOT": str(root), "DVC_EXP_BASELINE_REV": commit}


def attempt(root: Path, task: Task, variables: Mapping[str, str]) -> str | None:
    """Do a task unless it is done. Why it failed, in one line; None if it is done.

    Another process at the same task is waited for. What a killed one has left is removed, but for unfinished trainings
    (pipeline.training.cache), which go on.
    """
    folder = workspace(root, task)
    try:
        folder.parent.mkdir(exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        with lock:
            if not is_done(root, task):
                _do(root, task, variables)
            Path(lock.lock_file).unlink(missing_ok=True)
    except UserError as error:
        return f"{task}: {one_line(error)}"
    except Exception as error:  # a defect of ours, or of the machine
        with contextlib.suppress(OSError):
            write_atomic(folder / "traceback", traceback.format_exc())
        return f"{task}: {one_line(f'{type(error).__name__}: {error}')} (see {folder / 'traceback'})"
    return None


def _do(root: Path, task: Task, variables: Mapping[str, str]) -> None:
    folder = workspace(root, task)
    again = folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    started = time.time()
    _lay_out(root, task)
    with _as_a_stage(folder, task, variables):
        importlib.import_module(task.stage.module).main(*task.stage.arguments)
    times = {"started": started, "ended": time.time(), "again": again}
    write_json(folder / DONE, {"stage": task.stage.name, "seed": task.seed, **times})


def _lay_out(root: Path, task: Task) -> None:
    """Fill a workspace with what its stage reads: parameters, and links to the outputs of the tasks that it needs."""
    folder = workspace(root, task)
    write_atomic(folder / "params.yaml", yaml.safe_dump(dict(task.params), sort_keys=False))
    for dep in task.stage.deps:
        if dep.startswith("data/own/"):
            (folder / dep).mkdir(parents=True)
    for needed in task.needs:
        made = workspace(root, needed)
        for out in needed.stage.outs:
            for path in [made / out] if (made / out).is_file() else (made / out).rglob("*"):
                if path.is_file():
                    link = folder / path.relative_to(made)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(os.path.relpath(path, link.parent))


@contextlib.contextmanager
def _as_a_stage(folder: Path, task: Task, variables: Mapping[str, str]) -> Iterator[None]:
    """Have this process be one that DVC has started for a stage; what the stage prints goes into the workspace's `log`."""
    variables = {
        **variables,
        "DVC_STAGE": task.stage.name,
        "DVC_EXP_NAME": task.point,
        "OMP_NUM_THREADS": str(task.threads),
    }
    before = {key: os.environ.get(key) for key in variables}
    arguments, threads = sys.argv, torch.get_num_threads()
    with (folder / "log").open("w") as log, contextlib.redirect_stdout(log), contextlib.chdir(folder):
        os.environ.update(variables)
        sys.argv = [f"{task.stage.module.replace('.', '/')}.py", *task.stage.arguments]
        torch.set_num_threads(task.threads)
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
            sys.argv = arguments
            torch.set_num_threads(threads)
