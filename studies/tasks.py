"""A study's points as tasks, and the two engines that do them: one by one in this process, or on Ray.

Tasks call the functions that the stages call. Trainings lie in `.trainings/` as those of the stages do, data sets and the points'
results in `.studies/`: equal tasks are done once, whichever points need them, and what was interrupted resumes.
"""

import functools
import hashlib
import io
import itertools
import logging
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from pipeline import fetch_data
from pipeline.core.errors import UserError, one_line
from pipeline.core.files import md5, write_atomic, write_json
from pipeline.core.provenance import code_digest
from pipeline.evaluation.comparisons import evaluate_track, tested
from pipeline.evaluation.predictions import predict_track
from pipeline.fetching.sources import own_file, read_source
from pipeline.networks.description import checkpoint_path
from pipeline.params import TRACKS, Params
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import CODE, Recipe, train
from pipeline.training.seeds import MEMORY

ROOT = Path(__file__).parents[1]
MODELS = ("teacher", "student_alone", "student_distilled")
TEACHERS = TRACKS["distillation"].teachers
PAIRS = [("student_distilled", "student_alone")]
TOKEN = "~/.ray/auth_token"  # noqa: S105 (where it lies), by which the machines of a cluster know each other
Outcome = tuple[Any, str | None]  # what a task returned; why it failed, in one line
_code, _md5 = functools.cache(code_digest), functools.cache(md5)


class Task(NamedTuple):
    """Something to do once: `work(digest, *arguments, *results)` with the results of the tasks that it needs."""

    digest: str  # of everything that decides the result
    title: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()  # digests
    threads: int = 1
    gpu: bool = False  # whether it takes one where there is one


def plan(params: Params) -> list[Task]:
    """The tasks of a point, each after those that it needs; the last is its evaluation. Raises UserError."""
    if params.teacher.file:
        raise UserError("a study trains its teachers: teacher.logits and teacher.features are for dvc repro and dvc exp run")
    tasks, track, folder = [], params.distillation, Path()

    def add(work: Callable[..., Any], code: tuple[str, ...], *arguments: Any, needs: tuple[str, ...]) -> str:
        facts = (work.__name__, arguments, needs, _code(code), version("torch"))
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        title = arguments[0].title if work is train_network else work.__name__
        tasks.append(Task(digest, title, work, arguments, needs, params.threads, params.device in ("auto", "cuda")))
        return digest

    file = own_file(track.dataset)
    source = (track.dataset, track.size, track.validation, track.folds, params.pretrained("distillation"))
    data = add(prepare_data, ("data", "fetching"), *source, _md5(file) if file and file.is_file() else None, needs=())
    big, small, distilled = (params.training("distillation", model) for model in MODELS)
    teachers = {seed: add(train_network, CODE, Recipe(**big, seed=seed, data=folder), needs=(data,)) for seed in params.seeds}
    checkpoints = []
    for seed, teacher in teachers.items():
        of_student = tuple(teachers.values()) if params.distill.ensemble else (teacher,)
        lone = add(train_network, CODE, Recipe(**small, seed=seed, data=folder), needs=(data,))
        learner = add(train_network, CODE, Recipe(**distilled, seed=seed, data=folder), needs=(data, *of_student))
        checkpoints += [teacher, lone, learner]
    settings = (params.device, params.threads, tuple(params.seeds))
    add(evaluate, ("data", "evaluation", "networks"), *settings, needs=(data, *checkpoints))
    return tasks


def prepare_data(
    digest: str,
    dataset: str,
    size: int,
    validation: float,
    folds: int | None,
    pretrained: Mapping[str, str | None],
    _own_md5: str | None,
) -> Path:
    """The folder with the prepared set, as the stage fetch_data makes it."""
    folder = ROOT / ".studies" / "data" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            fetch_data.write(read_source(dataset, size), validation, pretrained, folder, folds)
    return folder


def train_network(_digest: str, recipe: Recipe, data: Path, *teachers: Path) -> Path:
    """The checkpoint in `.trainings/`, as a stage trains it."""
    return train(replace(recipe, data=data, teachers=teachers), trainings_folder(), lambda record: None)


