"""Verdicts on simulated predictions whose truth is known, and the intervals against independent implementations."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import t

from pipeline.evaluation.statistics import above_chance, bootstrap, compare, half_width, share_interval


def simulated(
    random: np.random.Generator, gain: float, *, seeds: int, images: int, easy: float, seed_sd: float, image_sd: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two models' hits, bool (seeds, images). Images differ in difficulty, which both models share; trainings differ by a
    deviation `seed_sd` of the accuracy; the models themselves differ on images by `image_sd` (logits), the same in all seeds.
    `gain` is added to the first model's chance of being right.
    """
    difficulty = random.normal(easy, 3, size=images)

    def hits(extra: float) -> np.ndarray:
        of_model = expit(difficulty + random.normal(0, image_sd, size=images))
        # what a seed adds or takes is taken from, or added to, the images that can still change
        shift = extra + random.normal(0, seed_sd, size=(seeds, 1))
        room = of_model * (1 - of_model)
        chance = np.clip(of_model + shift * room / room.mean(), 0, 1)
        return random.random((seeds, images)) < chance

    return hits(gain), hits(0.0)


SETTINGS = {  # what varies most: the seeds, the images, single predictions, all
    "like mnist": {"seeds": 5, "images": 10_000, "easy": 7.5, "seed_sd": 0.0015},
    "seeds": {"seeds": 5, "images": 10_000, "easy": 7.5, "seed_sd": 0.005},
    "images": {"seeds": 5, "images": 600, "easy": 5, "seed_sd": 0.0, "image_sd": 2.0},
    "three seeds": {"seeds": 3, "images": 2_000, "easy": 6, "seed_sd": 0.003, "image_sd": 1.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_a_gain_better_or_worse_is_seldom_said(setting: str):
    random = np.random.default_rng(1)
    verdicts = [compare(*simulated(random, 0.0, **SETTINGS[setting])).verdict for _ in range(200)]
    assert sum(verdict != "not distinguishable" for verdict in verdicts) <= 0.07 * 200


def test_half_a_point_is_seen_with_ten_thousand_images_and_five_seeds():
    random = np.random.default_rng(2)
    pairs = [simulated(random, 0.005, **SETTINGS["like mnist"]) for _ in range(200)]
    verdicts = [compare(*pair).verdict for pair in pairs]
    assert verdicts.count("better") >= 0.8 * 200
    assert verdicts.count("worse") == 0
    right, other = pairs[0]
    assert compare(other, right).gain == -compare(right, other).gain
    assert (compare(right, other).verdict, compare(other, right).verdict) == ("better", "worse")


def test_the_detectable_gain_is_detected_as_often_as_it_says():
    random = np.random.default_rng(3)
    setting = SETTINGS["like mnist"]
    claimed = np.mean([compare(*simulated(random, 0.0, **setting)).detectable for _ in range(50)])
    verdicts = [compare(*simulated(random, claimed, **setting)).verdict for _ in range(100)]
    assert verdicts.count("better") >= 75


def test_the_interval_is_the_wider_of_the_two():
    random = np.random.default_rng(4)
    comparison = compare(*simulated(random, 0.003, **SETTINGS["like mnist"]))
    assert comparison.low == min(comparison.seeds_low, comparison.bootstrap_low)
    assert comparison.high == max(comparison.seeds_high, comparison.bootstrap_high)
    assert comparison.low < comparison.gain < comparison.high


def test_of_one_seed_nothing_is_said():
    random = np.random.default_rng(5)
    right, other = random.random((1, 5000)) < 0.95, random.random((1, 5000)) < 0.8
    comparison = compare(right, other)
    assert comparison.low > 0.1
    assert comparison.verdict == "not distinguishable"
    assert np.isnan(comparison.detectable)


def test_models_that_do_the_same_are_not_distinguishable():
    right = np.random.default_rng(6).random((3, 100)) < 0.9
    comparison = compare(right, right)
    assert (comparison.gain, comparison.low, comparison.high, comparison.verdict) == (0, 0, 0, "not distinguishable")


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="other seeds or images"):
        compare(np.ones((2, 10), dtype=bool), np.ones((2, 11), dtype=bool))


def test_the_t_interval_is_the_textbooks():
    values = [0.98, 0.99, 0.985]
    expected = t.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / 3**0.5)
    assert np.mean(values) + half_width(values) == pytest.approx(expected[1])


def test_the_bootstrap_is_that_of_drawing_rows_and_columns():
    random = np.random.default_rng(7)
    values = random.integers(-1, 2, size=(4, 300))
    plain = [
        values[random.integers(4, size=4)][:, random.integers(300, size=300)].mean() for _ in range(4000)
    ]  # literally, one by one
    ours = bootstrap(values, 4000)
    assert ours.mean() == pytest.approx(np.mean(plain), abs=0.005)
    assert ours.std() == pytest.approx(np.std(plain), rel=0.06)
    assert bootstrap(values, 10).tolist() == bootstrap(values, 10).tolist()


@pytest.mark.parametrize(
    ("correct", "images", "chance", "above"),
    [(100, 1000, 0.1, False), (118, 1000, 0.1, False), (121, 1000, 0.1, True), (389, 524, 0.742, False), (500, 524, 0.742, True)],
)
def test_better_than_guessing_is_more_than_luck_would_give(correct: int, images: int, chance: float, above: bool):
    assert above_chance(correct, images, chance) == above


def test_the_interval_of_a_share_is_wilsons():
    z, share, images = 1.959964, 0.9, 50
    middle = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * (share * (1 - share) / images + z**2 / (4 * images**2)) ** 0.5
    assert share_interval(45, 50) == pytest.approx((middle - half, middle + half), abs=1e-6)
