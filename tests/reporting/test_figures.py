import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dvc_render.vega import VegaRenderer
from matplotlib.axes import Axes

from pipeline.evaluation.comparisons import Evaluation, loss_curves, write_evaluation
from pipeline.evaluation.statistics import half_width
from pipeline.params import TRACKS
from pipeline.reporting.figures import (
    GRID,
    draw_figures,
    mean_curves,
    plot_confusion,
    plot_curves,
    plot_loss_curves,
    plot_reliability,
    plot_summary,
)
from pipeline.reporting.gallery import confidently_wrong, gallery_table, plot_gallery
from tests.conftest import ROOT
from tests.reporting.conftest import COSTS, EXPORTED, changed
from tests.tracking.samples import make_evaluation, make_record


def test_every_figure_of_the_report_is_drawn_and_drawn_alike(evaluation: Evaluation):
    figures = draw_figures(evaluation, COSTS, EXPORTED)
    assert list(figures) == [f"{name}.png" for name in ("summary", "loss_curves", "reliability", "confusion", "curves")]
    assert all(png.startswith(b"\x89PNG") for png in figures.values())
    assert draw_figures(evaluation, COSTS, EXPORTED) == figures


@pytest.mark.parametrize(
    ("classes", "counts", "names", "own_names"), [(10, 100, 10, 0), (11, 121, 11, 11), (30, 900, 30, 30), (250, 0, 84, 84)]
)
def test_confusion_matrices_of_few_classes_have_counts_and_share_names(classes: int, counts: int, names: int, own_names: int):
    matrices = dict.fromkeys("ab", np.eye(classes, dtype=int))
    first, second, _ = plot_confusion(matrices, [f"class {number}" for number in range(classes)]).axes
    assert (len(first.texts), len(first.get_xticks()), len(first.get_yticks())) == (counts, names, names)
    assert (len(second.get_xticks()), len(second.get_yticks())) == (names, own_names)


def test_the_colour_of_a_confusion_matrix_is_the_share_of_the_true_class_and_its_text_contrasts():
    axes = plot_confusion({"a": np.array([[300, 100], [0, 0]])}, ["x", "y"]).axes[0]
    assert axes.collections[0].get_array().ravel().tolist() == [0.75, 0.25, 0, 0]
    assert [text.get_text() for text in axes.texts] == ["300", "100", "0", "0"]
    assert [text.get_color() for text in axes.texts] == ["w", ".15", ".15", ".15"]


def test_names_are_no_mathematics():
    names = [r"$\frac{$", "a $x^2$\nb", "n" * 40 + "$end"]
    figure = plot_confusion({r"$\bad{$": np.eye(3, dtype=int)}, names)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == [r"\$\frac{\$", r"a \$x^2\$ b", "n" * 19 + "…" + "n" * 8 + r"\$end"]
    figure.canvas.print_figure("/dev/null", format="png")  # or Matplotlib raises


def test_loss_curves_are_those_of_the_evaluation(evaluation: Evaluation):
    panels = plot_loss_curves(loss_curves(evaluation)).axes
    assert [axes.get_title() for axes in panels] == list(evaluation.metrics)
    assert panels[0].lines[1].get_ydata().tolist() == [1, 0.5]


def summary(evaluation: Evaluation, costs: dict = COSTS["models"]) -> tuple[Axes, Axes, list[str]]:
    """The two panels, drawn, and the entries of the legend."""
    figure = plot_summary(evaluation, costs, EXPORTED)
    figure.canvas.print_figure("/dev/null", format="png")
    (legend,), (left, right) = figure.legends, figure.axes
    assert legend.get_window_extent().y1 < min(axes.get_window_extent().y0 for axes in (left, right)), "it hides no data"
    return left, right, [text.get_text() for text in legend.get_texts()]


def of_seeds(axes: Axes) -> list[list[float]]:
    """The differences of each seed, by row, that a summary's left panel marks."""
    marks = [of.get_offsets() for of in axes.collections if len(of.get_offsets()) == 2]
    return [of[:, 0].tolist() for of in marks if np.all(of[:, 1] % 1 == 0.25)]


LESS = ", by less than the margin"
REVERSED = [(f"worse{LESS}", f"better{LESS}"), ("better", "worse"), ("undecided", "undecided"), ("equivalent", "equivalent")]


