"""MLflow as a mirror of the disk: every call may be repeated, and completes what the store lacks.

A training that runs, resumes, has finished while the store was away, or comes as a checkpoint alone is mirrored by the same call.
Nothing is read back from MLflow for a result.
"""

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError, one_line
from pipeline.core.files import main_checkout
from pipeline.core.provenance import code_is_committed, commit, committed_parameters
from pipeline.core.tracking_uri import masked
from pipeline.tracking.store import NoAnswerError, is_no_answer, open_store, store_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from pipeline.evaluation.comparisons import Evaluation
    from pipeline.training.cache import Record

PAUSE = 60  # seconds until a store that did not answer is asked again
TRAINING, PARENT = "training", "parent"  # tags that runs are found by: a training's key, its setting (all but the seed)
CHECKPOINT = "checkpoint_md5"  # tag: the checksum that dvc.lock has too
MIRRORED, EVALUATED = "mirrored", "evaluated"  # tags: digest of the record, of the test results that the run holds
PARENT_ID, NOTE, STAGE, EXPERIMENT = "mlflow.parentRunId", "mlflow.note.content", "dvc.stage", "dvc.experiment"
LAST_OF_EPOCH = "train_loss"  # logged last: an epoch that has it is complete
COMMIT, DIRTY = "mlflow.source.git.commit", "mlflow.source.git.dirty"
FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in the name of a metric
MOST_F1 = 100  # classes up to which each has a metric of its own
OF_DISTILLATION = ("distill.", "kd.", "dkd.", "dist.", "wttm.", "rkd.")  # first in a run's name
SHORT = {"kd.temperature": "T"}  # in a run's name, where others have the last part of their key


