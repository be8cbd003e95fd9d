"""ROC and precision-recall curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics as sk

from pipeline.evaluation.comparisons import Evaluation
from pipeline.reporting.style import STYLES, add_legend, literal

GRID = np.r_[0, np.geomspace(1e-4, 1, 1000)]  # distances from the perfect corner: false-positive rates, 1 - recalls
NEAR, SHOWN = 0.04, 5  # where the worst curve is nearer than NEAR, a panel shows SHOWN times its distance


def plot_curves(evaluation: Evaluation) -> Figure:
    """Curves of the second of two classes, or the mean over more classes, each against the rest; per model, over the seeds.

    Curves are averaged vertically (Fawcett 2006, Pattern Recognition Letters 27:861-874, algorithm 4); bands are their range.
    Where all come near the perfect corner, a panel shows that corner. Of two classes, a marker shows the mean over the seeds at
    the threshold that is best on the validation images, where there are some (`metrics.youden_threshold`).
    """
    labels, classes = evaluation.labels, evaluation.detail["dataset"]["classes"]
    rates, precisions = {}, {}
    for model in evaluation.probabilities:
        rates[model], precisions[model] = np.stack([mean_curves(*of_seed) for of_seed in evaluation.by_seed(model)], axis=1)
    figure, present = Figure(figsize=(11, 5.8), layout="constrained"), len(np.unique(labels))
    left, right = figure.subplots(1, 2)
    if len(classes) == 2:
        subject, chance = f"positive: {literal(classes[1])}", float(np.mean(labels == 1))
    else:
        subject, chance = f"each of {present} classes against the rest, their mean", 1 / present
    figure.suptitle(f"{subject}; mean and range over the seeds; dotted: chance", fontsize=10)
    _draw(right, 1 - GRID, precisions, [chance, chance])
    right.set(xlabel="recall (sensitivity)", ylabel="precision")
    lines, entries, points = _draw(left, GRID, rates, [0, 1]), {}, {}
    left.set(xlabel="false-positive rate (1 - specificity)", ylabel="true-positive rate (sensitivity)")
    for style, (model, line) in zip(STYLES, lines.items(), strict=False):
        figures = evaluation.metrics[model]
        entries[f"{model}: AUC {figures['auc']:.4f}, average precision {figures['average_precision']:.4f}"] = line
        if "sensitivity_youden" in figures:
            options = {"color": style["color"], "marker": style["marker"], "edgecolor": "black", "s": 120, "zorder": 3}
            label = "large: at the threshold that is best on the validation images"
            points[label] = left.scatter(1 - figures["specificity_youden"], figures["sensitivity_youden"], **options)
    add_legend(figure, entries | points, columns=2)
    return figure


def mean_curves(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True-positive rates at the false-positive rates GRID, and precisions at the recalls 1 - GRID.

    Of labels (N,) and probabilities (N, K): of the second of two classes, or the mean over those that the labels hold.
    """
    rates, precisions = [], []
    for label in [1] if probabilities.shape[1] == 2 else np.unique(labels):
        positive, scores = labels == label, probabilities[:, label]
        false, true, _ = sk.roc_curve(positive, scores)
        rates.append(np.interp(GRID, false, true))
        precision, recall, _ = sk.precision_recall_curve(positive, scores)
        reached = np.searchsorted(recall[::-1], np.maximum(1 - GRID, 1e-9))  # precision is a step function of recall
        precisions.append(precision[::-1][reached])
    return np.mean(rates, axis=0), np.mean(precisions, axis=0)


def _draw(axes: Axes, at: np.ndarray, curves: Mapping[str, np.ndarray], chance: Sequence[float]) -> dict[str, Any]:
    """Draw curves, (S, len(GRID)) by model, at `at`, and that of chance at 0 and 1; returns what a legend shows of each model."""
    drawn, far = {}, []
    for number, (style, (model, values)) in enumerate(zip(STYLES, curves.items(), strict=False)):
        mean = values.mean(axis=0)
        (line,) = axes.plot(at, mean, markevery=(0.05 * number, 0.15), markersize=5, **style)
        drawn[model] = line, axes.fill_between(at, values.min(axis=0), values.max(axis=0), alpha=0.15, color=style["color"])
        far.append(np.maximum(GRID, 1 - mean).min())
    axes.plot([0, 1], chance, ":", color="0.3", linewidth=1)
    corner = 0 < max(far) < NEAR
    low, high = np.array([-0.02, 1.02]) * (max(far) * SHOWN if corner else 1)
    axes.set(xlim=(low, high) if at is GRID else (1 - high, 1 - low), ylim=(1 - high, 1 - low))
    axes.locator_params(nbins=6)
    axes.set_title(f"{'ROC' if at is GRID else 'precision-recall'}{', the corner alone' if corner else ''}", fontsize=10)
    return drawn
