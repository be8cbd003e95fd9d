"""What is said of finished points: synthetic ones, whose answers other code knows."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.evaluation import statistics
from pipeline.evaluation.calibration import fit_temperature, scaled
from pipeline.evaluation.metrics import score
from pipeline.evaluation.statistics import Comparison, analyse, compare
from studies import contrasts, tasks
from studies.contrasts import Findings, find, holm, outcome, p_value, sequence
from studies.pages import draw, write_pages
from studies.study import Contrast, Point, ask, sections
from studies.tasks import MODELS, plan, result_path
from tests.studies.test_study import NAMED, load

CONTRAST = {"at": {"grid": "big", "recipe": "strong", "kd": "hard"}, "model": "student_distilled", "other": "student_alone"}
PICKED = CONTRAST["at"]
SKILL = {"teacher": 2.0, "student_distilled": 1.6, "student_alone": 1.0}  # of the logit that is right


def write_result(point: Point, images: int = 120, **skill: float) -> dict[str, np.ndarray]:
    """Predictions of two classes by every seed and model, as the task evaluate leaves them; the arrays."""
    path, skills = result_path(plan(point.params)[-1].digest), SKILL | skill
    noise, arrays, figures = np.random.default_rng(0), {}, {}
    for split in ("test", "val"):
        arrays[f"{split}_labels"] = labels = np.arange(images) % 2
        hard = noise.normal(size=images)  # how hard an image is, for all alike
        for model in MODELS:
            scores = skills[model] * (2 * labels - 1) + hard + noise.normal(0, 0.3, (len(point.params.seeds), images))
            positive = 1 / (1 + np.exp(-scores))
            arrays[f"{split}_{model}"] = np.stack([1 - positive, positive], axis=2).astype(np.float32)
        figures[split] = {model: [score(labels, seed) for seed in arrays[f"{split}_{model}"]] for model in MODELS}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), **arrays)
    write_json(path, {"seeds": point.params.seeds, "figures": figures})
    return arrays


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    return load(tmp_path, monkeypatch, NAMED)[1]


def found(points: list[Point], sequence: list[dict] = (), secondary: list[dict] = ()) -> Findings:
    asked = ([ask(Contrast(**CONTRAST | {"title": "c"} | each), points, "") for each in part] for part in (sequence, secondary))
    paths = {point.name: result_path(plan(point.params)[-1].digest) for point in points}
    finished = {name: path for name, path in paths.items() if path.is_file()}
    return find("small", sections(points), *asked, {point.name: point.settings for point in points}, finished)


def test_answers_are_those_of_the_statistics_on_the_predictions_kept(points: list[Point]):
    arrays = [write_result(point, student_distilled=1.0 + 0.2 * number) for number, point in enumerate(points)]
    contrast = {"other_at": PICKED | {"kd": "soft"}, "model": "student_alone", "other": "teacher", "metric": "nll"}
    contrast["split"] = "val"
    more = {"minus_at": PICKED | {"recipe": "plain"}, "metric": "accuracy"}
    answers = found(points, [contrast, more]).answers
    direct, difference, *gains = answers.values()
    data = arrays[3]["val_labels"], arrays[3]["val_student_alone"], arrays[2]["val_teacher"]
    assert direct == pytest.approx(compare(*data, "nll", 0.03), nan_ok=True)
    accuracies = [
        [(arrays[number][f"test_{model}"].argmax(axis=2) == arrays[number]["test_labels"]).mean() for number in (3, 1)]
        for model in ("student_distilled", "student_alone")
    ]
    assert difference.gain == pytest.approx(np.subtract(*accuracies)[0] - np.subtract(*accuracies)[1])
    data = arrays[0]["test_labels"], arrays[0]["test_student_distilled"], arrays[0]["test_student_alone"]
    assert gains[0] == pytest.approx(compare(*data, "auc", 0.03), nan_ok=True)


def test_a_calibrated_figure_is_after_temperature_scaling(points: list[Point]):
    arrays = write_result(points[3])
    probabilities = []
    for model in ("student_distilled", "student_alone"):
        seeds = zip(arrays[f"val_{model}"], arrays[f"test_{model}"], strict=True)
        probabilities.append(np.stack([scaled(test, fit_temperature(arrays["val_labels"], val)) for val, test in seeds]))
    answer = next(iter(found(points, [{"metric": "nll_calibrated"}]).answers.values()))
    assert answer == pytest.approx(compare(arrays["test_labels"], *probabilities, "nll", 0.03), nan_ok=True)


def answer(gain: float, error: float, df: float = 9, margin: float = 1.0, seeds: int = 10) -> Comparison:
    wide, narrow = (error * t.ppf(share, df) for share in (0.975, 0.95))
    interval = {"low": gain - wide, "high": gain + wide, "low_90": gain - narrow, "high_90": gain + narrow}
    rest = {"seeds_low": 0, "seeds_high": 0, "p": 2 * t.sf(abs(gain) / error, df), "df": df, "detectable": 0}
    return Comparison("auc", margin, gain, **interval, **rest, seeds=seeds, images=100, smallest_class=50)


@pytest.mark.parametrize("claim", ["equivalent", "not_inferior"])
def test_no_difference_in_a_few_images_shows_nothing(claim: str):
    nothing = dict.fromkeys(("low", "high", "low_90", "high_90"), 0.0)
    for margin, shown in ((0.02, False), (0.04, True)):  # of 100 images, which rule out 3 points
        comparison = answer(0.0, 0.25, margin=margin)._replace(**nothing)
        assert bool(outcome(comparison, claim)) == (p_value(comparison, claim, margin) < 0.05) == shown


@pytest.mark.parametrize("gain", [-1.5, -0.6, -0.3, 0.0, 0.3, 0.6, 1.5])
@pytest.mark.parametrize("claim", ["better", "equivalent", "not_inferior"])
def test_p_is_below_five_percent_where_a_claim_is_shown(claim: str, gain: float):
    comparison = answer(gain, 0.25)
    shown = outcome(comparison, claim) == claim.replace("_", " ")
    worse = claim == "better" and comparison.high < 0
    assert (p_value(comparison, claim, 1.0) < 0.05) == (shown or worse)
    assert p_value(comparison._replace(seeds=2), claim, 1.0) == p_value(None, claim, 1.0) == 1
    assert outcome(comparison._replace(seeds=2), claim) == ""


def test_claims_by_numbers_worked_out_by_hand():
    # t at 9 degrees of freedom: 2.262 (97.5 %), 1.833 (95 %)
    assert outcome(answer(0.5, 0.25), "better_or_equivalent") == "equivalent"  # -0.07 to 1.07; at 90 %: 0.04 to 0.96
    assert outcome(answer(0.6, 0.25), "better_or_equivalent") == "better"
    assert outcome(answer(0.6, 0.25), "equivalent") == ""  # 90 %: 0.14 to 1.06
    assert outcome(answer(-0.4, 0.25), "not_inferior") == "not inferior"  # above -0.97
    assert outcome(answer(-0.5, 0.25), "not_inferior") == ""  # above -1.07
    assert p_value(answer(-0.5, 0.25), "not_inferior", 1.0) == pytest.approx(2 * t.sf(2, 9))
    assert p_value(answer(-0.5, 0.25), "equivalent", 1.0) == pytest.approx(t.sf(2, 9))
    assert p_value(answer(0.5, 1e-300), "equivalent", 1.0) == 0


def test_holms_correction():
    corrected = holm(pd.Series({"a": 0.03, "b": 0.01, "c": 0.2, "d": 0.02}))
    assert corrected.to_dict() == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.2, "d": 0.06})


def test_a_sequence_ends_at_the_first_claim_that_is_not_shown(points: list[Point]):
    write_result(points[3])
    claims = [
        {"model": "teacher"},
        {"claim": "not_inferior", "other": "teacher", "margin": 0.001},
        {"model": "teacher", "metric": "accuracy"},
        {"at": PICKED | {"kd": "soft"}},
    ]
    assert sequence(found(points, claims)) == ["better", "not shown", "not tested", "not run"]
    assert sequence(found(points, claims[::-1]))[:2] == ["not run", "not tested"]


def test_what_is_in_no_sequence_is_corrected_together(points: list[Point]):
    for point in points[:4]:
        write_result(point)
    gain = found(points, [{}], [{}, {"at": PICKED | {"kd": "soft"}}, {"split": "val"}])
    # five gains, two of them in `secondary` too and one of these in the sequence; two direct contrasts; one on validation images
    assert len(gain.holm) == 4 + 2 + 1
    assert gain.holm[gain.rows[points[4].name].gain.test] == 1  # that it is missing counts
    assert gain.contrasts[0].test not in gain.holm


def test_other_images_are_not_paired(points: list[Point]):
    write_result(points[3])
    write_result(points[2], images=100)
    with pytest.raises(UserError, match="c: the points have other test images or seeds: nothing to pair"):
        found(points, [{"other_at": PICKED | {"kd": "soft"}}])


def test_validation_images_may_be_missing(points: list[Point]):
    arrays = write_result(points[3])
    path = result_path(plan(points[3].params)[-1].digest).with_suffix(".npz")
    np.savez(path, **{name: array for name, array in arrays.items() if name.startswith("test")})
    contrasts.jackknifed.cache_clear()
    with pytest.raises(UserError, match="no val images: a contrast needs them"):
        found(points, [{"split": "val"}])


def test_the_pages_of_an_unfinished_study(points: list[Point], tmp_path: Path):
    for point in points[1:]:
        write_result(point)
    page = write_pages(
        found(points, [{"title": "gain"}, {"at": PICKED | {"recipe": "plain", "kd": "soft"}}], [{"split": "val"}]), tmp_path
    )
    assert page == (tmp_path / "small.md").read_text()
    assert page.startswith("Study small: 4 of 5 points finished, collected by commit `")
    assert "`; seeds &#91;0, 1, 2&#93;, evaluation.margin 0.03.\n" in page
    assert "at 95 % each: better 4, worse 0, equivalent 0, undecided 0. Of the 6 comparisons in no fixed sequence, " in page
    assert "A positive difference is an improvement, of a loss or an error too." in page
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
        for part in page.split("\n## ")[1:]
    ]
    fixed, secondary, big, small = tables
    assert [row[-1] for row in fixed] == ["result", "better", "not run"]
    assert secondary[1][:2] == ["c", "better in auc on validation images"]
    models = ["teacher (%)", "alone (%)", "distilled (%)"]
    gains = ["gain (points of AUC)", "95 % interval", "p, Holm", "distilled is"]
    assert big[0] == ["recipe", "kd", *models, *gains, "against soft", "95 % interval", "p, Holm"]
    assert [row[:2] for row in big[1:]] == [["plain", "hard"], ["strong", "soft"], ["strong", "hard"]]
    assert [row[-3] for row in big[1:]] == ["not run", "", "+0.00"]
    assert big[3][7] == "in the fixed sequence"
    models = ["teacher (nats)", "alone (nats)", "distilled (nats)"]
    assert small[0][:5] == ["recipe", *models, "gain (nats of negative log-likelihood)"]


def test_the_tables_hold_every_point_and_every_seed(points: list[Point], tmp_path: Path):
    arrays = write_result(points[3])
    write_pages(found(points), tmp_path)
    (row,) = pd.read_csv(tmp_path / "small.csv").to_dict("records")
    seeds = pd.read_csv(tmp_path / "small_seeds.csv")
    assert list(seeds.columns[:6]) == ["experiment", "seed", "split", "model", "accuracy", "auc"]
    assert len(seeds) == 3 * 2 * 3
    right = arrays["val_teacher"].argmax(axis=2) == arrays["val_labels"]
    of_teacher = seeds[(seeds["split"] == "val") & (seeds["model"] == "teacher")]
    assert of_teacher["accuracy"].tolist() == pytest.approx(right.mean(axis=1).tolist())
    means = seeds[seeds["split"] == "test"].groupby("model")["auc"].mean()
    assert row["gain"] == pytest.approx(means["student_distilled"] - means["student_alone"])
    assert row["auc_teacher"] == pytest.approx(means["teacher"])
    assert (row["verdict"], row["kd.temperature"]) == ("better", 5)


def test_the_figure_has_a_row_per_comparison_and_a_panel_per_line(points: list[Point], tmp_path: Path):
    for point in points[:3]:
        write_result(point)
    figure = draw(found(points))
    gains, direct, small = (panel for part in figure.subfigs for panel in part.axes)
    assert [part.get_suptitle() for part in figure.subfigs] == ["big", "small"]
    assert [label.get_text() for label in direct.get_yticklabels()] == ["recipe plain, kd hard", "recipe strong, kd hard"]
    assert [sum(hasattr(drawn, "has_xerr") for drawn in panel.containers) for panel in (gains, direct, small)] == [3, 1, 0]
    assert [text.get_text() for text in small.texts] == ["not run"]
    assert gains.patches[0].get_width() == pytest.approx(6)  # twice the margin, in points
    write_pages(found(points), tmp_path)
    assert matplotlib.image.imread(tmp_path / "small.png").shape[1] == 1100


def over_temperature(folder: Path, monkeypatch: pytest.MonkeyPatch, temperatures: list[int], alphas: list[float]) -> list[Point]:
    """Points whose figure has the temperature as its x."""
    monkeypatch.setattr(tasks, "ROOT", folder)
    vary = f"{{kd.temperature: {temperatures}, kd.alpha: {alphas}}}"
    return load(folder, monkeypatch, f"fixed: {{seeds: [0, 1, 2]}}\ngrids: [{{title: t, x: kd.temperature, vary: {vary}}}]")[1]


def test_an_x_of_one_value_is_no_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for point in (points := over_temperature(tmp_path, monkeypatch, [4], [0.1, 0.2])):
        write_result(point)
    (panel,) = draw(found(points)).subfigs[0].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["temperature 4.0, alpha 0.1", "temperature 4.0, alpha 0.2"]


def test_ten_lines_are_ten_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alphas = [number / 10 for number in range(1, 11)]
    points = over_temperature(tmp_path, monkeypatch, [2, 4], alphas)
    for point in points[:-1]:
        write_result(point)
    panels = [panel for panel in draw(found(points)).subfigs[0].axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == [f"alpha {alpha}" for alpha in alphas]
    assert [len(panel.containers[0].lines[0].get_xdata()) for panel in panels] == [2] * 9 + [1]
    assert not any(panel.get_legend() for panel in panels)


def simulated(noise: np.random.Generator, points: int, gains: list[float], margin: float = 1.0) -> list[Comparison]:
    """Points of 10 seeds and 200 images, whose gains have an image's share in common; the standard error is about 0.3."""
    of_images = noise.normal(0, 3, 200) + noise.normal(0, 3, (points, 200))
    of_seeds = noise.normal(0, 0.3, (points, 10))
    answers = []
    for gain, images, seeds in zip(gains, of_images, of_seeds, strict=True):
        differences = gain + images + seeds[:, None] + noise.normal(0, 3, (10, 200))
        means = differences.mean(axis=1)
        without = (200 * means[:, None] - differences) / 199
        answers.append(analyse(means.tolist(), without, "accuracy", margin, np.repeat([0, 1], 100)))
    return answers


