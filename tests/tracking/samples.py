"""Records as trainings leave them, an evaluation, and what the store holds of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.core.tracking_uri import tracking_uri
from pipeline.evaluation.comparisons import Evaluation
from pipeline.evaluation.metrics import over_seeds, score
from pipeline.evaluation.statistics import compare
from pipeline.networks.description import Epoch
from pipeline.params import TRACKS
from pipeline.training.cache import Record
from tests.conftest import DIGITS

DATASET = DIGITS.model_copy(update={"classes": ["zero", "one (a, b)"]})
COMMITTED = {"seeds": [0, 1], "kd.temperature": 5, "kd.alpha": 0.7, "distillation.lr": 0.001, "precision": "auto"}


def make_record(seed: int = 0, epochs: int = 3, finished: bool = True, model: str = "teacher", **changes: Any) -> Record:
    """A training's record after so many epochs."""
    history = [
        Epoch(train_loss=len(model) / n, train_accuracy=0.5, val_loss=2 / n, val_accuracy=1 - 0.6 / n, terms={"hard": 0.1 * n})
        for n in range(1, epochs + 1)
    ]
    fields = {
        "format": 4,
        "digest": f"{model}-{seed}",
        "setting": f"{model}-setting",
        "model": model,
        "architecture": "compact_cnn",
        "arguments": {"width": 8, "hidden": 32},
        "dataset": DATASET,
        "seed": seed,
        "parameters": {"distillation.lr": 0.001, "precision": "fp32"},
        "device": "cpu",
        "epochs": 3,
        "started": 1_700_000_000.0 + seed,
        "seconds": 1.5 * epochs,
        "history": history,
        "loads": [{"system/cpu_utilization_percentage": 50.0 + n} for n in range(epochs)],
        "best_epoch": epochs,
        "checkpoint_md5": f"md5-{model}-{seed}" if finished else None,
    }
    return Record(**fields | changes)


STUDENTS = {"student_distilled": 0.9, "student_alone": 0.7}


def make_evaluation(
    *records: Record,
    track: str = "distillation",
    shares: Mapping[str, float] = STUDENTS,
    images: int = 200,
    temperature: float | None = None,
) -> Evaluation:
    """The evaluation of models with the seeds of the records; `shares`: how much of the images each gets right.

    With a `temperature`, the distilled students are others, trained at that one.
    """
    random = np.random.default_rng(0)
    labels = np.arange(images) % 2
    models, probabilities, metrics = {}, {}, {}
    for model, share in shares.items():
        varied = {"kd.temperature": temperature} if temperature and model == "student_distilled" else {}
        suffix = f"-T{temperature:g}" if varied else ""
        entries = [record.model_copy(update={"model": model, "digest": f"{model}-{record.seed}{suffix}"}) for record in records]
        correct = np.stack([random.random(images) < share for _ in entries])
        second = np.where(correct, labels, 1 - labels) * 0.8 + 0.1
        probabilities[model] = np.stack([1 - second, second], axis=2).astype(np.float32)
        figures = [score(labels, rows.astype(float)) for rows in probabilities[model]]
        metrics[model] = over_seeds([values | {"final_train_loss": 0.5} for values in figures]) | {"parameters": 1000}
        models[model] = {
            **{name: getattr(records[0], name) for name in ("architecture", "arguments")},
            "parameters": records[0].parameters | varied,
            "setting": f"{model}-setting{suffix}",
            "seeds": [record.seed for record in entries],
            "digests": [record.digest for record in entries],
            "checkpoints": [f"md5-{record.digest}" for record in entries],
            "best_epochs": [record.best_epoch for record in entries],
            "figures": figures,
            "histories": [[epoch.model_dump() for epoch in record.history] for record in entries],
        }
    pairs = [pair for pair in TRACKS[track].comparisons if {*pair} <= {*shares}]
    compared = {
        f"{first}_vs_{second}": compare(labels, probabilities[first], probabilities[second]).as_json() for first, second in pairs
    }
    detail = {"track": track, "dataset": DATASET.model_dump(mode="json"), "models": models}
    return Evaluation(metrics, compared, detail, labels, probabilities, labels[:0], {})


def runs(experiment: str = "e") -> dict[str, Run]:
    """The store's runs by name; fails for two of one name."""
    client = MlflowClient(tracking_uri())
    listed = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    by_name = {run.info.run_name: run for run in listed}
    assert len(by_name) == len(listed), sorted(run.info.run_name for run in listed)
    return by_name


def curve(run: Run, name: str) -> list[tuple[int, float]]:
    """Step and value of a metric's points."""
    history = MlflowClient(tracking_uri()).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in history]
