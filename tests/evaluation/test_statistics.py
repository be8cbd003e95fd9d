"""The analysis against an independent implementation, and its verdicts on simulated predictions whose truth is known."""

import numpy as np
import pytest
from scipy.stats import f, norm, t
from sklearn.metrics import roc_auc_score

from pipeline.evaluation.statistics import Comparison, above_chance, compare, half_width, recall_gains

AUC = {  # of 624 images, 390 of them positive: deviations of the scores, in units of the noise that is new in each training
    "images vary": {"seeds": 5, "of_image": 1.0, "of_image_and_model": 0.7, "of_seed": 0.0},
    "seeds vary": {"seeds": 5, "of_image": 0.5, "of_image_and_model": 0.0, "of_seed": 0.3},
    "both vary": {"seeds": 5, "of_image": 1.0, "of_image_and_model": 0.5, "of_seed": 0.15},
    "ten seeds": {"seeds": 10, "of_image": 1.0, "of_image_and_model": 0.5, "of_seed": 0.15},
}


def simulated(
    random: np.random.Generator, seeds: int, of_image: float, of_image_and_model: float, of_seed: float, gain: float = 0
):
    """Labels, and probabilities (seeds, 624, 2) of two models, the first of which separates the classes better by `gain`."""
    labels = np.repeat([0, 1], (234, 390))
    shared = random.normal(0, of_image, (1, 1, 624))
    score = shared + random.normal(0, of_image_and_model, (2, 1, 624)) + random.normal(0, 1, (2, seeds, 624))
    separation = 2.5 + np.array([gain, 0])[:, None, None] + random.normal(0, of_seed, (2, seeds, 1))
    probability = norm.cdf((score + separation * (labels - 0.5)) / 3)
    return labels, *np.stack([1 - probability, probability], axis=3)


def comparisons(setting: str, trials: int, margin: float = 0.0, gain: float = 0.0) -> list[Comparison]:
    random = np.random.default_rng(0)
    return [compare(*simulated(random, **AUC[setting], gain=gain), "auc", margin) for _ in range(trials)]


def test_the_analysis_is_obuchowskis_and_rockettes_with_hillis_degrees_of_freedom():
    """Theirs in their own terms: mean squares of readers and modalities, three covariances of a jackknife, an F test."""
    labels, *models = simulated(np.random.default_rng(3), **AUC["both vary"])
    positive = np.stack(models)[..., 1]
    modalities, readers, cases = positive.shape

    def areas(rows: np.ndarray) -> np.ndarray:
        return np.array([[roc_auc_score(labels[rows], reader[rows]) for reader in modality] for modality in positive])

    theta = areas(np.arange(cases))
    pseudo = np.stack([areas(np.delete(np.arange(cases), case)) for case in range(cases)]).reshape(cases, -1)
    covariance = np.cov(pseudo.T) * (cases - 1) ** 2 / cases
    covariance = covariance.reshape(modalities, readers, modalities, readers)
    same, other = np.eye(readers, dtype=bool), ~np.eye(readers, dtype=bool)
    second = np.mean([covariance[m, :, m, :][other].mean() for m in range(modalities)])  # one modality, two readers
    third = covariance[0, :, 1, :][other].mean()  # two of both
    of_modality = readers * theta.mean(axis=1).var(ddof=1)
    residual = theta - theta.mean(axis=1, keepdims=True) - theta.mean(axis=0) + theta.mean()
    interaction = (residual**2).sum() / ((modalities - 1) * (readers - 1))
    denominator = interaction + max(readers * (second - third), 0)
    df = denominator**2 / (interaction**2 / ((modalities - 1) * (readers - 1)))
    ours = compare(labels, *models, "auc")
    assert same.sum() == readers
    assert ours.gain == pytest.approx(theta[0].mean() - theta[1].mean(), abs=1e-12)
    assert ours.df == pytest.approx(df, rel=1e-6)
    assert ours.p == pytest.approx(f.sf(of_modality / denominator, modalities - 1, df), rel=1e-6)
    gains = (theta[0] - theta[1]).tolist()
    assert ours.seeds_high - ours.gain == pytest.approx(half_width(gains))


@pytest.mark.parametrize("setting", [pytest.param(name, marks=pytest.mark.slow) for name in AUC])
def test_false_verdicts_and_coverage_are_as_claimed(setting: str):
    results = comparisons(setting, 2000)
    false = np.mean([result.verdict.startswith(("better", "worse")) for result in results])
    assert 0.035 <= false <= 0.065
    assert np.mean([result.p < 0.05 for result in results]) == pytest.approx(false)
    truth = np.mean([result.gain for result in comparisons(setting, 400, gain=0.4)])
    covered = np.mean([result.low <= truth <= result.high for result in comparisons(setting, 2000, gain=0.4)])
    assert 0.935 <= covered <= 0.965


