"""Figures of merit from predictions."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score, roc_auc_score


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve by MedMNIST's definition (`medmnist.Evaluator`), 0-1.

    Two classes: the AUC of the second class's probability. More: the mean over the classes of one against the rest, here
    over the classes that the labels hold (MedMNIST's own sets hold them all).

    Parameters
    ----------
    labels : int array of shape (N,), of at least two classes
    probabilities : float array of shape (N, K)
    """
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels == 1, probabilities[:, 1]))
    return fmean(roc_auc_score(labels == label, probabilities[:, label]) for label in np.unique(labels))


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, AUC and weighted F1, all 0-1; arguments as in `auc`."""
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "auc": auc(labels, probabilities),
        "f1_weighted": float(f1_score(labels, predicted, average="weighted", zero_division=0)),
    }


def f1_by_class(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """F1 of each class by its name, 0-1; arguments as in `auc`."""
    predicted = probabilities.argmax(axis=1)
    values = f1_score(labels, predicted, labels=range(len(classes)), average=None, zero_division=0)
    return dict(zip(classes, values.tolist(), strict=True))


def report(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> str:
    """scikit-learn's classification report as text; arguments as in `auc`."""
    predicted = probabilities.argmax(axis=1)
    every = range(len(classes))
    return classification_report(labels, predicted, labels=every, target_names=classes, digits=4, zero_division=0)


def confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Counts of shape (K, K): rows are the true classes, columns the predicted ones; arguments as in `auc`."""
    return confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(probabilities.shape[1]))


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure over the seeds' runs and, from two seeds on, its sample standard deviation as `<figure>_sd`."""
    summary = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        summary[key] = fmean(values)
        if len(values) > 1:
            summary[f"{key}_sd"] = stdev(values)
    return summary
