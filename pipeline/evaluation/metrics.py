"""Figures of merit from predictions.

`labels` are int arrays of shape (N,), `probabilities` float arrays of shape (N, K) whose rows sum to 1.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from scipy.special import rel_entr
from sklearn import metrics as sk

from pipeline.evaluation.jackknife import CALIBRATION_BINS, TINY, calibration_bins
from pipeline.evaluation.statistics import half_width


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve by MedMNIST's definition (`medmnist.Evaluator`), 0-1.

    Two classes: the AUC of the second class's probability. More: the mean over the classes of one against the rest, here
    over the classes that the labels hold (MedMNIST's own sets hold them all). At least two classes must be among the labels.
    """
    if probabilities.shape[1] == 2:
        return float(sk.roc_auc_score(labels == 1, probabilities[:, 1]))
    return fmean(sk.roc_auc_score(labels == label, probabilities[:, label]) for label in np.unique(labels))


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy, AUC, weighted F1 (0-1), negative log-likelihood (nats per image), calibration error."""
    predicted = probabilities.argmax(axis=1)
    of_true_class = probabilities[np.arange(len(labels)), labels]
    bins = reliability(labels, probabilities)
    gap = (bins["accuracy"] - bins["confidence"]).abs()
    return {
        "accuracy": float(sk.accuracy_score(labels, predicted)),
        "balanced_accuracy": fmean(float((predicted[labels == label] == label).mean()) for label in np.unique(labels)),
        "auc": auc(labels, probabilities),
        "f1_weighted": float(sk.f1_score(labels, predicted, average="weighted", zero_division=0)),
        "nll": float(-np.log(np.maximum(of_true_class, TINY)).mean()),
        "ece": float((gap * bins["images"]).sum() / len(labels)),  # Guo et al. 2017, eq. 3
    }


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
