"""Figures of merit with one test image left out, each in turn, in closed form instead of N times over.

`labels` are int arrays of shape (N,), `probabilities` float arrays of shape (N, K) whose rows sum to 1. A function returns the
figure and, float64 of shape (N,), the figure without each image. Where the only image of a class is left out, the class is.
"""

from collections.abc import Callable

import numpy as np

CALIBRATION_BINS = 15
TINY = np.finfo(float).tiny  # what a probability of 0 counts as where its logarithm is taken
Figure = tuple[float, np.ndarray]


def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Share of the images whose class is named, 0-1."""
    return _mean((probabilities.argmax(axis=1) == labels).astype(float))


def nll(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Negative log-likelihood, nats per image."""
    return _mean(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels].astype(float), TINY)))


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Mean over the labels' classes of the share of a class's images that are named so, 0-1."""
    correct, present = probabilities.argmax(axis=1) == labels, np.unique(labels)
    recalls = np.full((len(present), len(labels)), np.nan)
    for row, label in enumerate(present):
        members = labels == label
        count, right = members.sum(), correct[members].sum()
        recalls[row] = right / count
        recalls[row, members] = (right - correct[members]) / (count - 1) if count > 1 else np.nan
    value = np.mean([correct[labels == label].mean() for label in present])
    return float(value), _mean_of_classes(recalls, value)


def ece(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Expected calibration error in bins of equal width, 0-1 (Guo et al. 2017, eq. 3)."""
    confidence = probabilities.max(axis=1).astype(float)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bins = calibration_bins(confidence)
    of_bins = np.bincount(bins, gap, CALIBRATION_BINS)
    total = np.abs(of_bins).sum()
    without = total - np.abs(of_bins[bins]) + np.abs(of_bins[bins] - gap)
    return float(total / len(labels)), without / max(len(labels) - 1, 1)


def auc(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Area under the ROC curve by MedMNIST's definition (`medmnist.Evaluator`), 0-1.

    Two classes: that of the second class's probability. More: the mean over the classes of one against the rest, here over those
    that the labels hold (MedMNIST's own sets hold them all). At least two classes must be among the labels. What each image
    adds: DeLong, DeLong and Clarke-Pearson 1988.
    """
    of_classes = [1] if probabilities.shape[1] == 2 else np.unique(labels)
    values, without = [], []
    for label in of_classes:
        members = labels == label
        scores = probabilities[:, label].astype(float)
        if probabilities.shape[1] == 2:
            scores -= probabilities[:, 0]  # the same order; float32 makes many a probability near 1 equal to it
        ours, others = scores[members], scores[~members]
        above = _placements(ours, others)  # of each of ours, the others below it, half for ties
        below = len(ours) - _placements(others, ours)  # of each other, those of ours above it
        pairs, sum_of_pairs = len(ours) * len(others), above.sum()
        values.append(sum_of_pairs / pairs)
        of_class = np.full(len(labels), np.nan)
        if len(ours) > 1:
            of_class[members] = (sum_of_pairs - above) / (pairs - len(others))
        if len(others) > 1:
            of_class[~members] = (sum_of_pairs - below) / (pairs - len(ours))
        without.append(of_class)
    value = float(np.mean(values))
    return value, _mean_of_classes(np.stack(without), value)


FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], Figure]] = {
    "accuracy": accuracy,
    "auc": auc,
    "balanced_accuracy": balanced_accuracy,
    "nll": nll,
    "ece": ece,
}
LOWER_IS_BETTER = ("nll", "ece")


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """The numbers, from 0, of the bins of equal width of (0, 1] that confidences lie in."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def _mean(values: np.ndarray) -> Figure:
    return float(values.mean()), (values.sum() - values) / max(len(values) - 1, 1)


def _mean_of_classes(values: np.ndarray, all_images: float) -> np.ndarray:
    """Mean over the classes of values (classes, N), those that are NaN left out; `all_images` where all are."""
    present = ~np.isnan(values)
    means = np.where(present, values, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
    return np.where(present.any(axis=0), means, all_images)


def _placements(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of `others` are below each score, ties counting half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / 2
