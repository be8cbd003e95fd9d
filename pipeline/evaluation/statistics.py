"""Is one model better than another, by how much, and how certain is that: seeds as readers, test images as cases.

Two things are left to chance: the training (its seed) and which images are in the test split. Every seed sees every image, as
every reader sees every case in a study of diagnostic imaging; the analysis is that of such studies, by Obuchowski and Rockette
(1995, Communications in Statistics 24:285-308) with Hillis' degrees of freedom (2007, Statistics in Medicine 26:596-619).
Images of one patient are left out together (Obuchowski 1997, Biometrics 53:567-578).

In a cross-validation every seed has training and test images of its own, so that their choice varies with the seed: there the
analysis is the corrected resampled t-test of Nadeau and Bengio (2003, Machine Learning 52:239-281). Probabilities are NaN where a
seed did not test an image.
"""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev, variance
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, nct, t

from pipeline.evaluation.jackknife import FIGURES, LOWER_IS_BETTER, Figure

CONFIDENCE = 0.95
POWER = 0.8
FEWEST = 3  # seeds that say anything about how much training varies
OF_CLASSES = ("auc", "balanced_accuracy")  # means over the classes
FEWEST_IMAGES = 10  # of every class, for these: below, the jackknife does not see how much one image decides; and patients


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
    smallest_class: int  # of the test images' classes, the patients (where they are not known, the images) of the rarest
    patients: int = 0  # whose images were left out together; 0: not known, every image by itself
    folds: int = 0  # of a cross-validation, in which each seed tests one; 0: every seed tests all images

    @property
    def enough(self) -> bool:
        """Whether there are seeds, folds, images and patients for a verdict."""
        cases = self.patients or FEWEST_IMAGES
        rarest = self.smallest_class if self.metric in OF_CLASSES else FEWEST_IMAGES
        return self.seeds >= FEWEST and self.df >= FEWEST - 1 and min(cases, rarest) >= FEWEST_IMAGES

    @property
    def equivalent(self) -> bool:
        """Whether a difference as large as the margin, either way, is ruled out at 5 %.

        Where no image makes any difference, that takes 3 / margin images (Hanley and Lippman-Hand 1983, JAMA 249:1743-1745).
        """
        some = self.low_90 < self.high_90 or self.margin * self.images > 3
        return self.enough and some and -self.margin < self.low_90 <= self.high_90 < self.margin

    @property
    def verdict(self) -> str:
        """What may be said at 95 %; without `enough` seeds and images, which would not show how much they vary, nothing."""
        if self.enough and not self.low <= 0 <= self.high:
            return f"{'better' if self.gain > 0 else 'worse'}{', by less than the margin' if self.equivalent else ''}"
        return "equivalent" if self.equivalent else "undecided"

    def as_json(self) -> dict[str, float | str]:
        """The figures and the verdict, without what a single seed, models without a difference, or the data do not have."""
        absent = {key for key in ("patients", "folds") if not getattr(self, key)}
        figures = {key: value for key, value in self._asdict().items() if key not in absent}
        known = {key: value for key, value in figures.items() if key == "metric" or np.isfinite(value)}
        return known | {"verdict": self.verdict}


def compare(
    labels: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
    metric: str = "accuracy",
    margin: float = 0.0,
    patients: np.ndarray | None = None,
) -> Comparison:
    """Two models by their probabilities, (S, N, K), of N images with `labels`, (N,); row s of both is of the same seed.

    `patients`, int (N,), says whose an image is, if that is known.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"the two models have other seeds or images: {ours.shape} and {theirs.shape}")
    sign = -1 if metric in LOWER_IS_BETTER else 1
    (our_values, our_without), (their_values, their_without) = (by_seed(FIGURES[metric], labels, p) for p in (ours, theirs))
    gains, without = sign * (our_values - their_values), sign * (our_without - their_without)
    return analyse(gains.tolist(), without, metric, margin, labels, patients)


def by_seed(
    figure: Callable[[np.ndarray, np.ndarray], Figure], labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A figure of the images that each seed tests, (S,), and the same without each of them, (S, N), NaN for the others."""
    values, without = np.empty(len(probabilities)), np.full(probabilities.shape[:2], np.nan)
    for seed, of_seed in enumerate(probabilities):
        tested = ~np.isnan(of_seed[:, 0])
        values[seed], without[seed, tested] = figure(labels[tested], of_seed[tested])
    return values, without


def analyse(
    gains: Sequence[float],
    without: np.ndarray,
    metric: str,
    margin: float,
    labels: np.ndarray,
    patients: np.ndarray | None = None,
) -> Comparison:
    """The analysis of gains by seed, (S,), and of the same without each image, (S, N); arguments as of `compare`.

    The variance of the mean gain is s^2 / S + V: s^2 that of the seeds' gains, V the mean of the jackknife's covariances over
    images of two seeds' gains (0 if negative). Its degrees of freedom are (S - 1) * (total / (s^2 / S))^2.

    In a cross-validation of K folds it is s^2 * (1 / K + 1 / (K - 2)) with K - 1: s^2 that of the folds' gains, each the mean of
    its seeds', and 1 / (K - 2) the number of test images as a share of the training images'.
    """
    (seeds, images), gain, whose = without.shape, fmean(gains), _whose(labels, patients)
    tested = ~np.isnan(without)
    folds = 0 if tested.all() or seeds == 1 else round(tested.size / tested.sum())
    if folds:
        error, df = _error_of_folds(gains, without, whose)
    else:
        error, df = _error(gains, without[:, tested[0]], whose[tested[0]])
    critical = float(t.ppf((1 + CONFIDENCE) / 2, df))
    wide, narrow, of_seeds = error * critical, error * float(t.ppf(CONFIDENCE, df)), half_width(gains)
    intervals = [end for half in (wide, of_seeds, narrow) for end in (gain - half, gain + half)]
    p = 2 * float(t.sf(abs(gain) / error, df)) if error else float(gain == 0)
    detectable = error * _detectable(df, critical) if seeds > 1 else float("nan")
    counts = seeds, images, min(_cases(labels, whose).values()), 0 if patients is None else len(np.unique(patients)), folds
    return Comparison(metric, margin, gain, *intervals, p, df, detectable, *counts)


