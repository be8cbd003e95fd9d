"""How a study's tasks get done: one after another in this process, or on Ray.

An engine yields, again and again, the tasks that have ended since: by digest None, or why it failed, in one line. A task that
needs a failed one fails with the same reason; the others are done all the same.
"""

import logging
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.core.errors import UserError, one_line
from studies.tasks import Task, attempt

Ended = dict[str, str | None]
RETRIES = 5  # of a task whose worker was lost


def one_by_one(root: Path, tasks: Sequence[Task], variables: Mapping[str, str]) -> Iterator[Ended]:
    """Do the tasks, which are in order, in this process; `variables` as in tasks.attempt."""
    failed: Ended = {}
    for task in tasks:
        reason = _failed_before(task, failed) or attempt(root, task, variables)
        if reason:
            failed[task.digest] = reason
        yield {task.digest: reason}


def on_ray(
    root: Path, tasks: Sequence[Task], variables: Mapping[str, str], workers: int, threads: int, per_gpu: int
) -> Iterator[Ended]:
    """Do the tasks, which are in order, on the cluster that RAY_ADDRESS names, else on `workers` processes of this machine.

    `threads` is how many cores a task takes, `per_gpu` how many trainings share a GPU where there are GPUs. Yields every
    second. Raises UserError if Ray is missing or its cluster does not answer.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if (address := os.environ.get("RAY_ADDRESS")) and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the cluster's own machines do by themselves
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "a study runs on Ray, which is not installed: pip install -r requirements-ray.txt, or run <name> --one-by-one"
        ) from error
    if address:
        _look_for(address)
    machine = {} if address else {"num_cpus": workers * threads, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **machine)
    except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray at RAY_ADDRESS={address or 'local'}: {error}") from error
    try:
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        work = ray.remote(max_retries=RETRIES)(_work())
        refs = {}
        for task in tasks:
            options = {"num_cpus": threads, "num_gpus": 1 / per_gpu if has_gpus and task.uses_gpu() else 0}
            needs = [refs[needed.digest] for needed in task.needs if needed.digest in refs]
            refs[task.digest] = work.options(**options).remote(str(root), pickle.dumps(task), dict(variables), *needs)
        waiting = {refs[task.digest]: task for task in tasks}
        failed: Ended = {}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=1)
            ended: Ended = {}
            for ref in ready:
                task = waiting.pop(ref)
                try:
                    reason = ray.get(ref)
                except ray.exceptions.RayError as error:
                    reason = _failed_before(task, failed) or f"{task}: {type(error).__name__}: {one_line(error)}"
                ended[task.digest] = reason
                if reason:
                    failed[task.digest] = reason
            yield ended
    finally:
        ray.shutdown()


def _has_token() -> bool:
    """Whether this user has the secret by which machines of a Ray cluster know each other."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"))
    return "RAY_AUTH_TOKEN" in os.environ or path.expanduser().is_file()


def _look_for(address: str) -> None:
    """Raise UserError if nobody listens at a cluster's address: Ray itself tries for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no answer ({error}): name a running cluster as host:port, or unset it to run on this machine"
        ) from error


def _failed_before(task: Task, failed: Mapping[str, str | None]) -> str | None:
    return next((failed[needed.digest] for needed in task.needs if needed.digest in failed), None)


def _work() -> Callable[..., str | None]:
    """What a Ray worker does. Made in a function, so that Ray sends its code: a machine without the checkout can then say so."""

    def work(root: str, pickled: bytes, variables: dict[str, str], *reasons: str | None) -> str | None:
        if not Path(root, "dvc.yaml").is_file():
            return f"{socket.gethostname()} does not see {root}: the machines of a cluster share the checkout's folder"
        os.environ.update(variables)  # some are read when MLflow is imported
        if root not in sys.path:
            sys.path.insert(0, root)
        from studies.tasks import attempt

        return next(filter(None, reasons), None) or attempt(Path(root), pickle.loads(pickled), variables)  # noqa: S301 (our own)

    return work