@pytest.mark.parametrize(("verdict", "back"), REVERSED)
def test_the_summary_shows_headroom_gain_and_deployment_with_their_intervals(evaluation: Evaluation, verdict: str, back: str):
    numbers = {"gain": 0.01, "low": -0.02, "high": 0.04, "verdict": verdict, "margin": 0.005}
    left, _, legend = summary(changed(evaluation, numbers))
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "headroom\nteacher\n- student_alone",
        "gain\nstudent_distilled\n- student_alone",
        "deployment\nstudent_distilled\n- teacher",
        "deployment\nstudent_alone\n- teacher",
    ]
    there, back = f"+1.00 (-2.00 to +4.00)\n{verdict}", f"-1.00 (-4.00 to +2.00)\n{back}"
    assert [text.get_text() for text in left.texts] == [there, there, back, back]
    lines = [
        collection.get_segments()[0][:, 0].tolist() for collection in left.collections if hasattr(collection, "get_segments")
    ]
    assert lines == [pytest.approx([-2, 4])] * 2 + [pytest.approx([-4, 2])] * 2
    assert (left.patches[0].get_x(), left.patches[0].get_width()) == pytest.approx((-0.5, 1)), "the margin"
    ours, theirs = (evaluation.detail["models"][model]["figures"] for model in ("student_distilled", "student_alone"))
    gains = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(ours, theirs, strict=True)]
    assert of_seeds(left)[1] == pytest.approx(gains)
    assert "95 % interval over seeds and images" in legend


def test_the_summary_of_too_few_seeds_has_no_interval_and_of_two_models_one_row(evaluation: Evaluation):
    first = dict(list(evaluation.comparisons.items())[:1])
    students = {model: figures for model, figures in evaluation.metrics.items() if model != "teacher"}
    left, right, legend = summary(evaluation._replace(comparisons=first, metrics=students))
    (text,) = (text.get_text() for text in left.texts)
    assert re.fullmatch(r"[+-]\d+\.\d\d\na smoke test", text)
    assert not any(hasattr(collection, "get_segments") for collection in left.collections)
    assert "95 % interval over seeds and images" not in legend
    assert len(right.containers) == 2 + 4


def test_the_summary_has_a_shape_per_model_at_its_figure_and_latency(evaluation: Evaluation):
    latencies = {model: cost | {"latency_ms": 0.1 * 2**n} for n, (model, cost) in enumerate(COSTS["models"].items())}
    _, right, legend = summary(evaluation, latencies)
    assert (right.get_xscale(), right.get_ylabel()) == ("log", "accuracy (%) on the test images")
    points = [container.lines[0].get_xydata()[0].tolist() for container in right.containers]
    values = [100 * figures["accuracy"] for figures in evaluation.metrics.values()] + [92.9] * 4
    assert points == [pytest.approx([0.1 * 2**n, value]) for n, value in enumerate(values)]
    assert len({container.lines[0].get_marker() for container in right.containers}) == 7, "readable without colours"
    assert {"teacher", "student_int8.onnx, one seed", "teacher_int8.onnx, one seed"} <= set(legend)
    del latencies["teacher"]
    _, right, legend = summary(evaluation, latencies)
    assert "teacher, latency not known" in legend
    assert right.lines[0].get_ydata() == [values[0]] * 2


@pytest.mark.parametrize(("metric", "label"), [("auc", "AUC on"), ("nll", "NLL (nats) on the test images, lower is better")])
def test_the_summary_is_of_the_figure_that_verdicts_are_on(evaluation: Evaluation, metric: str, label: str):
    left, right, _ = summary(changed(evaluation, {"metric": metric}))
    assert right.get_ylabel().startswith(label)
    ours, theirs = (evaluation.metrics[model][metric] for model in ("student_distilled", "student_alone"))
    improvement = 100 * (ours - theirs) if metric == "auc" else theirs - ours
    assert np.mean(of_seeds(left)[1]) == pytest.approx(improvement)


def test_the_intervals_of_a_reliability_diagram_are_over_the_seeds():
    """With as many predictions of every seed in a bin, that of a ratio is that of a mean; where one has none, there is none."""
    accuracies = [0.5, 0.7, 0.9]
    seeds = [np.array([[first := int(a > 0.6), 10], [0.4 * first, 8], [first, 10 * a]]) for a in accuracies]
    axes = plot_reliability({"a": seeds}).axes[0]
    (container,) = axes.containers
    (segment,) = container.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([0.7 - half_width(accuracies), 0.7 + half_width(accuracies)])
    assert axes.lines[2].get_xydata().tolist() == [pytest.approx([0.4, 1.0]), pytest.approx([0.8, 0.7])]


def test_curves_at_their_steps():
    """Scores .9+ .8- .7+ .6-: the ROC curve goes by (0, .5) and (.5, 1), precision is 1 up to a recall of .5, then 2/3."""
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    rates, precisions = mean_curves(np.array([1, 0, 1, 0]), np.stack([1 - scores, scores], axis=1))
    assert np.interp([0, 0.4, 0.6, 1], GRID, rates).tolist() == pytest.approx([0.5, 0.5, 1, 1])
    assert np.interp([0, 0.4, 0.6, 1], GRID, precisions).tolist() == pytest.approx([2 / 3, 2 / 3, 1, 1])
    of_one = np.eye(3)[[0, 1, 1]]  # classes 0, 1 and 2 against the rest, of which the labels hold the first two
    rates, precisions = mean_curves(np.array([0, 1, 0]), of_one)
    assert (rates[0], rates[-1], precisions[0]) == (pytest.approx(0.25), 1, pytest.approx((2 / 3 + 1 / 2) / 2))