def _error_of_folds(gains: Sequence[float], without: np.ndarray, whose: np.ndarray) -> tuple[float, float]:
    """As `_error`, of a cross-validation in which one fold tests, the next validates and the others train.

    Seeds of one fold have all their images in common: their mean counts once. s^2 counts as no less than what a fold's images
    alone contribute to it, the mean of the jackknife's variances.
    """
    tested = ~np.isnan(without)
    masks, members = np.unique(tested, axis=0, return_inverse=True)
    of_folds, of_images = [], []
    for fold, mask in enumerate(masks):
        its_seeds = members.ravel() == fold
        of_folds.append(float(np.mean(np.asarray(gains)[its_seeds])))
        of_images.append(float(_covariance(without[its_seeds][:, mask].mean(axis=0, keepdims=True), whose[mask])[0, 0]))
    of_seeds = max(variance(of_folds) if len(of_folds) > 1 else 0.0, fmean(of_images))
    folds = max(FEWEST, round(tested.size / tested.sum()))
    return (of_seeds * (1 / len(of_folds) + 1 / (folds - 2))) ** 0.5, len(of_folds) - 1


def _error(gains: Sequence[float], without: np.ndarray, whose: np.ndarray, images_floor: bool = False) -> tuple[float, float]:
    """The standard error of the mean gain and its degrees of freedom, as `analyse` has them; `whose` as of `_whose`.

    With `images_floor`, s^2 counts as no less than what images alone contribute to it: the mean variance over images of a
    seed's gain, minus V. Where seeds and images are few, s^2 is small, or zero, by chance.
    """
    seeds, covariance = len(without), _covariance(without, whose)
    of_one = float(covariance.trace()) / seeds
    if seeds == 1:
        return of_one**0.5, float("inf")
    of_two = (float(covariance.sum()) - float(covariance.trace())) / (seeds * (seeds - 1))
    of_seeds = variance(gains)
    total = (max(of_seeds, of_one - of_two) if images_floor else of_seeds) / seeds + max(0.0, of_two)
    return total**0.5, (seeds - 1) * (total / (of_seeds / seeds)) ** 2 if of_seeds else float("inf")


def _covariance(without: np.ndarray, whose: np.ndarray) -> np.ndarray:
    """The jackknife's covariances over patients of the seeds' gains, (S, S): of those without each image, (S, N)."""
    images, (patients, members) = without.shape[1], np.unique(whose, return_inverse=True)
    influences = (images - 1) / images * (without.mean(axis=1, keepdims=True) - without)  # of each image on the gain
    influences = np.stack([np.bincount(members, of_seed) for of_seed in influences])
    return len(patients) / max(len(patients) - 1, 1) * influences @ influences.T


def _whose(labels: np.ndarray, patients: np.ndarray | None) -> np.ndarray:
    """Whose an image is, int (N,); where that is not known, every image is a patient of its own."""
    return np.arange(len(labels)) if patients is None else patients


def _cases(labels: np.ndarray, whose: np.ndarray) -> dict[int, int]:
    """How many patients, or images, each of the labels' classes has."""
    return {int(label): len(np.unique(whose[labels == label])) for label in np.unique(labels)}


def recall_gains(
    labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, patients: np.ndarray | None = None
) -> dict[int, dict[str, float]]:
    """The recall of one model minus that of another, by class that the labels hold; arguments as of `compare`.

    Of each: `images`, `gain` and, of a class with FEWEST_IMAGES and with FEWEST seeds, `low` and `high`: simultaneous 95 %
    intervals over seeds and images (Bonferroni), by the analysis of accuracy on the class's images with `images_floor`.
    """
    in_folds, whose = bool(np.isnan(ours).any()), _whose(labels, patients)
    tested = [label for label, cases in _cases(labels, whose).items() if cases >= FEWEST_IMAGES and len(ours) >= FEWEST]
    difference = 1.0 * (ours.argmax(axis=2) == labels) - (theirs.argmax(axis=2) == labels)
    difference[np.isnan(ours[:, :, 0])] = np.nan
    rows = {}
    for label in np.unique(labels).tolist():
        members = labels == label
        of_class = difference[:, members]
        gains = np.nanmean(of_class, axis=1)  # every fold has images of every class
        gain = float(gains.mean())
        rows[label] = {"images": int(members.sum()), "gain": gain}
        if label in tested:
            answered = np.count_nonzero(~np.isnan(of_class), axis=1, keepdims=True)
            without = (np.nansum(of_class, axis=1, keepdims=True) - of_class) / np.maximum(answered - 1, 1)
            arguments = gains.tolist(), without, whose[members]
            error, df = _error_of_folds(*arguments) if in_folds else _error(*arguments, images_floor=True)
            half = error * float(t.ppf(1 - (1 - CONFIDENCE) / 2 / len(tested), df))
            rows[label] |= {"low": gain - half, "high": gain + half}
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