@pytest.mark.slow
def test_what_is_equivalent_is_seen_to_be_and_what_differs_by_the_margin_is_not():
    margin = 3 * np.std([result.gain for result in comparisons("both vary", 300)])
    assert np.mean([result.equivalent for result in comparisons("both vary", 500, margin)]) > 0.6
    gain = next(
        gain for gain in np.arange(0.05, 2, 0.05) if np.mean([r.gain for r in comparisons("both vary", 100, gain=gain)]) > margin
    )
    assert np.mean([result.equivalent for result in comparisons("both vary", 1000, margin, gain)]) < 0.05


@pytest.mark.slow
def test_the_detectable_gain_is_detected_as_often_as_it_says():
    claimed = np.mean([result.detectable for result in comparisons("both vary", 200)])
    gains = np.arange(0.1, 1, 0.02)
    of_gains = [np.mean([result.gain for result in comparisons("both vary", 100, gain=gain)]) for gain in gains]
    results = comparisons("both vary", 500, gain=float(np.interp(claimed, of_gains, gains)))
    assert np.mean([result.verdict.startswith("better") for result in results]) == pytest.approx(0.8, abs=0.08)


def one_hot(correct: np.ndarray) -> np.ndarray:
    """Probabilities (S, N, 2) that name class 0 where `correct`."""
    return np.stack([correct, ~correct], axis=2).astype(float)


def test_a_comparison_has_a_direction_and_needs_the_same_images():
    random, labels = np.random.default_rng(5), np.zeros(5000, int)
    right, other = (one_hot(random.random((3, 5000)) < share) for share in (0.95, 0.8))
    assert compare(labels, other, right).gain == -compare(labels, right, other).gain
    assert (compare(labels, right, other).verdict, compare(labels, other, right).verdict) == ("better", "worse")
    same = compare(labels, right, right, margin=0.01)
    assert (same.gain, same.low, same.high, same.p, same.verdict) == (0, 0, 0, 1, "equivalent")
    single = compare(labels, right[:1], other[:1])
    assert (single.low > 0.1, single.verdict, "detectable" in single.as_json()) == (True, "undecided", False)
    with pytest.raises(ValueError, match="other seeds or images"):
        compare(labels, right, other[:, 1:])


@pytest.mark.parametrize(
    ("gain", "margin", "verdict"),
    [
        (0.03, 0.0, "better"),
        (0.03, 0.1, "better, by less than the margin"),
        (-0.03, 0.1, "worse, by less than the margin"),
        (0.0, 0.05, "equivalent"),
        (0.0, 1e-4, "undecided"),
    ],
)
def test_the_verdicts(gain: float, margin: float, verdict: str):
    random = np.random.default_rng(2)
    correct = random.random((5, 4000)) < 0.8
    changed = random.random((5, 4000)) < (gain / 0.2 if gain > 0 else -gain / 0.8)
    better = correct ^ (changed & (correct == (gain < 0)))
    models = one_hot(better if gain else random.random((5, 4000)) < 0.8), one_hot(correct)
    assert compare(np.zeros(4000, int), *models, margin=margin).verdict == verdict


@pytest.mark.parametrize("metric", ["accuracy", "auc", "balanced_accuracy", "nll", "ece"])
def test_copies_of_a_patients_image_say_no_more_than_the_image(metric: str):
    labels, *models = simulated(np.random.default_rng(5), **AUC["both vary"])
    copies = np.random.default_rng(6).permutation(np.repeat(np.arange(624), 4))
    once = compare(labels, *models, metric)
    copied = [labels[copies], *(model[:, copies] for model in models)]
    together, apart = compare(*copied, metric, patients=copies), compare(*copied, metric)
    assert (together.patients, together.images, once.patients) == (624, 2496, 0)
    for field in ("gain", "low", "high", "p", "df"):
        assert getattr(together, field) == pytest.approx(getattr(once, field), rel=0.02), field
    assert apart.high - apart.low < once.high - once.low
    gains = (recall_gains(*rows, whose)[1] for rows, whose in (((labels, *models), None), (copied, copies)))
    assert next(gains)["low"] == pytest.approx(next(gains)["low"], rel=0.02)


