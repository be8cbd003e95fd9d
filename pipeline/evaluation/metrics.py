"""Figures of merit from predictions.

`labels` are int arrays of shape (N,), `probabilities` float arrays of shape (N, K) whose rows sum to 1.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from scipy.special import rel_entr
from sklearn import metrics as sk

from pipeline.evaluation.jackknife import CALIBRATION_BINS, FIGURES, TINY, calibration_bins
from pipeline.evaluation.statistics import half_width


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """The figures of `jackknife.FIGURES`, of all images, and the weighted F1, 0-1."""
    figures = {name: figure(labels, probabilities)[0] for name, figure in FIGURES.items()}
    f1 = sk.f1_score(labels, probabilities.argmax(axis=1), average="weighted", zero_division=0)
    return figures | {"f1_weighted": float(f1)}


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Accuracy by confidence (the largest probability): the points of a reliability diagram.

    A row per bin of (0, 1], 15 of equal width: `bin` (its upper end), `images`, and their mean `confidence` and `accuracy`,
    0 where a bin is empty.
    """
    confidence = probabilities.max(axis=1).astype(float)
    correct = probabilities.argmax(axis=1) == labels
    bins = calibration_bins(confidence)
    images, *sums = (np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, correct))
    means = {name: total / np.maximum(images, 1) for name, total in zip(("confidence", "accuracy"), sums, strict=True)}
    return pd.DataFrame({"bin": np.arange(1, CALIBRATION_BINS + 1) / CALIBRATION_BINS, "images": images} | means)


def fidelity(probabilities: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """How close a student is to its teacher on the images (Stanton et al. 2021, arXiv:2106.05945).

    The share for which both name the same class, 0-1, and the mean of KL(teacher || student) at temperature 1, nats.
    """
    agreement = probabilities.argmax(axis=1) == teacher.argmax(axis=1)
    divergence = rel_entr(teacher, np.maximum(probabilities, TINY)).sum(axis=1)
    return {"agreement_with_teacher": float(agreement.mean()), "kl_from_teacher": float(divergence.mean())}


def by_class(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 (0-1) of each class by its name."""
    options = {"labels": range(len(classes)), "average": None, "zero_division": 0}
    columns = sk.precision_recall_fscore_support(labels, probabilities.argmax(axis=1), **options)[:3]
    rows = np.transpose(columns).tolist()
    return {name: dict(zip(("precision", "recall", "f1"), row, strict=True)) for name, row in zip(classes, rows, strict=True)}


def report(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> str:
    """scikit-learn's classification report as text."""
    options = {"labels": range(len(classes)), "target_names": classes, "digits": 4, "zero_division": 0}
    return sk.classification_report(labels, probabilities.argmax(axis=1), **options)


def confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Counts of shape (K, K): rows are the true classes, columns the predicted ones."""
    return sk.confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(probabilities.shape[1]))


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure; of several seeds also `_sd`, the sample standard deviation, and `_ci95`, the mean's `half_width`."""
    summary = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        summary[key] = fmean(values)
        if len(values) > 1:
            summary |= {f"{key}_sd": stdev(values), f"{key}_ci95": half_width(values)}
    return summary
