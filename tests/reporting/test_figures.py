import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dvc_render.vega import VegaRenderer

from pipeline.evaluation.comparisons import Evaluation, loss_curves, write_evaluation
from pipeline.params import TRACKS
from pipeline.reporting.figures import draw_figures, plot_confusion, plot_gains, plot_loss_curves
from tests.conftest import ROOT
from tests.reporting.conftest import COSTS, EXPORTED


def test_every_figure_of_the_report_is_drawn_and_drawn_alike(evaluation: Evaluation):
    figures = draw_figures(evaluation, COSTS, EXPORTED)
    names = ("loss_curves", "reliability", "gains", "size", *(f"confusion_{model}" for model in evaluation.metrics))
    assert list(figures) == [f"{name}.png" for name in names]
    assert all(png.startswith(b"\x89PNG") for png in figures.values())
    assert draw_figures(evaluation, COSTS, EXPORTED) == figures


@pytest.mark.parametrize(("classes", "counts", "names"), [(30, 900, 30), (31, 0, 31), (250, 0, 84)])
def test_a_confusion_matrix_of_many_classes_has_no_counts_and_not_every_name(classes: int, counts: int, names: int):
    axes = plot_confusion(np.eye(classes, dtype=int), [f"class {number}" for number in range(classes)], "title").axes[0]
    assert (len(axes.texts), len(axes.get_xticks()), len(axes.get_yticks())) == (counts, names, names)


def test_names_are_no_mathematics():
    names = [r"$\frac{$", "a $x^2$\nb", "n" * 500]
    figure = plot_confusion(np.eye(3, dtype=int), names, r"$\bad{$")
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == [r"\$\frac{\$", r"a \$x^2\$ b", "n" * 31 + "…"]
    figure.canvas.print_figure("/dev/null", format="png")  # or Matplotlib raises


def test_gains_and_loss_curves_are_those_of_the_evaluation(evaluation: Evaluation):
    ours, theirs = (evaluation.detail["models"][model]["figures"] for model in ("student_distilled", "student_alone"))
    expected = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(ours, theirs, strict=True)]
    points = [collection.get_offsets()[:, 0] for collection in plot_gains(evaluation).axes[0].collections]
    assert any(gains.shape == (2,) and np.allclose(gains, expected) for gains in points)
    panels = plot_loss_curves(loss_curves(evaluation)).axes
    assert [axes.get_title() for axes in panels] == list(evaluation.metrics)
    assert panels[0].lines[1].get_ydata().tolist() == [1, 0.5]


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
