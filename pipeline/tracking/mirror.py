"""Tracking: one MLflow run per training, test results added to it, one summary run per track.

A store that does not answer costs no training and no figure: what it does not take is kept and sent later (unsent.py).
"""

import base64
import contextlib
import getpass
import hashlib
import io
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.networks.description import Description, Epoch
from pipeline.data.dataset import Dataset
from pipeline.core.errors import UserError, one_line
from pipeline.core.provenance import changed_settings, code_is_committed, commit
from pipeline.tracking.store import CHECKPOINT, EVALUATED, SUMMARY, NoAnswerError, RefusedError, Store, tracking_uri
from pipeline.unsent import Kept, folder, set_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

PAUSE = 60  # seconds until a store that did not answer is asked again


class Tracker:
    """One experiment of the tracking store, which may come and go."""

    def __init__(self, experiment: str) -> None:
        """Open the experiment and send what earlier processes could not.

        Raises UserError if the store does not answer, unless the variable TRACK_LATER is set.
        """
        self.experiment = experiment
        self.store: Store | None = None
        self.kept = Kept(tracking_uri(), experiment)
        self.silent_since: float | None = None  # the store did not answer then, and has not been asked again
        try:
            self.store = Store(experiment)
            if count := self.kept.send_left(self._deliver):
                print(f"tracking: sent {count} entries that were kept in {folder()}", flush=True)
        except NoAnswerError as error:
            if not os.environ.get("TRACK_LATER"):
                raise UserError(
                    f"{error}, or TRACK_LATER=1 to go on: what is to be tracked is then sent later"
                ) from error
            self._wait(error)

    def _do(self, operation: str, **arguments: Any) -> None:
        """Have the store do something; if it does not answer, keep that and all that follows, and ask again after a while."""
        if self.silent_since is not None and time.monotonic() < self.silent_since + PAUSE:
            self.kept.add(operation, arguments)
            return
        try:
            self.kept.send(self._deliver)
            self._deliver(operation, arguments)
            self.silent_since = None
        except NoAnswerError as error:
            self.kept.add(operation, arguments)
            self._wait(error)

    def _deliver(self, operation: str, arguments: Mapping[str, Any]) -> None:
        if self.store is None:
            self.store = Store(self.experiment)
        try:
            self.store.do(operation, arguments)
        except RefusedError as error:
            path = set_aside(operation, arguments, str(error))
            print(
                f"tracking: {operation} was refused and put into {path}: {one_line(error)}", file=sys.stderr, flush=True
            )

    def _wait(self, error: NoAnswerError) -> None:
        if self.silent_since is None:
            print(
                f"tracking: no answer ({one_line(error)}). The work goes on; what is to be tracked is kept in {folder()} and sent"
                " by the next stage that reaches the store, or by python -m pipeline.send_unsent",
                file=sys.stderr,
                flush=True,
            )
        self.silent_since = time.monotonic()

    @contextlib.contextmanager
    def training(
        self,
        model: str,
        seed: int,
        dataset: Dataset,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        key: str | None = None,
        done: Sequence[Epoch] = (),
    ) -> Iterator["TrainingRun"]:
        """A run of one training. It ends as FINISHED, FAILED, or KILLED when interrupted.

        A run of that `key` goes on, if there is one; of the epochs that are `done`, those that it does not have are logged.
        """
        key = key or uuid.uuid4().hex
        self._do("start", key=key, time_ms=_now(), **_training_run(model, seed, dataset, parameters, tags))
        if done:
            self._do("catch_up", key=key, time_ms=_now(), epochs=[dict(epoch) for epoch in done])
        status = "FAILED"
        try:
            yield TrainingRun(self, key)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self._do("finish", key=key, time_ms=_now(), status=status)

    def log_test(
        self,
        checkpoint_md5: str,
        description: Description,
        metrics: Mapping[str, float],
        texts: Mapping[str, str],
        figures: Mapping[str, Callable[[], "Figure"]],
    ) -> None:
        """Add test results to the run that made a checkpoint, once.

        Where the store does not know the checkpoint (a new store, a checkpoint from elsewhere), its run is made again from
        the description and tagged `recreated`. `texts` and `figures` go by their artifact path; a figure is drawn only if it is
        logged.
        """
        digest = _digest(metrics, texts)
        if self._holds(CHECKPOINT, checkpoint_md5, EVALUATED, digest):
            return
        told = description
        self._do(
            "log_test",
            key=uuid.uuid4().hex,
            time_ms=_now(),
            checkpoint_md5=checkpoint_md5,
            digest=digest,
            metrics=dict(metrics),
            files=_texts(texts) | {path: _base64(_png(draw())) for path, draw in figures.items()},
            recreated=_training_run(told.model, told.seed, told.dataset, told.parameters, {"recreated": "true"}),
            epochs=[dict(epoch) for epoch in told.history],
            best_epoch=told.best_epoch,
        )

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
        if self._holds(SUMMARY, digest, SUMMARY, digest):
            return
        origin = _origin()
        note = f"{sentences}\n\n{_how_to_repeat(origin)}"
        varied = [one for one in changed_settings() if one.split("=")[0] in (*parameters, "seeds")]
        name = " ".join([f"{track}/summary", *varied])[:120]  # what differs from the commit is seen at first sight
        tags = {"model": f"all of {track}", "mlflow.note.content": note, **origin}
        self._do(
            "log_summary",
            key=uuid.uuid4().hex,
            time_ms=_now(),
            digest=digest,
            run={"name": name, "tags": tags, "params": dict(parameters)},
            metrics=dict(metrics),
            files=_texts(texts) | {path.name: _base64(path.read_bytes()) for path in plots},
        )

    def training_seconds(self, checkpoint_md5: str) -> float | None:
        """How long the training of a checkpoint took; None if the store does not know or does not answer."""
        try:
            return self.store.training_seconds(checkpoint_md5) if self.store else None
        except NoAnswerError as error:
            self._wait(error)
            return None

    def _holds(self, tag: str, value: str, digest_tag: str, digest: str) -> bool:
        if self.silent_since is not None:
            return False
        try:
            return self.store.holds(tag, value, digest_tag, digest)
        except NoAnswerError as error:
            self._wait(error)
            return False