def test_the_curves_of_two_classes_have_a_marker_where_there_are_validation_images():
    evaluation = make_evaluation(make_record(0), make_record(1))
    point = {"sensitivity_youden": 0.7, "specificity_youden": 0.9}
    marked = evaluation._replace(metrics={model: figures | point for model, figures in evaluation.metrics.items()})
    for drawn, places in ((evaluation, []), (marked, [[0.1, 0.7]] * 2)):
        axes = plot_curves(drawn).axes[0]
        markers = [c.get_offsets().tolist()[0] for c in axes.collections if len(c.get_offsets()) == 1 and c.get_zorder() == 3]
        assert markers == [pytest.approx(place) for place in places]
    title = plot_curves(evaluation).get_suptitle()
    assert title == "positive: one (a, b); mean and range over the seeds; dotted: chance"


@pytest.mark.filterwarnings("error")
def test_the_curves_of_models_without_a_mistake_are_whole():
    evaluation = make_evaluation(make_record(0), make_record(1))
    right = np.tile(np.eye(2)[evaluation.labels], (2, 1, 1))
    axes = plot_curves(evaluation._replace(probabilities=dict.fromkeys(evaluation.probabilities, right))).axes[0]
    assert axes.get_xlim() == pytest.approx((-0.02, 1.02))


def gallery(teacher: list, student: list, labels: list[int]) -> pd.DataFrame:
    of_models = {"t": np.array(teacher, np.float32), "s": np.array(student, np.float32), "a": np.array(student, np.float32)}
    return confidently_wrong(Evaluation({}, {"s_vs_a": {}, "t_vs_s": {}}, {}, np.array(labels), of_models, np.array([]), {}))


def test_the_gallery_holds_what_every_teacher_and_few_students_name_rightly():
    """Images: wrong for 2 of 3 students; for all; for 1; for all, but one teacher is wrong too; right."""
    right, wrong, sure = [0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.0, 0.9]
    student = [[wrong, sure, wrong, sure, right], [wrong, sure, right, sure, right], [right, sure, right, sure, right]]
    teacher = [[right] * 5, [right] * 5, [right, right, right, wrong, right]]
    rows = gallery(teacher, student, [0] * 5)
    assert gallery_table(rows, ["x", "y", "z"])[1] == [["1", "x", "z", "0.90", "0.70"], ["0", "x", "y", "0.47", "0.70"]]
    assert gallery(teacher, teacher, [0] * 5).empty


@pytest.mark.parametrize(("shape", "count"), [((28, 28, 1), 30), ((224, 224, 3), 2), ((8, 8, 1), 0)])
def test_the_gallery_shows_at_most_twelve_images_grey_and_in_colour(shape: tuple, count: int):
    images = np.arange(30 * np.prod(shape)).reshape(30, *shape).astype(np.uint8)
    right, wrong = [[[0.9, 0.1]] * count + [[0.9, 0.1]]], [[[0.1, 0.9]] * count + [[0.9, 0.1]]]
    figure = plot_gallery(gallery(right, wrong, [0] * (count + 1)), images, ["$x$", "y"])
    figure.canvas.print_figure("/dev/null", format="png")
    assert len(figure.axes) == min(count, 12)
    for number, axes in enumerate(figure.axes):
        assert np.array_equal(np.reshape(axes.images[0].get_array(), shape), images[number])


@pytest.mark.parametrize(("name", "x", "y"), [("losses", "epoch", "loss"), ("confusion", "predicted", "actual")])
def test_dvc_fills_the_templates(name: str, x: str, y: str, evaluation: Evaluation, tmp_path: Path):
    write_evaluation(evaluation, tmp_path)
    rows = pd.read_csv(tmp_path / f"metrics/plots/distillation/{name}.csv", dtype=str).to_dict("records")
    points = [row | {"rev": revision} for revision in ("HEAD", "workspace") for row in rows]
    content = VegaRenderer(points, name, template=name, template_dir=str(ROOT / ".dvc/plots"), x=x, y=y).get_filled_template()
    assert content["data"].pop("values") == points
    text = json.dumps(content)
    assert "DVC_METRIC" not in text
    assert set(re.findall(r'"field": "(\w+)"', text)) <= set(points[0]) | set(re.findall(r'"as": "(\w+)"', text))
    models = [model for track in TRACKS.values() for model in track.models]
    rows = content["facet"].get("row", {}).get("sort", models)
    assert rows == models, "or Vega-Lite puts the matrices of several revisions under wrong headings"
