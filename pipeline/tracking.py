"""MLflow: one run per training, test results added to it, one summary run per track."""

import contextlib
import getpass
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipeline.checkpoints import Description, Epoch
from pipeline.data.prepared import Dataset
from pipeline.errors import UserError
from pipeline.files import main_checkout
from pipeline.provenance import changed_settings, code_is_committed, commit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
from mlflow import MlflowClient
from mlflow.entities import Dataset as LoggedDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from sqlalchemy.exc import SQLAlchemyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logging.getLogger("mlflow").setLevel(logging.WARNING)  # not every table that a new store creates
CHECKPOINT = "checkpoint_md5"  # tag: the checksum that DVC keeps for the file too
EVALUATED = "evaluated"  # tag: digest of the results that the run already holds
SUMMARY = "summary"  # tag: digest of the results that a summary run holds


def tracking_uri() -> str:
    """The store: `MLFLOW_TRACKING_URI`, else SQLite in the main checkout, where temporary copies find it too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, separator, path = uri.partition("sqlite:///")
    if separator and not scheme and not path.startswith("/"):
        return f"sqlite:///{main_checkout() / path}"
    return uri


class Tracker:
    """One experiment of the tracking store."""

    def __init__(self, experiment: str) -> None:
        """Open the store and the experiment, creating either where missing. Raises UserError if the store refuses."""
        uri = tracking_uri()
        is_local = uri.startswith("sqlite:")
        # For a new SQLite store, which migrates itself when first opened: two processes doing so at once break it. And for what
        # is looked for first and created if it is not there.
        self.lock = FileLock(main_checkout() / "mlflow.db.lock")
        try:
            with self.lock:
                self.client = MlflowClient(uri)
                found = self.client.get_experiment_by_name(experiment)
                self.experiment_id = found.experiment_id if found else self._create(experiment, is_local)
        except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
            raise UserError(f"MLflow store {uri}: {error}. Set MLFLOW_TRACKING_URI to a store that answers") from error
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

    @contextlib.contextmanager
    def training(
        self,
        model: str,
        seed: int,
        dataset: Dataset,
        parameters: Mapping[str, Any],
        device: str,
        unfinished: str | None = None,
        done: Sequence[Epoch] = (),
    ) -> Iterator["TrainingRun"]:
        """A run of one training. It ends as FINISHED, FAILED, or KILLED when interrupted.

        If the store still has the run `unfinished` of the same training, that one goes on. Of the epochs that are `done`, those
        that the run does not have are logged.
        """
        if unfinished and self._goes_on(unfinished):
            run_id = unfinished
        else:
            run_id = self._start(model, seed, dataset, parameters, {"device": device})
        logged = {metric.step for metric in self.client.get_metric_history(run_id, "val_loss")} if done else set()
        for number, epoch in enumerate(done, start=1):
            if number not in logged:
                TrainingRun(self.client, run_id).log_epoch(number, epoch)
        status = RunStatus.FAILED
        try:
            yield TrainingRun(self.client, run_id, _monitors())
            status = RunStatus.FINISHED
        except KeyboardInterrupt:
            status = RunStatus.KILLED
            raise
        finally:
            self.client.set_terminated(run_id, RunStatus.to_string(status))

    def _goes_on(self, run_id: str) -> bool:
        """Set a run to running again; False if the store does not know it."""
        try:
            self.client.update_run(run_id, RunStatus.to_string(RunStatus.RUNNING))
        except MlflowException:
            return False
        return True

    def _start(
        self, model: str, seed: int, dataset: Dataset, parameters: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        origin = _origin()
        note = f"**{model}**, trained on {dataset.name} with seed {seed}.\n\n{_how_to_repeat(origin)}"
        tags = {"model": model, "dataset": dataset.name, "mlflow.note.content": note, **origin, **tags}
        run_id = self.client.create_run(self.experiment_id, run_name=f"{model}/seed{seed}", tags=tags).info.run_id
        params = {"model": model, "seed": seed, "dataset": dataset.name, **parameters}
        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        logged = LoggedDataset(
            name=dataset.name,
            digest=dataset.fingerprint[:36],
            source_type="local",
            source=json.dumps({"dataset": dataset.name}),
            profile=json.dumps({"images": dataset.images, "shape": dataset.image_shape, "classes": dataset.classes}),
        )
        self.client.log_inputs(run_id, [DatasetInput(logged, [InputTag("mlflow.data.context", "training")])])
        return run_id

    def log_test(
        self,
        checkpoint_md5: str,
        description: Description,
        metrics: Mapping[str, float],
        texts: Mapping[str, str],
        figures: Mapping[str, "Figure"],
    ) -> None:
        """Add test results to the run that made a checkpoint, once.

        Where the store does not know the checkpoint (a new store, a checkpoint from elsewhere), its run is made again from
        the description and tagged `recreated`. `texts` and `figures` go by their artifact path.
        """
        with self.lock:
            run = self._find(CHECKPOINT, checkpoint_md5)
            if run is None:
                run_id = self._start(
                    description.model,
                    description.seed,
                    description.dataset,
                    description.parameters,
                    {"recreated": "true"},
                )
                for number, epoch in enumerate(description.history, start=1):
                    TrainingRun(self.client, run_id).log_epoch(number, epoch)
                TrainingRun(self.client, run_id).log_checkpoint(checkpoint_md5, description.best_epoch)
                self.client.set_terminated(run_id)
            else:
                run_id = run.info.run_id
            digest = _digest(metrics, texts)
            if run is None or run.data.tags.get(EVALUATED) != digest:
                self._add(run_id, metrics, texts)
                for path, figure in figures.items():
                    self.client.log_figure(run_id, figure, path)
                self.client.set_tag(run_id, EVALUATED, digest)

    def log_summary(
        self,
        track: str,
        parameters: Mapping[str, Any],
        metrics: Mapping[str, float],
        sentences: str,
        texts: Mapping[str, str],
        plots: Sequence[Path],
    ) -> None:
        """A run that holds a track's table and figures, once for the same results; `sentences` is what they show in words."""
        digest = _digest(metrics, texts)
        with self.lock:
            if self._find(SUMMARY, digest) is None:
                origin = _origin()
                note = f"{sentences}\n\n{_how_to_repeat(origin)}"
                tags = {"model": f"all of {track}", "mlflow.note.content": note, **origin}
                varied = [one for one in changed_settings() if one.split("=")[0] in (*parameters, "seeds")]
                name = " ".join([f"{track}/summary", *varied])  # what differs from the commit is seen at first sight
                run = self.client.create_run(self.experiment_id, run_name=name[:120], tags=tags)
                run_id = run.info.run_id
                self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
                self._add(run_id, metrics, texts)
                for path in plots:
                    self.client.log_artifact(run_id, str(path))
                self.client.set_tag(run_id, SUMMARY, digest)
                self.client.set_terminated(run_id)

    def run_of(self, checkpoint_md5: str) -> str | None:
        """The id of the run that made a checkpoint; None if the store does not know."""
        run = self._find(CHECKPOINT, checkpoint_md5)
        return run.info.run_id if run else None

    def training_seconds(self, checkpoint_md5: str) -> float | None:
        """How long the training of a checkpoint took; None if the store does not know."""
        run = self._find(CHECKPOINT, checkpoint_md5)
        return run.data.metrics.get("training_seconds") if run else None

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

    def _find(self, tag: str, value: str) -> Run | None:
        """The newest finished run that carries the tag."""
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.{tag} = '{value}' and attributes.status = 'FINISHED'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return found[0] if found else None

    def _add(self, run_id: str, metrics: Mapping[str, float], texts: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(run_id, [Metric(_allowed(key), value, now, 0) for key, value in metrics.items()])
        for path, text in texts.items():
            self.client.log_text(run_id, text, path)


class TrainingRun:
    """The MLflow run of one training."""

    def __init__(self, client: MlflowClient, run_id: str, monitors: Sequence[BaseMetricsMonitor] = ()) -> None:
        self.client = client
        self.run_id = run_id
        self.monitors = monitors

    def log_epoch(self, number: int, epoch: Epoch) -> None:
        """The curves' values after epoch `number`, and the machine's load during it, in one write."""
        now = int(time.time() * 1000)
        values = dict(epoch)
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self.client.log_batch(self.run_id, [Metric(key, value, now, number) for key, value in values.items()])

    def log_checkpoint(self, md5: str, best_epoch: int, seconds: float | None = None) -> None:
        """Which file the training made: the tag by which `Tracker.log_test` finds the run."""
        now = int(time.time() * 1000)
        metrics = {"best_epoch": best_epoch} | ({"training_seconds": seconds} if seconds is not None else {})
        self.client.log_batch(
            self.run_id, [Metric(key, value, now, 0) for key, value in metrics.items()], tags=[RunTag(CHECKPOINT, md5)]
        )


def _monitors() -> list[BaseMetricsMonitor]:
    """MLflow's own, of the processor's load since the last look, of memory and of an NVIDIA GPU if its library is there."""
    monitors: list[BaseMetricsMonitor] = [CPUMonitor()]
    with contextlib.suppress(Exception):  # no library, no driver, no GPU: each says so in its own way
        monitors.append(GPUMonitor())
    return monitors


def _how_to_repeat(origin: Mapping[str, str]) -> str:
    """A Markdown sentence with the commands that make this again."""
    stage = origin.get("dvc.stage")
    settings = "".join(f" -S '{setting}'" for setting in changed_settings())
    checkout = f"git checkout {origin.get('mlflow.source.git.commit', '')[:12]}"
    caution = "" if code_is_committed() else " (The code had uncommitted changes.)"
    if not stage:
        return f"Made outside of DVC, by {origin['mlflow.source.name']}, at `{checkout}`.{caution}"
    command = f"dvc exp run{settings} {stage}" if settings else f"dvc repro {stage}"
    return f"Again: `{checkout} && {command}`{caution}"


def _allowed(name: str) -> str:
    """A metric's name without the characters that MLflow refuses: some class names have parentheses and commas."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _digest(metrics: Mapping[str, float], texts: Mapping[str, str]) -> str:
    content = json.dumps([dict(metrics), dict(texts)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _origin() -> dict[str, str]:
    """Tags that say which code, stage and experiment a run comes from."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.git.commit": commit(),
        "dvc.stage": os.environ.get("DVC_STAGE"),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME"),
    }
    return {key: value for key, value in tags.items() if value}


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return None
