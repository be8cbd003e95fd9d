"""Is one model better than another, by how much, and how certain is that: seeds as readers, test images as cases.

Two things are left to chance: the training (its seed) and which images are in the test split. Every seed sees every image, as
every reader sees every case in a study of diagnostic imaging; the analysis is that of such studies, by Obuchowski and Rockette
(1995, Communications in Statistics 24:285-308) with Hillis' degrees of freedom (2007, Statistics in Medicine 26:596-619).
"""

from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, nct, t

from pipeline.evaluation.jackknife import FIGURES, LOWER_IS_BETTER

CONFIDENCE = 0.95
POWER = 0.8
FEWEST = 3  # seeds that say anything about how much training varies
OF_CLASSES = ("auc", "balanced_accuracy")  # means over the classes
FEWEST_IMAGES = 10  # of every class, for these: below, the jackknife does not see how much one image decides


class Comparison(NamedTuple):
    """A figure of one model minus that of another, of the same seeds; the reverse of a figure that is better when low."""

    metric: str  # a name in jackknife.FIGURES
    margin: float  # a difference of that figure that would not matter
    gain: float  # mean over seeds and test images
    low: float  # the 95 % interval, over seeds and images
    high: float
    seeds_low: float  # the same over seeds, on these very images: a paired t test; NaN for a single seed
    seeds_high: float
    low_90: float  # the 90 % interval over seeds and images, whose place within the margin is two one-sided tests at 5 %
    high_90: float
    p: float  # of no difference, two-sided
    df: float  # degrees of freedom
    detectable: float  # the smallest gain that as many seeds and images would show with a probability of 80 %; NaN for one seed
    seeds: int
    images: int
    smallest_class: int  # of the test images' classes, the images of the rarest

    @property
    def enough(self) -> bool:
        """Whether there are seeds and images for a verdict."""
        return self.seeds >= FEWEST and (self.metric not in OF_CLASSES or self.smallest_class >= FEWEST_IMAGES)

    @property
    def equivalent(self) -> bool:
        """Whether a difference as large as the margin, either way, is ruled out at 5 %."""
        return self.enough and -self.margin < self.low_90 <= self.high_90 < self.margin

    @property
    def verdict(self) -> str:
        """What may be said at 95 %; without `enough` seeds and images, which would not show how much they vary, nothing."""
        if self.enough and not self.low <= 0 <= self.high:
            return f"{'better' if self.gain > 0 else 'worse'}{', by less than the margin' if self.equivalent else ''}"
        return "equivalent" if self.equivalent else "undecided"

    def as_json(self) -> dict[str, float | str]:
        """The figures and the verdict, without those that a single seed, or models without a difference, do not have."""
        figures = {key: value for key, value in self._asdict().items() if isinstance(value, str) or np.isfinite(value)}
        return figures | {"verdict": self.verdict}


def compare(
    labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, metric: str = "accuracy", margin: float = 0.0
) -> Comparison:
    """Two models by their probabilities, (S, N, K), of N images with `labels`, (N,); row s of both is of the same seed."""
    if ours.shape != theirs.shape:
        raise ValueError(f"the two models have other seeds or images: {ours.shape} and {theirs.shape}")
    figure, sign = FIGURES[metric], -1 if metric in LOWER_IS_BETTER else 1
    gains, without = [], []
    for of_ours, of_theirs in zip(ours, theirs, strict=True):
        (value, values), (other, others) = figure(labels, of_ours), figure(labels, of_theirs)
        gains.append(sign * (value - other))
        without.append(sign * (values - others))
    return analyse(gains, np.stack(without), metric, margin, int(np.unique(labels, return_counts=True)[1].min()))


