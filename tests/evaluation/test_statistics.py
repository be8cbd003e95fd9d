"""Verdicts on simulated predictions whose truth is known, and the intervals against independent implementations."""

import numpy as np
import pytest
from scipy.special import expit

from pipeline.evaluation.statistics import Comparison, above_chance, bootstrap, compare, share_interval

SETTINGS = {  # by what varies most; seeds, images, easy, seed_sd, image_sd
    "like mnist": (5, 10_000, 7.5, 0.0015, 0.0),
    "seeds": (5, 10_000, 7.5, 0.005, 0.0),
    "images": (5, 600, 5, 0.0, 2.0),
    "three seeds": (3, 2_000, 6, 0.003, 1.0),
}


def comparisons(setting: str, gain: float, trials: int) -> list[Comparison]:
    """Comparisons of two simulated models, to the first of which `gain` is added. Images differ in difficulty, which both share;
    trainings differ by a deviation `seed_sd` of the accuracy, the models on images by `image_sd` (logits), the same in all seeds.
    """
    seeds, images, easy, seed_sd, image_sd = SETTINGS[setting]
    random, results = np.random.default_rng(1), []
    for _ in range(trials):
        chance = expit(random.normal(easy, 3, size=images) + random.normal(0, image_sd, size=(2, 1, images)))
        # what a seed adds or takes is taken from, or added to, the images that can still change
        room = chance * (1 - chance)
        shift = random.normal([[[gain]], [[0]]], seed_sd, size=(2, seeds, 1))
        results.append(compare(*(random.random((2, seeds, images)) < chance + shift * room / room.mean(axis=2, keepdims=True))))
    return results


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("like mnist", "seeds")]


@pytest.mark.parametrize("setting", [*LARGE, "images", "three seeds"])
def test_without_a_gain_better_or_worse_is_seldom_said(setting: str):
    verdicts = [comparison.verdict for comparison in comparisons(setting, 0, 200)]
    assert verdicts.count("not distinguishable") >= 0.93 * 200


def test_half_a_point_is_seen_with_ten_thousand_images_and_five_seeds():
    results = comparisons("like mnist", 0.005, 200)
    verdicts = [comparison.verdict for comparison in results]
    assert verdicts.count("better") >= 0.8 * 200
    assert verdicts.count("worse") == 0
    assert all(result.low == min(result.seeds_low, result.bootstrap_low) < result.gain for result in results), "the wider"
    assert all(result.high == max(result.seeds_high, result.bootstrap_high) > result.gain for result in results)


@pytest.mark.slow
def test_the_detectable_gain_is_detected_as_often_as_it_says():
    claimed = np.mean([comparison.detectable for comparison in comparisons("like mnist", 0, 50)])
    verdicts = [comparison.verdict for comparison in comparisons("like mnist", claimed, 100)]
    assert verdicts.count("better") >= 75


def test_a_comparison_has_a_direction_and_needs_two_seeds_and_the_same_images():
    random = np.random.default_rng(5)
    right, other = random.random((3, 5000)) < 0.95, random.random((3, 5000)) < 0.8
    assert compare(other, right).gain == -compare(right, other).gain
    assert (compare(right, other).verdict, compare(other, right).verdict) == ("better", "worse")
    assert (*compare(right, right)[:3], compare(right, right).verdict) == (0, 0, 0, "not distinguishable")
    single = compare(right[:1], other[:1])
    assert (single.low > 0.1, single.verdict, np.isnan(single.detectable)) == (True, "not distinguishable", True)
    with pytest.raises(ValueError, match="other seeds or images"):
        compare(right, other[:, 1:])


def test_the_bootstrap_is_that_of_drawing_rows_and_columns():
    random = np.random.default_rng(7)
    values = random.integers(-1, 2, size=(4, 300))
    literal = [values[random.integers(4, size=4)][:, random.integers(300, size=300)].mean() for _ in range(4000)]
    resampled = bootstrap(values)
    assert resampled.mean() == pytest.approx(np.mean(literal), abs=0.005)
    assert resampled.std() == pytest.approx(np.std(literal), rel=0.06)
    assert np.array_equal(bootstrap(values), resampled)


@pytest.mark.parametrize(("correct", "images", "chance"), [(119, 1000, 0.1), (408, 524, 0.742)])
def test_better_than_guessing_is_more_than_luck_would_give(correct: int, images: int, chance: float):
    assert (above_chance(correct, images, chance), above_chance(correct + 1, images, chance)) == (False, True)


def test_the_interval_of_a_share_is_wilsons():
    for end, z in zip(share_interval(45, 50), (-1.959964, 1.959964), strict=True):
        assert end - 0.9 == pytest.approx(z * (end * (1 - end) / 50) ** 0.5, abs=1e-6)
