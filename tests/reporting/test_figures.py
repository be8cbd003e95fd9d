from collections.abc import Callable

import numpy as np
import pytest

from pipeline.evaluation.comparisons import Evaluation, loss_curves
from pipeline.reporting.figures import draw_figures, plot_confusion, plot_gains, plot_loss_curves


def test_every_figure_of_the_report_is_drawn_and_drawn_alike(evaluation: Evaluation, costs: dict, exported: dict):
    figures = draw_figures(evaluation, costs, exported)
    names = {"loss_curves", "reliability", "gains", "size", *(f"confusion_{model}" for model in evaluation.metrics)}
    assert set(figures) == {f"{name}.png" for name in names}
    assert all(png.startswith(b"\x89PNG") for png in figures.values())
    assert draw_figures(evaluation, costs, exported) == figures


@pytest.mark.parametrize(("classes", "counts", "names"), [(30, 900, 30), (31, 0, 31), (250, 0, 84)])
def test_a_confusion_matrix_of_many_classes_has_no_counts_and_not_every_name(classes: int, counts: int, names: int):
    figure = plot_confusion(np.eye(classes, dtype=int), [f"class {number}" for number in range(classes)], "title")
    axes = figure.axes[0]
    assert len(axes.texts) == counts
    assert len(axes.get_yticks()) == names


def test_names_are_no_mathematics(evaluation_of: Callable[..., Evaluation], costs: dict, exported: dict):
    names = [r"$\frac{$", "a $x^2$\nb", "n" * 500]
    axes = plot_confusion(np.eye(3, dtype=int), names, r"$\bad{$").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == [r"\$\frac{\$", r"a \$x^2\$ b"]
    draw_figures(evaluation_of(names), costs, exported)  # or Matplotlib raises


def test_the_gains_are_those_of_the_seeds(evaluation: Evaluation):
    axes = plot_gains(evaluation).axes[0]
    teacher, distilled = (evaluation.detail["models"][model]["figures"] for model in ("teacher", "student_distilled"))
    expected = [100 * (ours["accuracy"] - theirs["accuracy"]) for ours, theirs in zip(teacher, distilled, strict=True)]
    seeds = [collection.get_offsets()[:, 0] for collection in axes.collections if len(collection.get_offsets()) == 3]
    assert any(np.allclose(gains, expected) for gains in seeds)


def test_the_loss_curves_are_in_the_order_of_the_models(evaluation: Evaluation):
    panels = plot_loss_curves(loss_curves(evaluation)).axes
    assert [axes.get_title() for axes in panels] == ["teacher", "student_distilled", "student_alone"]
    assert panels[0].lines[1].get_ydata().tolist() == [1, 1]