@pytest.mark.slow
def test_false_verdicts_of_images_that_patients_have_in_common_are_as_claimed():
    """100 patients, each with 4 images of much the same difficulty."""
    random, false = np.random.default_rng(8), np.zeros(2)
    labels, whose = np.repeat([0, 1], 200), np.repeat(np.arange(100), 4)
    for _ in range(2000):
        score = random.normal(0, 1, (2, 1, 100)).repeat(4, axis=2) + random.normal(0, 0.5, (2, 5, 400)) + 2 * labels
        both = np.stack([1 - norm.cdf(score - 1), norm.cdf(score - 1)], axis=3)
        false += [compare(labels, *both, "auc", patients=p).verdict in ("better", "worse") for p in (whose, None)]
    together, apart = false / 2000
    assert 0.03 <= together <= 0.07 < 0.2 < apart


def of_folds(random: np.random.Generator, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of 600 images, and probabilities (S, 600, 2) of two models, each seed on a fifth: NaN on the other images."""
    labels, folds = random.permutation(600) % 2, np.arange(600) % 5
    models = []
    for shares in (0.7 + gains, np.full(len(gains), 0.7)):
        right = random.random((len(gains), 600)) < shares[:, None]
        answers = one_hot(right == (labels == 0)).astype(float)
        answers[folds != np.arange(len(gains))[:, None] % 5] = np.nan
        models.append(answers)
    return labels, *models


@pytest.mark.parametrize("of_seed", [2, 3])  # folds vary more, and less, than their images alone would make them
def test_of_folds_it_is_the_corrected_resampled_t_test(of_seed: int):
    labels, ours, theirs = of_folds(np.random.default_rng(of_seed), np.full(10, 0.1))
    result, gains = compare(labels, ours, theirs), []
    for mine, other in zip(ours, theirs, strict=True):
        rows = ~np.isnan(mine[:, 0])
        gains.append(1.0 * (mine[rows].argmax(1) == labels[rows]) - (other[rows].argmax(1) == labels[rows]))
    by_fold = (np.array(gains[:5]) + gains[5:]) / 2  # seed s and seed s + 5, on the same 120 images
    variance = max(by_fold.mean(axis=1).var(ddof=1), (by_fold.var(axis=1, ddof=1) / 120).mean())
    mean, half = np.mean(gains), t.ppf(0.975, 4) * (variance * (1 / 5 + 120 / 360)) ** 0.5
    assert [result.gain, result.low, result.high] == pytest.approx([mean, mean - half, mean + half])
    assert (result.folds, result.df, result.images, result.seeds) == (5, 4, 600, 10)
    copies = [np.concatenate([model, model]) for model in (ours, theirs)]
    assert compare(labels, *copies).p == pytest.approx(result.p), "a seed that says the same once more adds nothing"
    row = recall_gains(labels, ours, theirs)[0]
    of_class = compare(labels[labels == 0], ours[:, labels == 0], theirs[:, labels == 0])
    assert [row["gain"], row["images"]] == [pytest.approx(of_class.gain), 300]
    assert row["low"] == pytest.approx(of_class.gain - (of_class.gain - of_class.low) * t.ppf(1 - 0.025 / 2, 4) / t.ppf(0.975, 4))
    single = compare(labels, ours[:1], theirs[:1])
    assert (single.images, single.verdict, np.isfinite([single.low, single.high]).all()) == (600, "undecided", True)


def test_that_nothing_differed_in_a_few_images_does_not_make_models_equivalent():
    for images, verdict in ((1400, "undecided"), (1600, "equivalent")):
        labels, right = np.arange(images) % 2, np.ones((3, images), bool)
        answers = one_hot(right == (labels == 0))
        assert compare(labels, answers, answers, margin=0.002).verdict == verdict


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 3])
def test_false_verdicts_of_folds_are_at_most_as_claimed(repeats: int):
    """Two classifiers by the difference of class means, each of features that are as good; 300 images, whose folds share most."""
    random, false = np.random.default_rng(9), 0
    for _ in range(1000):
        labels = random.permutation(300) % 2
        features, folds = random.normal(0, 1, (2, 300, 8)) + 0.4 * labels[:, None], random.permutation(300) % 5
        models = np.full((2, 5 * repeats, 300, 2), np.nan)
        for model, seed in np.ndindex(2, 5 * repeats):
            train, test = (folds != seed % 5) & (folds != (seed + 1) % 5), folds == seed % 5
            means = [features[model, train & (labels == label)].mean(axis=0) for label in (0, 1)]
            positive = norm.cdf(features[model, test] @ (means[1] - means[0] + random.normal(0, 0.1, 8)))
            models[model, seed, test] = np.stack([1 - positive, positive], axis=1)
        false += compare(labels, *models, "auc").verdict in ("better", "worse")
    assert false / 1000 <= 0.065


@pytest.mark.parametrize(("cases", "verdict"), [(9, "undecided"), (10, "better")])
def test_a_few_patients_give_no_verdict_and_a_class_of_a_few_images_none_on_means_over_classes(cases: int, verdict: str):
    labels, random = np.repeat([0, 1], (400, cases)), np.random.default_rng(0)
    models = [one_hot((random.random((5, 400 + cases)) < share) == (labels == 0)) for share in (1, 0.6)]
    assert compare(labels, *models, "auc").verdict == compare(labels, *models, "balanced_accuracy").verdict == verdict
    assert compare(labels, *models).verdict == "better", "accuracy has no such means"
    assert compare(labels, *models, patients=np.arange(400 + cases) % cases).verdict == verdict
    right = np.stack([one_hot((labels == 0)[None])[0]] * 3)
    assert compare(labels, right, 1 - right).p == 0, "right and wrong without exception"


def test_gains_of_recall_are_those_of_accuracy_on_a_class_with_intervals_that_hold_together():
    random, labels = np.random.default_rng(7), np.repeat([0, 2, 3], (300, 100, 9))
    shares = np.array([[0.6], [0.7], [0.8], [0.9]])  # seeds vary more than images alone make them
    ours, theirs = (random.dirichlet(np.ones(4), (4, 409)) for _ in range(2))
    right = random.random((4, 409)) < shares
    ours[right, np.broadcast_to(labels, (4, 409))[right]] += 1
    gains = recall_gains(labels, ours, theirs)
    assert [(label, row["images"]) for label, row in gains.items()] == [(0, 300), (2, 100), (3, 9)]
    assert set(gains[3]) == {"images", "gain"}, "of nine images"
    for label in (0, 2):
        of_class = labels == label
        whole, row = compare(labels[of_class], ours[:, of_class], theirs[:, of_class]), gains[label]
        wider = t.ppf(1 - 0.025 / 2, whole.df) / t.ppf(0.975, whole.df)
        assert row["gain"] == pytest.approx(whole.gain)
        assert [row["low"], row["high"]] == pytest.approx(
            [whole.gain + sign * wider * (whole.high - whole.gain) for sign in (-1, 1)]
        )
    assert set(recall_gains(labels, ours[:2], theirs[:2])[0]) == {"images", "gain"}, "of two seeds"


def test_seeds_that_differ_as_little_by_chance_do_not_make_a_class_lost():
    right, labels = np.ones((3, 10), bool), np.zeros(10, int)
    wrong_once = ~np.eye(3, 10, dtype=bool)  # each seed another image: the seeds' gains are equal, their covariance negative
    row = recall_gains(labels, one_hot(wrong_once), one_hot(right))[0]
    half = norm.ppf(0.975) * ((0.01 + 0.01 / 9) / 3) ** 0.5
    assert [row["gain"], row["low"], row["high"]] == pytest.approx([-0.1, -0.1 - half, -0.1 + half])
    lost = recall_gains(labels, one_hot(~right), one_hot(right))[0]
    assert (lost["low"], lost["high"]) == (-1, -1)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("images", [10, 100])
def test_of_equal_models_no_class_is_lost_in_nearly_all_trials(seeds: int, images: int):
    random, labels, trials = np.random.default_rng(seeds), np.repeat(np.arange(20), images), 0
    for _ in range(400):
        hard = random.beta(8, 2, (1, len(labels)))
        ours, theirs = (random.random((seeds, len(labels))) < hard + random.normal(0, 0.15, (1, len(labels))) for _ in range(2))
        both = (np.where(right[..., None], np.eye(21)[labels], np.eye(21)[20]) for right in (ours, theirs))
        trials += any(row["high"] < 0 for row in recall_gains(labels, *both).values())
    assert trials / 400 <= 0.025


def test_less_is_better_of_a_loss():
    sure, unsure = (np.tile([share, 1 - share], (3, 50, 1)) for share in (0.9, 0.8))
    sure[:, 0] = [0.85, 0.15]
    assert compare(np.zeros(50, int), sure, unsure, "nll").gain == pytest.approx(np.log(0.9 / 0.8), abs=0.01)
    assert compare(np.zeros(50, int), sure, unsure, "ece").gain > 0


@pytest.mark.parametrize(("correct", "images", "chance"), [(119, 1000, 0.1), (408, 524, 0.742)])
def test_better_than_guessing_is_more_than_luck_would_give(correct: int, images: int, chance: float):
    assert (above_chance(correct, images, chance), above_chance(correct + 1, images, chance)) == (False, True)


def test_a_class_of_a_few_patients_has_no_interval_of_its_recall_however_many_images_they_have():
    labels, *models = simulated(np.random.default_rng(0), **AUC["images vary"])
    patients = np.where(labels == 1, np.arange(len(labels)), np.arange(len(labels)) % 5)
    of_few, of_many = recall_gains(labels, *models, patients).values()
    assert "low" in of_many
    assert "low" not in of_few
