"""A study's points as tasks, and the two engines that do them: one by one in this process, or on Ray.

A task prepares a data set, trains a network with one seed, or evaluates a point, by the functions that the stages call. Trainings
lie in `.trainings/` as those of the stages do, data sets and the points' results in `.studies/`: equal tasks are done once,
whichever points need them, and what was interrupted resumes.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from pipeline import distill_student, train_student_alone, train_teacher
from pipeline.core.errors import UserError, is_disk_full, no_space, one_line
from pipeline.core.files import atomic_folder, md5, write_atomic, write_json
from pipeline.core.provenance import code_digest
from pipeline.data.dataset import load_dataset
from pipeline.fetching.sources import own_file
from pipeline.networks.description import checkpoint_path
from pipeline.params import TRACKS, Params
from pipeline.training.recipe import CODE, Recipe, train
from pipeline.training.seeds import MEMORY

MODELS = TRACKS["distillation"].models
PAIR = TRACKS["distillation"].comparisons[0]  # the distilled student against the one trained alone
RETRIES = 5  # of a task whose worker was lost
Outcome = tuple[Any, str | None]  # what a task returned; why it failed, in one line


@dataclass(frozen=True)
class Task:
    """Something to do once: `work(root, digest, *arguments, *results)` with the results of the tasks in `needs`."""

    title: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple["Task", ...]
    digest: str  # of everything that decides the result
    threads: int
    gpu: bool  # whether it takes one where there is one


def plan(points: Mapping[str, Params]) -> dict[str, Task]:
    """By point, the task that evaluates it."""
    code, own_md5 = functools.cache(code_digest), functools.cache(md5)

    def task(work: Callable, packages: tuple[str, ...], *arguments: Any, title: str, params: Params, needs: tuple = ()) -> Task:
        facts = (work.__name__, code(packages), version("torch"), arguments, [needed.digest for needed in needs])
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        gpu = work is not prepare_data and params.device in ("auto", "cuda")
        return Task(title, work, arguments, needs, digest, params.threads, gpu)

    def evaluation(params: Params) -> Task:
        track, folder = params.distillation, Path()
        own = own_file(track.dataset)
        source = (track.dataset, track.size, track.validation, own_md5(own) if own and own.is_file() else None)
        data = task(prepare_data, ("data", "fetching"), *source, title=f"data set {track.dataset}", params=params)

        def training(recipe: Recipe, *needs: Task) -> Task:
            return task(train_network, CODE, recipe, title=recipe.title, params=params, needs=(data, *needs))

        teachers = [training(train_teacher.recipe(params, seed, folder)) for seed in params.seeds]
        alone = [training(train_student_alone.recipe(params, seed, folder)) for seed in params.seeds]
        distilled = [
            training(distill_student.recipe(params, seed, folder, folder), teacher)
            for seed, teacher in zip(params.seeds, teachers, strict=True)
        ]
        packages, arguments = ("data", "evaluation", "networks"), (params.device, params.threads)
        needs = (data, *teachers, *distilled, *alone)
        return task(evaluate, packages, *arguments, title="evaluation", params=params, needs=needs)

    return {point: evaluation(params) for point, params in points.items()}


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """These tasks and all that they need, each once and after those that it needs."""
    ordered: dict[str, Task] = {}
    for task in tasks:
        ordered |= {needed.digest: needed for needed in in_order(task.needs)} | {task.digest: task}
    return list(ordered.values())


def prepare_data(root: Path, digest: str, dataset: str, size: int, validation: float, _own_md5: str | None) -> Path:
    """The folder with the prepared set, as the stage fetch_data makes it."""
    from pipeline.fetching.preparation import prepare
    from pipeline.fetching.sources import read_source

    folder = root / ".studies" / "data" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            with atomic_folder(folder) as partial:
                prepare(read_source(dataset, size), validation, partial)
    return folder


def train_network(root: Path, _digest: str, recipe: Recipe, data: Path, teacher: Path | None = None) -> Path:
    """The checkpoint in `.trainings/`, as a stage trains it."""
    return train(replace(recipe, data=data, teacher=teacher), root / ".trainings", lambda record: None)


def evaluate(root: Path, digest: str, device: str, threads: int, data: Path, *checkpoints: Path) -> None:
    """Write a point's result; `checkpoints` are, for each of MODELS, those of every seed."""
    import torch

    from pipeline.data.prepared import load_split
    from pipeline.evaluation.comparisons import evaluate_track
    from pipeline.networks.inference import choose_device

    torch.set_num_threads(threads)
    seeds = len(checkpoints) // len(MODELS)
    options = {"models": MODELS, "comparisons": [PAIR], "teachers": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, checkpoint in enumerate(checkpoints):
            link = checkpoint_path(folder / MODELS[number // seeds], number % seeds)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(checkpoint)
        test = load_split(data, "test", choose_device(device))
        evaluation = evaluate_track("distillation", folder, load_dataset(data), test, **options)
    accuracy = {f"accuracy_{model}": evaluation.metrics[model]["accuracy"] for model in MODELS}
    comparison = evaluation.comparisons["{}_vs_{}".format(*PAIR)]
    names = ("gain", "low", "high", "detectable", "verdict")
    write_json(result_path(root, digest), accuracy | {name: comparison.get(name) for name in names})


def result_path(root: Path, digest: str) -> Path:
    """Where the result of an evaluation lies: accuracies (shares of 1), and the gain with its interval and verdict."""
    return root / ".studies" / f"{digest}.json"


def attempt(root: Path, task: Task, *needed: Outcome) -> Outcome:
    """Do a task, given the outcomes of those that it needs; where one of them failed, it fails for the same reason."""
    if reasons := [reason for _, reason in needed if reason]:
        return None, reasons[0]
    try:
        return task.work(root, task.digest, *task.arguments, *(result for result, _ in needed)), None
    except UserError as error:
        reason = str(error)
    except Exception as error:  # a defect of ours, or of the machine
        path = root / ".studies" / f"{task.digest}.traceback"
        with contextlib.suppress(OSError):
            write_atomic(path, traceback.format_exc())
        full = isinstance(error, OSError) and is_disk_full(error)
        reason = no_space(error) if full else f"{type(error).__name__}: {error} (see {path})"
    return None, f"{task.title}: {one_line(reason)}"


def one_by_one(root: Path, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
    """Do the tasks, which are in order, in this process; yield each with its outcome."""
    outcomes: dict[str, Outcome] = {}
    for task in tasks:
        outcomes[task.digest] = attempt(root, task, *(outcomes[needed.digest] for needed in task.needs))
        yield task, outcomes[task.digest]


def on_ray(root: Path, tasks: Sequence[Task], workers: int | None, per_gpu: int) -> Iterator[tuple[Task, Outcome]]:
    """Do the tasks, which are in order, on the cluster that RAY_ADDRESS names, else on `workers` processes of this machine.

    A task takes as many cores as it has threads and, where there are GPUs, a share of 1 / `per_gpu`. Yields each with its
    outcome when it has ended. Raises UserError if Ray is missing or its cluster does not answer.
    """
    ray = _start_ray(workers, max(task.threads for task in tasks))
    try:
        share = 1 / per_gpu if ray.cluster_resources().get("GPU", 0) else 0
        work = ray.remote(max_retries=RETRIES)(_work(str(root), os.environ.get("DATA_MIRROR", "")))
        refs: dict[str, Any] = {}
        for task in tasks:
            options = {"name": task.title, "num_cpus": task.threads, "num_gpus": share * task.gpu}
            needed = [refs[other.digest] for other in task.needs]
            refs[task.digest] = work.options(**options).remote(pickle.dumps(replace(task, needs=())), *needed)
        waiting = {refs[task.digest]: task for task in tasks}
        while waiting:
            for ref in ray.wait(list(waiting))[0]:
                task = waiting.pop(ref)
                try:
                    outcome = ray.get(ref)
                except ray.exceptions.RayError as error:
                    outcome = None, f"{task.title}: {type(error).__name__}: {one_line(error)}"
                yield task, outcome
    finally:
        ray.shutdown()


def _start_ray(workers: int | None, threads: int) -> ModuleType:
    """Ray, connected to the cluster that RAY_ADDRESS names, else to one of its own that listens on 127.0.0.1 alone."""
    address, machine = os.environ.get("RAY_ADDRESS"), {}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    if address:
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
        if "RAY_AUTH_TOKEN" in os.environ or token.is_file():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the cluster's own machines do by themselves
    else:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # 127.0.0.1 alone, as Ray does by itself on those systems
        os.environ.update(MEMORY | os.environ)
        workers = workers or max(1, (os.cpu_count() or 1) // threads)
        machine = {"num_cpus": workers * threads, "include_dashboard": False}
    try:
        import ray

        host, _, port = (address or "").rpartition(":")
        if port.isdecimal():  # Ray itself tries for many minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **machine)
    except ImportError as error:
        advice = "pip install -r requirements-ray.txt, or run <name> --one-by-one"
        raise UserError(f"a study runs on Ray, which is not installed: {advice}") from error
    except (OSError, RuntimeError, ValueError) as error:
        advice = "name a running cluster as host:port, or unset it to run on this machine"
        raise UserError(f"RAY_ADDRESS={address or ''}: no answer ({error}): {advice}") from error
    return ray


def _work(root: str, data_mirror: str) -> Callable[..., Outcome]:
    """What a Ray worker does. Made in a function, so that Ray sends its code: a machine without the checkout can then say so."""

    def work(pickled: bytes, *needed: Outcome) -> Outcome:
        if not Path(root, "dvc.yaml").is_file():
            return None, f"{socket.gethostname()} does not see {root}: the machines of a cluster share the checkout's folder"
        os.environ["DATA_MIRROR"] = data_mirror
        if root not in sys.path:
            sys.path.insert(0, root)
        from studies.tasks import attempt

        return attempt(Path(root), pickle.loads(pickled), *needed)  # noqa: S301 (our own)

    return work
