"""A track's models on its test images: every checkpoint measured, seeds summed up, models compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.networks.description import Description, checkpoints_in
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.data.dataset import Dataset
from pipeline.data.prepared import Split
from pipeline.core.errors import UserError
from pipeline.evaluation.metrics import agreement, by_class, confusion, divergence, over_seeds, reliability, score
from pipeline.evaluation.statistics import Comparison, above_chance, compare
from pipeline.evaluation.tracks import COMPARISONS, MODELS
from pipeline.core.files import md5
from pipeline.networks.inference import predict


class Measured(NamedTuple):
    """One checkpoint on the test images."""

    md5: str
    description: Description
    labels: np.ndarray  # int, (N,)
    probabilities: np.ndarray  # float64, (N, K)
    figures: dict[str, float]
    by_class: dict[str, dict[str, float]]
    confusion: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Which images are classified rightly: bool, (N,)."""
        return self.probabilities.argmax(axis=1) == self.labels


def measure_track(track: str, dataset: Dataset, test: Split) -> dict[str, list[Measured]]:
    """Every checkpoint of a track's models, by model, in the order of their seeds.

    A student's figures hold its fidelity to the teacher of the same seed too. Raises UserError if a checkpoint is missing,
    damaged or trained on other data than `dataset`, and if the models' seeds differ.
    """
    measured = {
        model: [measure(path, dataset, test) for path in checkpoints_in(Path("models") / track / model)]
        for model in MODELS[track]
    }
    seeds = {model: [run.description.seed for run in runs] for model, runs in measured.items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        raise UserError(f"models/{track}: the models were trained with different seeds, {seeds}: run dvc repro")
    if track == "distillation":
        for student in ("student_distilled", "student_alone"):
            for run, teacher in zip(measured[student], measured["teacher"], strict=True):
                run.figures["agreement_with_teacher"] = agreement(run.probabilities, teacher.probabilities)
                run.figures["kl_from_teacher"] = divergence(run.probabilities, teacher.probabilities)
    return measured


def measure(path: Path, dataset: Dataset, test: Split) -> Measured:
    """One checkpoint's results. Raises UserError if it was trained on other data than `dataset`."""
    classifier, description = load_checkpoint(path, test.labels.device)
    if description.dataset != dataset:
        raise UserError(f"{path}: trained on other data ({description.dataset.name}) than is in data/: run dvc repro")
    labels = test.labels.cpu().numpy()
    probabilities = torch.softmax(predict(classifier, test.images).double(), dim=1).cpu().numpy()
    figures = score(labels, probabilities) | {
        "final_train_loss": description.history[-1].train_loss,
        "parameters": sum(tensor.numel() for tensor in classifier.parameters()),
    }
    return Measured(
        md5(path),
        description,
        labels,
        probabilities,
        figures,
        by_class(labels, probabilities, dataset.classes),
        confusion(labels, probabilities),
    )


def summarise(runs: Sequence[Measured]) -> dict[str, float]:
    """One model's entry in metrics/<track>.json: means over the seeds, `_sd` and `_ci95` beside what varies."""
    parameters = runs[0].figures["parameters"]
    varying = [{key: value for key, value in run.figures.items() if key != "parameters"} for run in runs]
    return over_seeds(varying) | {"parameters": parameters}


def summarise_classes(runs: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """One model's precision, recall and F1 by class, means over the seeds as in `summarise`."""
    return {name: over_seeds([run.by_class[name] for run in runs]) for name in runs[0].by_class}


def compare_models(track: str, measured: Mapping[str, Sequence[Measured]]) -> dict[str, Comparison]:
    """The track's comparisons, by "<model>_vs_<other>"."""
    return {
        f"{model}_vs_{other}": compare(
            np.stack([run.right for run in measured[model]]), np.stack([run.right for run in measured[other]])
        )
        for model, other in COMPARISONS[track]
    }


def gains(track: str, measured: Mapping[str, Sequence[Measured]]) -> pd.DataFrame:
    """Each seed's difference in accuracy (share of 1): a row per seed, a column per comparison."""
    seeds = [run.description.seed for run in measured[MODELS[track][0]]]
    columns = {
        f"{model}_vs_{other}": [
            one.figures["accuracy"] - two.figures["accuracy"]
            for one, two in zip(measured[model], measured[other], strict=True)
        ]
        for model, other in COMPARISONS[track]
    }
    return pd.DataFrame(columns, index=pd.Index(seeds, name="seed"))


def pooled_reliability(runs: Sequence[Measured]) -> pd.DataFrame:
    """The reliability of one model over the predictions of all its seeds; columns as in `metrics.reliability`."""
    return reliability(
        np.concatenate([run.labels for run in runs]), np.concatenate([run.probabilities for run in runs])
    )


def predictions(measured: Mapping[str, Sequence[Measured]]) -> dict[str, np.ndarray]:
    """What every checkpoint said: `labels` int64 (N,), `seeds` int64 (S,), and by model the predicted class, int16 (S, N)."""
    first = next(iter(measured.values()))
    found = {"labels": first[0].labels, "seeds": np.array([run.description.seed for run in first])}
    for model, runs in measured.items():
        found[model] = np.stack([run.probabilities.argmax(axis=1) for run in runs]).astype(np.int16)
    return found


def how_it_was_run(dataset: Dataset, measured: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Data set, seeds and parameters of the checkpoints that were measured, and which seeds learned nothing."""
    models = {}
    for model, runs in measured.items():
        first = runs[0].description
        parameters = {key: value for key, value in first.parameters.items() if key != "teacher_md5"}
        models[model] = {
            "architecture": first.architecture,
            "arguments": first.arguments,
            "parameters": parameters,
            "seeds": [run.description.seed for run in runs],
            "best_epochs": [run.description.best_epoch for run in runs],
            "at_chance": [run.description.seed for run in runs if not _learned(run.description)],
        }
    return {"dataset": dataset.model_dump(), "models": models}


def _learned(description: Description) -> bool:
    """Whether the checkpoint does better on the validation images than naming the commonest class always would."""
    images = description.dataset.images["val"]
    accuracy, _ = description.best()
    return above_chance(round(accuracy * images), images, description.chance)
