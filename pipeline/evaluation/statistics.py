"""Is one model better than another, by how much, and how sure is that: over seeds and test images together.

Two things are left to chance: the training (its seed) and which images happen to be in the test split. A difference counts
only if it stands out against both.
"""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import binomtest, t

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 5000

Verdict = Literal["better", "worse", "not distinguishable"]


class Comparison(NamedTuple):
    """The accuracy of one model minus that of another, trained with the same seeds; shares of 1.

    Attributes
    ----------
    gain : float
        Mean over seeds and test images.
    low, high : float
        The 95 % interval: the wider, at either end, of the two that follow.
    seeds_low, seeds_high : float
        Student's t interval of the seeds' gains (a paired t test): the chance of training. NaN for a single seed.
    bootstrap_low, bootstrap_high : float
        Percentiles over resamples of seeds and test images, both models' predictions drawn together: the chance of both.
    mcnemar_p : float
        McNemar's exact test per seed, combined; see `combined_mcnemar`.
    detectable : float
        The smallest gain that this number of seeds and images would have shown with a probability of 80 %. NaN for one seed.
    seeds, images : int
    """

    gain: float
    low: float
    high: float
    seeds_low: float
    seeds_high: float
    bootstrap_low: float
    bootstrap_high: float
    mcnemar_p: float
    detectable: float
    seeds: int
    images: int

    @property
    def verdict(self) -> Verdict:
        """What may be said at 95 %. Of a single seed nothing: it does not show how much training varies."""
        if self.seeds == 1 or self.low <= 0 <= self.high:
            return "not distinguishable"
        return "better" if self.gain > 0 else "worse"

    def as_json(self) -> dict[str, float | str]:
        """The figures and the verdict, without those that a single seed does not have."""
        figures = {key: value for key, value in self._asdict().items() if not np.isnan(value)}
        return figures | {"verdict": self.verdict}


def compare(right: np.ndarray, other: np.ndarray) -> Comparison:
    """One model against another, from which test images each classified rightly.

    Parameters
    ----------
    right, other : bool arrays of shape (S, N)
        By seed and image; row s of both is of the same seed.
    """
    if right.shape != other.shape:
        raise ValueError(f"the two models have other seeds or images: {right.shape} and {other.shape}")
    difference = right.astype(np.int8) - other.astype(np.int8)
    seeds, images = difference.shape
    gains = difference.mean(axis=1)
    gain = float(gains.mean())
    resampled = bootstrap(difference)
    tail = (1 - CONFIDENCE) / 2
    bootstrap_low, bootstrap_high = (float(value) for value in np.quantile(resampled, [tail, 1 - tail]))
    half = half_width(gains.tolist())
    low, high, detectable = bootstrap_low, bootstrap_high, float("nan")
    if seeds > 1:
        low, high = max(-1.0, min(low, gain - half)), min(1.0, max(high, gain + half))
        error = max(stdev(gains.tolist()) / seeds**0.5, float(resampled.std()))
        detectable = float(t.ppf(1 - tail, seeds - 1) + t.ppf(POWER, seeds - 1)) * error
    return Comparison(
        gain=gain,
        low=low,
        high=high,
        seeds_low=gain - half,
        seeds_high=gain + half,
        bootstrap_low=bootstrap_low,
        bootstrap_high=bootstrap_high,
        mcnemar_p=combined_mcnemar(right, other),
        detectable=detectable,
        seeds=seeds,
        images=images,
    )


def half_width(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval for the mean of independent values; NaN for a single one."""
    if len(values) < 2:
        return float("nan")
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def above_chance(right: int, count: int, chance: float) -> bool:
    """Whether `right` of `count` images are more than guessing gets at `chance` each, by a one-sided binomial test at 97.5 %."""
    return binomtest(right, count, chance, alternative="greater").pvalue < (1 - CONFIDENCE) / 2


def share_interval(hits: int, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy measured on so many images."""
    interval = binomtest(hits, images).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(difference: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of (S, N) values over resamples of rows and of columns, each drawn with replacement: shape (resamples,).

    Rows and columns are crossed (every seed sees every image), so both are drawn anew in each resample, as in Owen 2007,
    "The pigeonhole bootstrap" (arXiv:0712.1111).
    """
    random = np.random.default_rng(seed)
    rows, columns = difference.shape
    # Images on which all seeds did the same are alike: draw how many of each kind, not which.
    kinds, counts = np.unique(difference, axis=1, return_counts=True)
    drawn_columns = random.multinomial(columns, counts / columns, size=resamples)
    drawn_rows = random.multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    return np.einsum("br,rk,bk->b", drawn_rows, kinds, drawn_columns, optimize=True) / (rows * columns)


def mcnemar(right: np.ndarray, other: np.ndarray, alternative: str = "two-sided") -> float:
    """The p value of McNemar's exact test of two classifiers on the same images (Dietterich 1998), bool arrays of shape (N,).

    `alternative` "greater" asks whether `right` is the better one, "less" the worse one.
    """
    only_one, only_other = int((right & ~other).sum()), int((~right & other).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other, 0.5, alternative=alternative).pvalue)


def combined_mcnemar(right: np.ndarray, other: np.ndarray) -> float:
    """Two-sided p value from the seeds' exact tests, arrays of shape (S, N).

    The seeds share the test images, so their p values depend on one another: twice their mean holds under any dependence
    (Vovk and Wang 2020, "Combining p-values via averaging"), here in either direction. It speaks of these trained models.
    """
    either = []
    for alternative in ("greater", "less"):
        values = [mcnemar(one, two, alternative) for one, two in zip(right, other, strict=True)]
        either.append(fmean(values) * (2 if len(values) > 1 else 1))
    return min(1.0, 2 * min(either))
