"""Figures of merit from predictions.

`labels` are int arrays of shape (N,), `probabilities` float arrays of shape (N, K) whose rows sum to 1.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
from scipy.special import rel_entr
from sklearn import metrics as sk

from pipeline.evaluation.jackknife import CALIBRATION_BINS, FIGURES, TINY, calibration_bins
from pipeline.evaluation.statistics import half_width


def score(labels: np.ndarray, probabilities: np.ndarray, ordered: bool = False) -> dict[str, float]:
    """The figures of `jackknife.FIGURES`, of all images, macro and weighted F1, and average precision, 0-1.

    Of ordered classes also Cohen's kappa with quadratic weights (1968), at most 1. Means over classes are over those that the
    labels hold; of two classes, average precision is that of the second.
    """
    figures = {name: figure(labels, probabilities)[0] for name, figure in FIGURES.items()}
    named, present, classes = probabilities.argmax(axis=1), np.unique(labels), range(probabilities.shape[1])
    for average in ("macro", "weighted"):
        figures[f"f1_{average}"] = float(sk.f1_score(labels, named, labels=present, average=average, zero_division=0))
    positive = [1] if len(classes) == 2 else present
    precisions = [sk.average_precision_score(labels == label, probabilities[:, label]) for label in positive]
    figures["average_precision"] = float(np.mean(precisions))
    if ordered:
        figures["kappa"] = float(sk.cohen_kappa_score(labels, named, labels=classes, weights="quadratic"))
    return figures


def youden_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Of two classes, the second's probability from which it is named so that sensitivity + specificity is largest (Youden 1950).

    None unless both classes are among the labels.
    """
    if len(np.unique(labels)) < 2:
        return None
    false, true, thresholds = (array[1:] for array in sk.roc_curve(labels, probabilities[:, 1]))  # the first is infinite
    return float(thresholds[np.argmax(true - false)])


def operating_points(labels: np.ndarray, probabilities: np.ndarray, threshold: float | None) -> dict[str, float]:
    """Of two classes, `sensitivity`, the recall of the second, and `specificity`, of the first, 0-1; `_youden` at `threshold`."""
    named = {"": probabilities.argmax(axis=1)}
    if threshold is not None:
        named["_youden"] = probabilities[:, 1] >= threshold
    return {
        f"{name}{at}": float(sk.recall_score(labels, positive, pos_label=label))
        for at, positive in named.items()
        for name, label in (("sensitivity", 1), ("specificity", 0))
    }


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The points of a reliability diagram, by confidence (the largest probability): float64 (3, 15).

    Of each bin of (0, 1], 15 of equal width: its images, the sum of their confidences, and how many are named rightly.
    """
    confidence = probabilities.max(axis=1).astype(float)
    bins, correct = calibration_bins(confidence), probabilities.argmax(axis=1) == labels
    return np.stack([np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, correct)])


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
