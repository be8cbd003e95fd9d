"""The MLflow store: a few operations, each of which may be done twice and counts once, and what is asked of it.

An operation that failed may still have reached a server, and a process may die between two calls: so whatever is not known to
be done is done again. A run is known by a key of ours, since MLflow's own id is in the answer that may get lost; MLflow
itself keeps one of two equal points of a curve.
"""

import base64
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.core.errors import UserError
from pipeline.core.files import main_checkout, write_atomic

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # these are read when mlflow is imported or calls
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds that a training may have to wait
os.environ.setdefault(
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"
)  # the client would create a second run where an answer was lost
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

logging.getLogger("mlflow").setLevel(logging.WARNING)  # not every table that a new store creates
KEY = "key"  # tag: what we call a run
CHECKPOINT = "checkpoint_md5"  # tag: the checksum that DVC keeps for the file too
EVALUATED = "evaluated"  # tag: digest of the results that the run already holds
SUMMARY = "summary"  # tag: digest of the results that a summary run holds
LATER = (401, 403, 408, 429)  # HTTP's 4xx that another day may see otherwise


class NoAnswerError(UserError):
    """The store cannot be reached or answers with an error of its own: another time it may do what was asked."""


class RefusedError(UserError):
    """The store will not do what was asked, however often it is asked."""