def analyse(gains: Sequence[float], without: np.ndarray, metric: str, margin: float, smallest_class: int) -> Comparison:
    """The analysis of gains by seed, (S,), and of the same without each image, (S, N).

    The variance of the mean gain is s^2 / S + V: s^2 that of the seeds' gains, V the mean of the jackknife's covariances over
    images of two seeds' gains (0 if negative). Its degrees of freedom are (S - 1) * (total / (s^2 / S))^2.
    """
    (seeds, images), gain = without.shape, fmean(gains)
    (error, df), half = _error(gains, without), half_width(gains)
    critical, one_sided = (float(t.ppf(share, df)) for share in ((1 + CONFIDENCE) / 2, CONFIDENCE))
    wide, narrow = error * critical, error * one_sided
    p = 2 * float(t.sf(abs(gain) / error, df)) if error else float(gain == 0)
    low, high, low_90, high_90 = gain - wide, gain + wide, gain - narrow, gain + narrow
    detectable = error * _detectable(df, critical) if seeds > 1 else float("nan")
    seeds_low, seeds_high = gain - half, gain + half
    return Comparison(
        metric, margin, gain, low, high, seeds_low, seeds_high, low_90, high_90, p, df, detectable, seeds, images, smallest_class
    )


def _error(gains: Sequence[float], without: np.ndarray, images_at_least: bool = False) -> tuple[float, float]:
    """The standard error of the mean gain and its degrees of freedom, as `analyse` has them.

    With `images_at_least`, s^2 counts as no less than what images alone contribute to it: the mean variance over images of a
    seed's gain, minus V. Where seeds and images are few, s^2 is small, or zero, by chance.
    """
    seeds, images = without.shape
    centred = without - without.mean(axis=1, keepdims=True)
    covariance = (images - 1) / images * centred @ centred.T
    of_one = float(covariance.trace()) / seeds
    if seeds == 1:
        return of_one**0.5, float("inf")
    of_two = (float(covariance.sum()) - float(covariance.trace())) / (seeds * (seeds - 1))
    of_seeds = variance(gains)
    total = (max(of_seeds, of_one - of_two) if images_at_least else of_seeds) / seeds + max(0.0, of_two)
    return total**0.5, (seeds - 1) * (total / (of_seeds / seeds)) ** 2 if of_seeds else float("inf")


def recall_gains(labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> dict[int, dict[str, float]]:
    """The recall of one model minus that of another, by class that the labels hold; arguments as of `compare`.

    Of each: `images`, `gain` and, of a class with FEWEST_IMAGES and with FEWEST seeds, `low` and `high`: simultaneous 95 %
    intervals over seeds and images (Bonferroni), by the analysis of accuracy on the class's images with `images_at_least`.
    """
    counts = dict(zip(*(array.tolist() for array in np.unique(labels, return_counts=True)), strict=True))
    tested = [label for label, images in counts.items() if images >= FEWEST_IMAGES and len(ours) >= FEWEST]
    difference = 1.0 * (ours.argmax(axis=2) == labels) - (theirs.argmax(axis=2) == labels)
    rows = {}
    for label, images in counts.items():
        of_class = difference[:, labels == label]
        gains = of_class.mean(axis=1)
        rows[label] = {"images": images, "gain": float(gains.mean())}
        if label in tested:
            without = (of_class.sum(axis=1, keepdims=True) - of_class) / (images - 1)
            error, df = _error(gains.tolist(), without, images_at_least=True)
            half = error * float(t.ppf(1 - (1 - CONFIDENCE) / 2 / len(tested), df))
            rows[label] |= {"low": rows[label]["gain"] - half, "high": rows[label]["gain"] + half}
    return rows


def _detectable(df: float, critical: float) -> float:
    """The true difference, in standard errors, that exceeds the critical value with a probability of POWER: non-central t."""
    if not np.isfinite(df):
        return critical + float(t.ppf(POWER, df))
    return float(brentq(lambda shift: nct.sf(critical, df, shift) - POWER, 0, 10 * critical))


def half_width(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval for the mean of independent values; NaN for a single one."""
    if len(values) < 2:
        return float("nan")
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def above_chance(correct: int, images: int, chance: float) -> bool:
    """Whether `correct` of `images` are more than guessing gets at `chance` each: a one-sided binomial test at 97.5 %."""
    return binomtest(correct, images, chance, alternative="greater").pvalue < (1 - CONFIDENCE) / 2


def share_interval(correct: int, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy measured on so many images."""
    interval = binomtest(correct, images).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)