class Mirror:
    """One experiment of the store, which may come and go.

    What the store does not take is said once and pending: the next call that gets through completes it, here or in `make sync`.
    """

    def __init__(self, experiment: str) -> None:
        """Open the experiment. Raises UserError if the store does not answer, unless the variable TRACK_LATER is set."""
        self.experiment = experiment
        self.client: MlflowClient | None = None
        self.away_since: float | None = None  # monotonic
        self.pending: dict[str, Callable[[], object]] = {}
        self.refusals: set[str] = set()
        self.refused = False  # something of the present call
        self.sent: dict[str, int] = {}  # by run, the epochs whose points this process has logged
        try:
            self.client, self.experiment_id = open_store(experiment)
        except NoAnswerError as error:
            if not os.environ.get("TRACK_LATER"):
                raise UserError(f"{error}, or TRACK_LATER=1 to go on and run make sync later") from error
            self._wait(error)

    def training(self, record: "Record", origin: Mapping[str, str] | None = None) -> None:
        """One run holds the record: parameters, every epoch's points once and, if it is finished, its checkpoint's MD5.

        `origin`: tags of a new run that say where the training comes from, if not from this process.
        """
        self._complete(record.digest, partial(self._training, record, origin or {}))

    def evaluation(self, evaluation: "Evaluation", origin: Mapping[str, str] | None = None) -> None:
        """The runs of the evaluated checkpoints hold their test results, the parent runs their means and the verdicts."""
        origin = {STAGE: "", **(origin or {})}
        self._complete(f"{evaluation.detail['track']} {origin}", partial(self._evaluation, evaluation, origin))

    def _complete(self, name: str, action: Callable[[], object]) -> None:
        """Do this and all that is pending, unless the store was away just now."""
        self.pending[name] = action
        if self.away_since is not None and time.monotonic() < self.away_since + PAUSE:
            return
        try:
            if self.client is None:
                self.client, self.experiment_id = open_store(self.experiment)
            for key, waiting in list(self.pending.items()):
                self.refused = False
                self._write(waiting)
                del self.pending[key]
            self.away_since = None
        except Exception as error:
            self._wait(error)

    def _wait(self, error: Exception) -> None:
        if self.away_since is None:
            _say(f"no answer ({masked(error)[:500]}). The work goes on: make sync brings the store up to date")
        self.away_since = time.monotonic()

    def _write(self, call: Callable[..., object], *arguments: object) -> None:
        """Call this. What the store refuses for good is said once, and the work goes on without it."""
        try:
            call(*arguments)
        except Exception as error:
            if is_no_answer(error):
                raise
            line = f"not in the store: {type(error).__name__}: {error}"
            if line not in self.refusals:
                _say(line)
            self.refusals.add(line)
            self.refused = True

    def _training(self, record: "Record", origin: Mapping[str, str]) -> "Run":
        run = self._run(TRAINING, record, origin)
        digest = _digest(record.model_dump_json())
        if run.data.tags.get(MIRRORED) == digest:
            return run
        run_id, start, metrics = run.info.run_id, run.info.start_time, run.data.metrics
        if run_id not in self.sent:  # what another process logged stays: a point of another value would be a second one
            history = self.client.get_metric_history(run_id, LAST_OF_EPOCH) if LAST_OF_EPOCH in metrics else []
            self.sent[run_id] = max((point.step for point in history), default=0)
        points = []
        for step in range(self.sent[run_id] + 1, len(record.history) + 1):
            values = record.history[step - 1].model_dump()
            values |= {f"train_{name}": value for name, value in values.pop("terms").items()}
            values |= record.loads[step - 1] if step <= len(record.loads) else {}
            values |= {LAST_OF_EPOCH: values.pop(LAST_OF_EPOCH)}
            points += [(name, value, start + step, step) for name, value in values.items() if value is not None]
        if record.finished:
            once = {"best_epoch": record.best_epoch, "training_seconds": record.seconds}
            points += [(name, value, start, 0) for name, value in once.items() if name not in metrics and value is not None]
        self._log(run, points)
        self.sent[run_id] = max(self.sent[run_id], len(record.history))
        if not (record.finished or record.failed):
            if run.info.status != "RUNNING":
                self.client.update_run(run_id, "RUNNING")
            return run
        parent, end = self._run(PARENT, record, origin), start + int(1000 * (record.seconds or 0))
        for ended in (run, parent):
            if ended.info.status == "RUNNING" or (ended.info.end_time or 0) < end:
                self.client.set_terminated(ended.info.run_id, "FINISHED" if record.finished else "FAILED", end)
        checkpoint = [(CHECKPOINT, record.checkpoint_md5)] if record.finished else []
        self._log(run, tags=[*checkpoint, (PARENT_ID, parent.info.run_id), (MIRRORED, digest)])
        return run

    def _evaluation(self, evaluation: "Evaluation", origin: Mapping[str, str]) -> None:
        for model, entry in evaluation.detail["models"].items():
            if not any(entry["histories"]):  # a teacher from outside: there was no training
                continue
            for row in range(len(entry["seeds"])):
                record = _record(evaluation.detail, model, row)
                parent, run = self._run(PARENT, record, origin), self._find(TRAINING, record.digest)
                if run is None or MIRRORED not in run.data.tags:
                    run = self._training(record, origin)
                self._test(run, parent, evaluation, record, row)
            self._summary(parent, evaluation, model)

    def _test(self, run: "Run", parent: "Run", evaluation: "Evaluation", record: "Record", row: int) -> None:
        """A checkpoint's run holds its test results."""
        labels, probabilities = evaluation.by_seed(record.model)[row]
        figures = evaluation.detail["models"][record.model]["figures"][row]
        tags = {PARENT_ID: parent.info.run_id}
        digest = _digest(json.dumps([figures, tags]), labels.tobytes(), probabilities.tobytes())
        if run.data.tags.get(EVALUATED) == digest:
            return
        from pipeline.evaluation.metrics import by_class, confusion, report
        from pipeline.evaluation.statistics import share_interval
        from pipeline.reporting.figures import plot_confusion

        classes, matrix = record.dataset.classes, confusion(labels, probabilities)
        low, high = share_interval(int(matrix.trace()), len(labels))
        by_name = by_class(labels, probabilities, classes)
        shown = by_name if len(by_name) <= MOST_F1 else {}  # the report below has every class, by its full name
        f1: dict[str, float] = {}
        for name, of_class in shown.items():
            key = f"f1.{FORBIDDEN.sub('_', name)}".replace("/", "_")
            while key in f1:
                key += "_"
            f1[key] = of_class["f1"]
        figure = plot_confusion({f"{record.model}, seed {record.seed}": matrix}, classes)
        self._write(self.client.log_figure, run.info.run_id, figure, "confusion_matrix.png")
        self._write(self.client.log_text, run.info.run_id, report(labels, probabilities, classes), "classification_report.txt")
        self._log_input(run, record, "test")
        self._log_results(run, {**figures, "accuracy_low": low, "accuracy_high": high, **f1}, tags | {EVALUATED: digest})

    def _summary(self, parent: "Run", evaluation: "Evaluation", model: str) -> None:
        """A parent run holds its seeds' means and, in tags that a table shows, what its model was compared with."""
        from pipeline.evaluation.statistics import FEWEST
        from pipeline.params import TRACKS
        from pipeline.reporting.report import sentence
        from pipeline.reporting.tables import cell, difference, results_table

        metrics, tags, table = evaluation.metrics[model], {}, ""
        for name, *style in (("accuracy", 100, 2), ("auc", 1, 4)):
            tags[name], half = cell(metrics, name, *style), metrics.get(f"{name}_ci95", 0)
            if len(evaluation.probabilities[model]) >= FEWEST:
                interval = {"low": max(0.0, metrics[name] - half), "high": min(1.0, metrics[name] + half)}
                tags[name] += f" ({cell(interval, 'low', *style)} to {cell(interval, 'high', *style)})"
        notes = [f"Seeds {', '.join(map(str, evaluation.detail['models'][model]['seeds']))}.", parent.data.tags.get("repeat", "")]
        # The track's question alone: what another model was compared with may be of another experiment next time.
        name, answer = next(iter(evaluation.comparisons.items()))
        if name.startswith(f"{model}_vs_"):
            gain, low, high = (difference(answer["metric"], answer[key]) for key in ("gain", "low", "high"))
            sure = answer["seeds"] >= FEWEST
            gain += f"{f' ({low} to {high})' if sure else ''} over {name.partition('_vs_')[2]}"
            tags |= {"gain": gain, "verdict": answer["verdict"] if sure else "a smoke test"}
            notes.insert(0, sentence(name, answer))
            table = results_table(evaluation, TRACKS[evaluation.detail["track"]].original_dataset)
        tags[NOTE] = "\n\n".join(notes)
        figures = {name: value for name, value in metrics.items() if not name.startswith(("parameters", "final_"))}
        digest = _digest(json.dumps([figures, tags]), table)
        if parent.data.tags.get(EVALUATED) != digest:
            if table:
                self._write(self.client.log_text, parent.info.run_id, table, "results.md")
            self._log_results(parent, figures, tags | {EVALUATED: digest})

    def _log_results(self, run: "Run", figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        points = {_metric_name(f"test_{name}"): value for name, value in figures.items()}
        changed = [name for name, value in points.items() if run.data.metrics.get(name, value) != value]
        earlier = [point for name in changed for point in self.client.get_metric_history(run.info.run_id, name)]
        # Of several values MLflow shows the latest; a clock may have been set back, or be another machine's.
        now = max([int(1000 * time.time()), *(point.timestamp + 1 for point in earlier)])
        self._log(run, [(name, value, now, 0) for name, value in points.items()])
        self._log(run, tags=tags.items())  # after the points: they say that all is there

    def _log(self, run: "Run", points: Iterable[tuple] = (), params: Iterable[tuple] = (), tags: Iterable[tuple] = ()) -> None:
        """Log points (name, value, time in ms, step), parameters and tags: no tag that says all is there if something is not."""
        from mlflow.entities import Metric, Param, RunTag

        named = [(_metric_name(name), *point) for name, *point in points]
        changed = [Metric(*point) for point in named if point[-1] or run.data.metrics.get(point[0]) != point[1]]
        values = [Param(name, str(value)[:6000]) for name, value in params]
        labels = [RunTag(*tag) for tag in tags if not (self.refused and tag[0] in (MIRRORED, EVALUATED))]
        self._write(self.client.log_batch, run.info.run_id, changed, values, labels)

    def _log_input(self, run: "Run", record: "Record", context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = record.dataset
        digest = _digest(data.fingerprint, context)  # MLflow leaves out a second context of a digest
        profile = json.dumps({"images": data.images, "shape": data.image_shape, "classes": len(data.classes)})
        source = json.dumps({"uri": str(main_checkout() / "data")})
        dataset = Dataset(data.name[:500], digest, "local", source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        with store_lock():  # MLflow looks for the data set and creates it if it is missing
            self._write(self.client.log_inputs, run.info.run_id, inputs)

    def _find(self, tag: str, value: str) -> "Run | None":
        """The run with a tag. Of several, which lost answers leave behind, one stays, the same whoever looks; the others go."""
        runs = self.client.search_runs([self.experiment_id], f"tags.{tag} = '{value}'", order_by=["attributes.start_time"])
        for run in runs[1:]:
            self.client.delete_run(run.info.run_id)
        return runs[0] if runs else None

    def _run(self, tag: str, record: "Record", origin: Mapping[str, str]) -> "Run":
        """The run of a training or, for the tag PARENT, of all seeds of its setting; with its parameters and data set."""
        value, seed = (record.digest, {"seed": record.seed}) if tag == TRAINING else (record.setting, {})
        run = self._find(tag, value)
        if run is None:
            parent = {PARENT_ID: self._run(PARENT, record, origin).info.run_id} if tag == TRAINING else {}
            name, tags = _identity(record, origin, **seed)
            tags |= parent | {tag: value}
            start = int(1000 * (record.started or time.time()))
            with store_lock():
                run = self._find(tag, value) or self.client.create_run(self.experiment_id, start, tags, name)
        params = {"model": record.model, **seed, "dataset": record.dataset.name, **record.parameters}
        if missing := [(name, value) for name, value in params.items() if name not in run.data.params]:
            self._log(run, params=missing)
        if not (run.inputs and run.inputs.dataset_inputs):
            self._log_input(run, record, "training")
        return run


def _record(detail: Mapping[str, Any], model: str, row: int) -> "Record":
    """The record of an evaluated checkpoint: the training's own if it is there, else what the evaluation says of it."""
    from pipeline.training.cache import Record, read_record, trainings_folder

    entry = detail["models"][model]
    lists = {"seed": "seeds", "digest": "digests", "checkpoint_md5": "checkpoints"}
    lists |= {"history": "histories", "best_epoch": "best_epochs"}
    of_seed = {field: entry[name][row] for field, name in lists.items()}
    record = read_record(trainings_folder(), of_seed["digest"])
    if record and record.checkpoint_md5 == of_seed["checkpoint_md5"]:
        return record
    of_setting = {name: entry[name] for name in ("setting", "architecture", "arguments", "parameters")}
    shared = {"dataset": detail["dataset"], "epochs": len(of_seed["history"]), "device": "unknown"}
    return Record(format=4, model=model, **shared, **of_setting, **of_seed)


def _identity(record: "Record", origin: Mapping[str, str], seed: int | None = None) -> tuple[str, dict[str, str]]:
    """Name and tags of a run, by how its parameters differ from those of its commit."""
    from mlflow.tracking.context.registry import resolve_tags  # the user and the program

    from pipeline.params import OWN_FILES, without_place
    from pipeline.reporting.tables import escape

    here = {STAGE: os.environ.get("DVC_STAGE"), EXPERIMENT: os.environ.get("DVC_EXP_NAME"), COMMIT: commit()}
    here[DIRTY] = "" if code_is_committed() else "true"
    tags = {name: value for name, value in resolve_tags(here | origin).items() if value}
    committed = committed_parameters(tags.get(COMMIT, ""))
    committed |= {name: without_place(str(value)) for name, value in committed.items() if value and name.endswith(OWN_FILES)}
    # A record holds what "auto" became.
    ordered = sorted(record.parameters.items(), key=lambda item: not item[0].startswith(OF_DISTILLATION))
    changed = {name: value for name, value in ordered if committed.get(name, value) not in (value, "auto")}
    varied = {name: json.dumps(value, ensure_ascii=False).removesuffix(".0") for name, value in changed.items()}
    shown = {name: value.strip('"').rpartition("/")[2] for name, value in varied.items()}  # of a path, the file's name
    words = [f"{SHORT.get(name, name.split('.')[-1])}={value}" for name, value in shown.items()]
    title = " ".join([record.model, *words])[:120]
    if seed is not None:
        title += f"/seed{seed}"
        varied |= {"seeds": f"[{seed}]"} if committed.get("seeds", [seed]) != [seed] else {}
    settings = [shlex.quote(f"{name}={value}") for name, value in varied.items()]
    command = " -S ".join(["dvc exp run --temp" if settings else "dvc repro", *settings])
    checkout = f"git checkout {tags[COMMIT][:12]} && " if COMMIT in tags else ""
    repeat = f"{checkout}{command} {tags.get(STAGE, '')}".rstrip().replace("`", "?")
    repeat = f"Again: `{repeat}`"
    repeat += " (The code had uncommitted changes.)" if DIRTY in tags else ""
    tags |= {"varied": " ".join(words)[:5000]} if words else {}
    tags |= {"model": record.model, "dataset": record.dataset.name, "device": record.device, "setting": record.setting}
    note = f"**{escape(title)}**, trained on {escape(record.dataset.name)}.\n\n{repeat}"
    return title, tags | {"repeat": repeat[:8000], NOTE: note[:8000]}


def _metric_name(name: str) -> str:
    """As MLflow allows."""
    return FORBIDDEN.sub("_", name)[:250]


def _say(text: str) -> None:
    print(f"tracking: {one_line(masked(text))}", file=sys.stderr, flush=True)


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(b"".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()[:32]
