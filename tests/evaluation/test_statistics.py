"""Verdicts on simulated predictions whose truth is known, and the tests against independent implementations."""

from math import comb

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import t

from pipeline.evaluation.statistics import above_chance, bootstrap, combined_mcnemar, compare, half_width, mcnemar


def simulated(
    random: np.random.Generator,
    gain: float,
    *,
    seeds: int,
    images: int,
    easy: float,
    seed_sd: float,
    image_sd: float = 0.0,
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
    found = [compare(*simulated(random, claimed, **setting)).verdict for _ in range(100)]
    assert found.count("better") >= 75


def test_the_interval_is_the_wider_of_the_two():
    random = np.random.default_rng(4)
    one = compare(*simulated(random, 0.003, **SETTINGS["like mnist"]))
    assert one.low == min(one.seeds_low, one.bootstrap_low)
    assert one.high == max(one.seeds_high, one.bootstrap_high)
    assert one.low < one.gain < one.high


def test_of_one_seed_nothing_is_said():
    random = np.random.default_rng(5)
    right, other = random.random((1, 5000)) < 0.95, random.random((1, 5000)) < 0.8
    one = compare(right, other)
    assert one.low > 0.1
    assert one.verdict == "not distinguishable"
    assert np.isnan(one.detectable)


def test_models_that_do_the_same_are_not_distinguishable():
    right = np.random.default_rng(6).random((3, 100)) < 0.9
    one = compare(right, right)
    assert (one.gain, one.low, one.high, one.mcnemar_p, one.verdict) == (0, 0, 0, 1, "not distinguishable")


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


def test_mcnemar_is_the_exact_binomial_test():
    random = np.random.default_rng(8)
    for _ in range(20):
        one, two = random.random((2, 60)) < 0.8
        b, c = (one & ~two).sum(), (~one & two).sum()
        tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
        assert mcnemar(one, two) == pytest.approx(min(1, 2 * tail))


def test_the_combined_p_value_is_small_for_seeds_that_agree_and_large_for_those_that_do_not():
    better = np.arange(200) < 190
    worse = np.arange(200) < 150
    assert combined_mcnemar(np.stack([better, better]), np.stack([worse, worse])) < 1e-6
    assert combined_mcnemar(np.stack([better, worse]), np.stack([worse, better])) > 0.5
    assert combined_mcnemar(better[None], worse[None]) == pytest.approx(mcnemar(better, worse))


@pytest.mark.parametrize(
    ("right", "count", "chance", "above"),
    [
        (100, 1000, 0.1, False),
        (118, 1000, 0.1, False),
        (121, 1000, 0.1, True),
        (389, 524, 0.742, False),
        (500, 524, 0.742, True),
    ],
)
def test_better_than_guessing_is_more_than_luck_would_give(right: int, count: int, chance: float, above: bool):
    assert above_chance(right, count, chance) == above