class TrainingRun:
    """The MLflow run of one training."""

    def __init__(self, tracker: Tracker, key: str) -> None:
        self.key = key
        self.monitors = _monitors()
        self.do = tracker._do

    def log_epoch(self, number: int, epoch: Epoch) -> None:
        """The curves' values after epoch `number`, and the machine's load during it, in one write."""
        values = dict(epoch)
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self.do("log", key=self.key, time_ms=_now(), step=number, metrics=values)

    def log_checkpoint(self, md5: str, best_epoch: int, seconds: float) -> None:
        """Which file the training made: the tag by which `Tracker.log_test` finds the run."""
        metrics = {"best_epoch": best_epoch, "training_seconds": seconds}
        self.do("log", key=self.key, time_ms=_now(), step=0, metrics=metrics, tags={CHECKPOINT: md5})


def _training_run(
    model: str, seed: int, dataset: Dataset, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> dict[str, Any]:
    """Name, tags, parameters and data set of a training's run."""
    origin = _origin()
    note = f"**{model}**, trained on {dataset.name} with seed {seed}.\n\n{_how_to_repeat(origin)}"
    facts = {"name": dataset.name, "fingerprint": dataset.fingerprint}
    return {
        "name": f"{model}/seed{seed}",
        "tags": {"model": model, "dataset": dataset.name, "mlflow.note.content": note, **origin, **tags},
        "params": {"model": model, "seed": seed, "dataset": dataset.name, **parameters},
        "data": facts | {"images": dataset.images, "shape": dataset.image_shape, "classes": dataset.classes},
    }


def _monitors() -> list["BaseMetricsMonitor"]:
    """MLflow's own, of the processor's load since the last look, of memory and of an NVIDIA GPU if its library is there."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor()]
    with contextlib.suppress(Exception):  # no library, no driver, no GPU: each says so in its own way
        monitors.append(GPUMonitor())
    return monitors


def _now() -> int:
    return int(time.time() * 1000)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _texts(texts: Mapping[str, str]) -> dict[str, str]:
    return {path: _base64(text.encode()) for path, text in texts.items()}


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


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