def tracking_uri() -> str:
    """The store: `MLFLOW_TRACKING_URI`, else SQLite in the main checkout, where temporary copies find it too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, separator, path = uri.partition("sqlite:///")
    if separator and not scheme and not path.startswith("/"):
        return f"sqlite:///{main_checkout() / path}"
    return uri


@contextmanager
def _as_ours() -> Iterator[None]:
    """Turn what MLflow raises into NoAnswerError or RefusedError."""
    try:
        yield
    except MlflowException as error:
        status = error.get_http_status_code()
        raise (RefusedError if 400 <= status < 500 and status not in LATER else NoAnswerError)(error) from error
    except (SQLAlchemyError, OSError) as error:  # an error of requests is an OSError too
        raise NoAnswerError(error) from error


def _create_store(path: Path) -> None:
    """A new SQLite store, whole or not at all: one that was killed between its first tables and its last could not be opened."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "mlflow.db"
        SqlAlchemyStore(f"sqlite:///{made}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        write_atomic(path, made.read_bytes())


class Store:
    """One experiment of the tracking store. Every method may raise NoAnswerError and RefusedError."""

    def __init__(self, experiment: str) -> None:
        """Open the store and the experiment, creating either where missing. Raises UserError if the store refuses."""
        try:
            self._open(experiment)
        except (NoAnswerError, RefusedError, ValueError) as error:
            kind = type(error) if isinstance(error, UserError) else RefusedError
            message = f"MLflow store {tracking_uri()}: {error}. Set MLFLOW_TRACKING_URI to a store that answers"
            raise kind(message) from error
        self.run_ids: dict[str, str] = {}  # by key

    def _open(self, experiment: str) -> None:
        uri = tracking_uri()
        # For a new SQLite store, which migrates itself when first opened: two processes doing so at once break it. And for what
        # is looked for first and created if it is not there.
        self.lock = FileLock(main_checkout() / "mlflow.db.lock")
        with _as_ours(), self.lock:
            if uri.startswith("sqlite:") and (path := make_url(uri).database) and not Path(path).exists():
                _create_store(Path(path))
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(experiment)
            self.experiment_id = found.experiment_id if found else self._create(experiment, uri.startswith("sqlite:"))
        if found and found.lifecycle_stage == "deleted":
            raise UserError(
                f"MLflow experiment {experiment!r} is deleted: restore it (mlflow experiments restore -x"
                f" {self.experiment_id}) or choose another name in tracking.experiment"
            )

    def _create(self, experiment: str, is_local: bool) -> str:
        # A server chooses its own artifact folder; without one, the default would lie in the current folder.
        location = (main_checkout() / "mlartifacts" / experiment).as_uri() if is_local else None
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # so that the UI opens the right pages
            return self.client.create_experiment(experiment, artifact_location=location, tags=kind)
        except MlflowException:
            if found := self.client.get_experiment_by_name(experiment):  # somebody else was faster
                return found.experiment_id
            raise

    def do(self, operation: str, arguments: Mapping[str, Any]) -> None:
        """Do one of the operations below."""
        with _as_ours():
            OPERATIONS[operation](self, **arguments)

    def start(
        self,
        key: str,
        name: str,
        time_ms: int,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        data: Mapping[str, Any],
    ) -> None:
        """A run of that key is there and running, with its tags, parameters and, unless `data` is empty, its data set."""
        if found := self._by_key(key):
            run_id = found[0].info.run_id
            self.client.update_run(run_id, RunStatus.to_string(RunStatus.RUNNING))
        else:
            run = self.client.create_run(self.experiment_id, time_ms, dict(tags) | {KEY: key}, name)
            run_id = run.info.run_id
        self.run_ids[key] = run_id
        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        if data:
            logged = Dataset(
                name=data["name"],
                digest=data["fingerprint"][:36],
                source_type="local",
                source=json.dumps({"dataset": data["name"]}),
                profile=json.dumps({"images": data["images"], "shape": data["shape"], "classes": data["classes"]}),
            )
            self.client.log_inputs(run_id, [DatasetInput(logged, [InputTag("mlflow.data.context", "training")])])

    def log(
        self, key: str, time_ms: int, step: int, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None
    ) -> None:
        """The points of that step and time are in the run's curves, and the tags on it; with the tags, the points are there.

        Of points that come with a checkpoint's tag, which are a run's once, those stay that are there: MLflow writes the points
        before the tags, and a process may be killed in between.
        """
        run_id = self._run_id(key)
        if tags:
            there = self.client.get_run(run_id).data
            if tags.items() <= there.tags.items():
                return
            if CHECKPOINT in tags:
                metrics = {name: value for name, value in metrics.items() if name not in there.metrics}
        points = [Metric(_allowed(name), value, time_ms, step) for name, value in metrics.items()]
        self.client.log_batch(run_id, points, tags=[RunTag(*tag) for tag in (tags or {}).items()])

    def catch_up(self, key: str, time_ms: int, epochs: Sequence[Mapping[str, float]]) -> None:
        """The run has points for all of these epochs, the first of which is number 1; those that it has stay as they are."""
        points = self.client.get_metric_history(self._run_id(key), "val_loss") if epochs else []
        logged = {point.step for point in points}
        for number, epoch in enumerate(epochs, start=1):
            if number not in logged:
                self.log(key, time_ms, number, epoch)

    def finish(self, key: str, time_ms: int, status: str) -> None:
        """The run has ended, and is the only one of its key: others come from answers that were lost."""
        run_id = self._run_id(key)
        self.client.set_terminated(run_id, status, time_ms)
        for run in self._by_key(key):
            if run.info.run_id != run_id:
                self.client.delete_run(run.info.run_id)

    def log_test(
        self,
        key: str,
        time_ms: int,
        checkpoint_md5: str,
        digest: str,
        metrics: Mapping[str, float],
        files: Mapping[str, str],
        recreated: Mapping[str, Any],
        epochs: Sequence[Mapping[str, float]],
        best_epoch: int,
    ) -> None:
        """The run that made a checkpoint holds the test results of that digest.

        Where the store does not know the checkpoint, its run is made again, of that key, from the remaining arguments.
        """
        with self.lock:
            run = self.find(CHECKPOINT, checkpoint_md5)
            if run is None:
                self.start(key, time_ms=time_ms, **recreated)
                self.catch_up(key, time_ms, epochs)
                self.log(key, time_ms, 0, {"best_epoch": best_epoch}, {CHECKPOINT: checkpoint_md5})
                self.finish(key, time_ms, "FINISHED")
                run_id = self.run_ids[key]
            else:
                run_id = self.run_ids[key] = run.info.run_id
            if run is None or run.data.tags.get(EVALUATED) != digest:
                self._add_files(run_id, files)
                self.log(key, time_ms, 0, metrics, {EVALUATED: digest})

    def log_summary(
        self,
        key: str,
        time_ms: int,
        digest: str,
        run: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, str],
    ) -> None:
        """A finished run holds the summary of that digest."""
        with self.lock:
            if self.find(SUMMARY, digest) is None:
                self.start(key, time_ms=time_ms, data={}, **run)
                self._add_files(self.run_ids[key], files)
                self.log(key, time_ms, 0, metrics, {SUMMARY: digest})
                self.finish(key, time_ms, "FINISHED")

    def _add_files(self, run_id: str, files: Mapping[str, str]) -> None:
        """Add artifacts: their bytes in base64, by path."""
        with tempfile.TemporaryDirectory() as folder:
            for path, content in files.items():
                (Path(folder) / path).write_bytes(base64.b64decode(content))
            self.client.log_artifacts(run_id, folder)

    def _run_id(self, key: str) -> str:
        if key not in self.run_ids:
            found = self._by_key(key)
            if not found:
                raise RefusedError(f"the run of key {key} is not in the store")
            self.run_ids[key] = found[0].info.run_id
        return self.run_ids[key]

    def _by_key(self, key: str) -> list[Run]:
        """The runs of a key, the one with the most in it first."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{key}'")
        return sorted(found, key=lambda run: -len(run.data.metrics))

    def find(self, tag: str, value: str) -> Run | None:
        """The newest finished run that carries the tag."""
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.{tag} = '{value}' and attributes.status = 'FINISHED'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return found[0] if found else None

    @_as_ours()
    def run_of(self, checkpoint_md5: str) -> str | None:
        """The id of the run that made a checkpoint; None if the store does not know."""
        run = self.find(CHECKPOINT, checkpoint_md5)
        return run.info.run_id if run else None

    @_as_ours()
    def training_seconds(self, checkpoint_md5: str) -> float | None:
        """How long the training of a checkpoint took; None if the store does not know."""
        run = self.find(CHECKPOINT, checkpoint_md5)
        return run.data.metrics.get("training_seconds") if run else None

    @_as_ours()
    def holds(self, tag: str, value: str, digest_tag: str, digest: str) -> bool:
        """Whether the newest finished run with the tag has that digest."""
        run = self.find(tag, value)
        return run is not None and run.data.tags.get(digest_tag) == digest

    @_as_ours()
    def describe_runs(self, checkpoint_md5: str) -> list[str]:
        """A line for each run of the experiment that made a checkpoint, the newest first."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.{CHECKPOINT} = '{checkpoint_md5}'", order_by=["attributes.start_time DESC"]
        )
        lines = []
        for run in found:
            tags, measured = run.data.tags, run.data.metrics.get("test_accuracy")
            parts = [
                run.info.run_name,
                f"run {run.info.run_id}",
                run.info.status.lower(),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(run.info.start_time / 1000)),
                f"commit {tags.get('mlflow.source.git.commit', 'unknown')[:12]}",
                *(
                    f"{name} {tags[key]}"
                    for name, key in (("stage", "dvc.stage"), ("experiment", "dvc.experiment"))
                    if key in tags
                ),
                f"test accuracy {measured:.4f}" if measured is not None else "not measured",
                *(["recreated by evaluate, not trained here"] if "recreated" in tags else []),
            ]
            lines.append(", ".join(parts))
        return lines


OPERATIONS = {
    operation.__name__: operation
    for operation in (Store.start, Store.log, Store.catch_up, Store.finish, Store.log_test, Store.log_summary)
}


def _allowed(name: str) -> str:
    """A metric's name without the characters that MLflow refuses: some class names have parentheses and commas."""
    return re.sub(r"[^\w\-. :/]", "_", name)