@pytest.fixture
def no_power(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "_detectable", lambda *_: 0.0)  # it takes nine tenths of the time


@pytest.mark.slow
@pytest.mark.usefixtures("no_power")
def test_holm_over_25_correlated_points_keeps_five_percent():
    noise, trials = np.random.default_rng(1), 2000
    families = (simulated(noise, 25, [0.0] * 25) for _ in range(trials))
    false = sum(holm(pd.Series([p_value(answer, "better", 1.0) for answer in family])).min() < 0.05 for family in families)
    assert 0.02 < false / trials < 0.065


@pytest.mark.slow
@pytest.mark.usefixtures("no_power")
@pytest.mark.parametrize(
    ("claim", "gain", "low", "high"),
    [
        ("better_or_equivalent", -1.0, 0.035, 0.065),  # equivalent would be false
        ("better_or_equivalent", 0.0, 0.015, 0.045),  # better would
        ("not_inferior", -1.0, 0.015, 0.04),
    ],
)
def test_a_sequence_keeps_five_percent(claim: str, gain: float, low: float, high: float):
    noise, trials, false = np.random.default_rng(2), 2000, 0
    for _ in range(trials):
        first, second = simulated(noise, 2, [3.0, gain])
        true = {"better_or_equivalent": {-1.0: "", 0.0: "equivalent"}, "not_inferior": {-1.0: ""}}[claim][gain]
        false += bool(outcome(first, "better")) and outcome(second, claim) not in ("", true)
    assert low < false / trials < high