def evaluate(digest: str, device: str, threads: int, seeds: Sequence[int], data: Path, *checkpoints: Path) -> None:
    """Write a point's result: its models' figures and predictions of the test images and, where there are, validation images.

    `checkpoints` are those of MODELS of the first seed, then of the second, and so on.
    """
    import torch

    from pipeline.data.prepared import load_evaluation_data
    from pipeline.evaluation.metrics import score
    from pipeline.networks.inference import choose_device

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        for (seed, model), checkpoint in zip(itertools.product(seeds, MODELS), checkpoints, strict=True):
            link = checkpoint_path(Path(folder, model), seed)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(checkpoint)
        held = load_evaluation_data(data, choose_device(device))
        evaluation = evaluate_track("distillation", predict_track(Path(folder), held, MODELS), PAIRS, TEACHERS)
    figures = {"test": {model: entry["figures"] for model, entry in evaluation.detail["models"].items()}}
    arrays = {"test_labels": evaluation.labels} | {f"test_{model}": p for model, p in evaluation.probabilities.items()}
    if len(labels := evaluation.val_labels):
        figures["val"] = {
            model: [score(*tested(labels, seed)) for seed in p] for model, p in evaluation.val_probabilities.items()
        }
        arrays |= {"val_labels": labels} | {f"val_{model}": p for model, p in evaluation.val_probabilities.items()}
    if evaluation.patients is not None:
        arrays["patients"] = evaluation.patients
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomic(result_path(digest).with_suffix(".npz"), content.getvalue())
    write_json(result_path(digest), {"seeds": list(seeds), "figures": figures})


def result_path(digest: str) -> Path:
    """Where a point's result lies: `seeds`, and `figures` by split, model and seed, as in `Evaluation.detail`.

    Beside it, with the suffix .npz, by split: labels, int64 (N,), as `<split>_labels`; probabilities, float32 (S, N, K), as
    `<split>_<model>`, NaN where a seed did not see an image; and `patients` of the test images, int64 (N,), if they are known.
    """
    return ROOT / ".studies" / f"{digest}.json"


def attempt(task: Task, *needed: Outcome) -> Outcome:
    """Do a task, given the outcomes of those that it needs; where one of them failed, it fails for the same reason."""
    if reasons := [reason for _, reason in needed if reason]:
        return None, reasons[0]
    try:
        return task.work(task.digest, *task.arguments, *(result for result, _ in needed)), None
    except UserError as error:
        reason = error
    except Exception as error:  # a defect of ours, or of the machine
        traceback.print_exc()  # on Ray, into the worker's log
        reason = f"{type(error).__name__}: {error}"
    return None, f"{task.title}: {one_line(reason)}"


def one_by_one(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
    """Do the tasks, which are in order, in this process; yield each with its outcome."""
    outcomes: dict[str, Outcome] = {}
    for task in tasks:
        outcomes[task.digest] = attempt(task, *(outcomes[digest] for digest in task.needs))
        yield task, outcomes[task.digest]


def on_ray(tasks: Sequence[Task], workers: int | None, per_gpu: int) -> Iterator[tuple[Task, Outcome]]:
    """Do the tasks, which are in order, on the cluster that RAY_ADDRESS names, else on `workers` processes of this machine.

    A task takes as many cores as it has threads and, where there are GPUs, a share of 1 / `per_gpu`. Yields each with its
    outcome when it has ended. Raises UserError if Ray is missing or its cluster does not answer.
    """
    threads = max(task.threads for task in tasks)
    address, token = os.environ.get("RAY_ADDRESS", ""), Path(os.environ.get("RAY_AUTH_TOKEN_PATH", TOKEN)).expanduser()
    variables = MEMORY | {"PYTHONPATH": str(ROOT), "DATA_MIRROR": os.environ.get("DATA_MIRROR", "")}
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": {"env_vars": variables}}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    if not address:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # 127.0.0.1 alone, as Ray does by itself on those systems
        options |= {"num_cpus": workers * threads if workers else max(threads, os.cpu_count() or 1), "include_dashboard": False}
    elif "RAY_AUTH_TOKEN" in os.environ or token.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the cluster's own machines do by themselves
    try:
        import ray

        host, _, port = address.rpartition(":")
        if port.isdecimal():  # Ray itself tries for many minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", **options)
    except ImportError as error:
        raise UserError("Ray is not installed: pip install -r requirements-ray.lock, or run <name> --one-by-one") from error
    except Exception as error:  # of a dozen types
        advice = "name a running cluster as host:port, or unset it to run on this machine"
        raise UserError(f"RAY_ADDRESS={address}: {one_line(error)}: {advice}") from error
    share = 1 / per_gpu if ray.cluster_resources().get("GPU") else 0
    work, refs = ray.remote(max_retries=5)(attempt), {}  # retries: where a worker was lost
    try:
        for task in tasks:
            options = {"name": task.title, "num_cpus": task.threads, "num_gpus": share * task.gpu}
            refs[task.digest] = work.options(**options).remote(task, *(refs[digest] for digest in task.needs))
        futures = {refs[task.digest].future(): task for task in tasks}
        for future in as_completed(futures):
            task, error = futures[future], future.exception()  # of a worker that was lost again and again, or could not start
            if "No module named 'studies'" in str(error):
                error = f"a machine does not see {ROOT}: the machines of a cluster share the checkout's folder"
            yield task, (None, f"{task.title}: {one_line(error)}") if error else future.result()
    finally:
        ray.shutdown()
