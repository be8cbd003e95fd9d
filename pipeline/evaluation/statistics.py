"""Is one model more accurate than another, by how much, and how certain is that.

Two things are left to chance: the training (its seed) and which images are in the test split. A difference must stand out
against both.
"""

from collections.abc import Sequence
from statistics import stdev
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import binomtest, t

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 5000
FEWEST = 3  # seeds that say anything about how much training varies


class Comparison(NamedTuple):
    """The accuracy of one model minus that of another, trained with the same seeds; shares of 1."""

    gain: float  # mean over seeds and test images
    low: float  # the 95 % interval: the wider, at either end, of the two that follow
    high: float
    seeds_low: float  # Student's t interval of the seeds' gains (a paired t test): the chance of training; NaN for a single seed
    seeds_high: float
    bootstrap_low: float  # percentiles over resamples of seeds and test images, both models' drawn together: the chance of both
    bootstrap_high: float
    detectable: float  # the smallest gain that this number of seeds and images shows with a probability of 80 %; NaN for one seed
    seeds: int
    images: int

    @property
    def verdict(self) -> Literal["better", "worse", "not distinguishable"]:
        """What may be said at 95 %. Of one or two seeds nothing: they do not show how much training varies."""
        if self.seeds < FEWEST or self.low <= 0 <= self.high:
            return "not distinguishable"
        return "better" if self.gain > 0 else "worse"

    def as_json(self) -> dict[str, float | str]:
        """The figures and the verdict, without those that a single seed does not have."""
        return {key: value for key, value in self._asdict().items() if not np.isnan(value)} | {"verdict": self.verdict}


def compare(correct: np.ndarray, other: np.ndarray) -> Comparison:
    """Two models by which test images each classified correctly: bool arrays (S, N), row s of both of the same seed."""
    if correct.shape != other.shape:
        raise ValueError(f"the two models have other seeds or images: {correct.shape} and {other.shape}")
    difference = correct.astype(np.int8) - other.astype(np.int8)
    seeds, images = difference.shape
    gains = difference.mean(axis=1).tolist()
    gain, half, tail = float(np.mean(gains)), half_width(gains), (1 - CONFIDENCE) / 2
    resampled = bootstrap(difference)
    bootstrap_low, bootstrap_high = np.quantile(resampled, [tail, 1 - tail]).tolist()
    low, high, detectable = bootstrap_low, bootstrap_high, float("nan")
    if seeds > 1:
        low, high = max(-1.0, min(low, gain - half)), min(1.0, max(high, gain + half))
        error = max(stdev(gains) / seeds**0.5, float(resampled.std()))
        detectable = float(t.ppf(1 - tail, seeds - 1) + t.ppf(POWER, seeds - 1)) * error
    return Comparison(gain, low, high, gain - half, gain + half, bootstrap_low, bootstrap_high, detectable, seeds, images)


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


def bootstrap(difference: np.ndarray) -> np.ndarray:
    """Means of (S, N) values over 5,000 resamples of rows and of columns, each drawn with replacement: shape (5000,).

    Rows and columns are crossed (every seed sees every image), so both are drawn anew in each resample, as in Owen 2007,
    "The pigeonhole bootstrap" (arXiv:0712.1111).
    """
    random = np.random.default_rng(0)
    rows, columns = difference.shape
    # Images on which all seeds agree are alike: draw how many of each kind, not which.
    kinds, counts = np.unique(difference, axis=1, return_counts=True)
    drawn_columns = random.multinomial(columns, counts / columns, size=RESAMPLES)
    drawn_rows = random.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return np.einsum("br,rk,bk->b", drawn_rows, kinds, drawn_columns, optimize=True) / (rows * columns)
