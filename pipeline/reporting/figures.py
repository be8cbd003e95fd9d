"""The report's figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy.stats import t

from pipeline.evaluation.comparisons import Evaluation, loss_curves
from pipeline.evaluation.metrics import confusion, reliability
from pipeline.evaluation.statistics import CONFIDENCE
from pipeline.reporting.curves import plot_curves
from pipeline.reporting.style import STYLES, SURE, add_legend, literal, png
from pipeline.reporting.summary import plot_summary

SIDE_BY_SIDE = 10  # classes up to which the confusion matrices of several models stand side by side
MOST_COUNTS = 30  # classes up to which the counts are written into a confusion matrix
MOST_CURVES = 30  # classes up to which ROC and precision-recall curves are drawn
MOST_NAMES = 100  # classes up to which an axis names every one


def draw_figures(evaluation: Evaluation, costs: Mapping[str, Any], exported: Mapping[str, Any]) -> dict[str, bytes]:
    """Every figure of a track's report, as PNG by file name.

    `costs` and `exported` are the contents of metrics/<track>_costs.json and metrics/<track>_export.json. Of more than 30 classes
    there is no curves.png.
    """
    classes = evaluation.detail["dataset"]["classes"]
    bins = {model: [reliability(*of_seed) for of_seed in evaluation.by_seed(model)] for model in evaluation.probabilities}
    figures = {
        "summary": plot_summary(evaluation, costs["models"], exported),
        "loss_curves": plot_loss_curves(loss_curves(evaluation)),
        "reliability": plot_reliability(bins),
        "confusion": plot_confusion({model: confusion(*evaluation.pooled(model)) for model in bins}, classes),
    }
    if len(classes) <= MOST_CURVES:
        figures["curves"] = plot_curves(evaluation)
    return {f"{name}.png": png(figure) for name, figure in figures.items()}


def plot_loss_curves(losses: pd.DataFrame) -> Figure:
    """A panel per model of `comparisons.loss_curves`: the mean over the seeds with their range."""
    models = losses["model"].unique()
    figure = Figure(figsize=(4 * len(models), 3.5), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    entries = {}
    for axes, model in zip(panels, models, strict=True):
        for split, style in zip(("train", "val"), STYLES, strict=False):
            curve = losses[(losses["model"] == model) & (losses["split"] == split)]
            if curve.empty:
                continue  # no validation images
            (line,) = axes.plot(curve["epoch"], curve["loss"], markersize=4, markevery=-(-len(curve) // 30), **style)
            band = axes.fill_between(curve["epoch"], curve["low"], curve["high"], alpha=0.2, color=style["color"])
            entries[f"{split}_loss, mean and range over the seeds"] = (line, band)
        axes.set(title=model, xlabel="epoch", ylabel="loss (nats per image)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure, entries)
    return figure


def plot_confusion(counts: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Confusion matrices (K, K) by title: colour is the share of the true class, the number in a cell the count."""
    few, across = len(classes) <= MOST_COUNTS, len(classes) <= SIDE_BY_SIDE
    names = [literal(name) for name in classes]
    digits = len(str(max(matrix.max() for matrix in counts.values())))
    cell = max(0.36, 0.075 * digits, 1.6 / len(classes)) if few else 10 / len(classes)  # inches, as are the next three
    longest, side = 0.075 * max(map(len, names)), cell * len(classes)
    columns, rows = (len(counts), 1) if across else (1, len(counts))
    size = 1.2 + longest + (side + 0.2) * columns, (0.8 + side + (longest if longest > cell else 0.2)) * rows
    figure = Figure(figsize=size, layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    named = range(0, len(names), -(-len(names) // MOST_NAMES))
    places, shown = np.array(named) + 0.5 * few, [names[number] for number in named]
    options = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    for axes, (title, matrix) in zip(panels, counts.items(), strict=True):
        shares, own_names = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), not across or axes is panels[0]
        if few:
            cells = {"annot": matrix, "fmt": "d", "annot_kws": {"size": 7}, "linewidths": 0.5, "linecolor": "0.85"}
            sns.heatmap(shares, square=True, cbar=False, ax=axes, **cells, **options)
            for text in axes.texts:
                text.set_in_layout(False)  # measuring hundreds of them takes seconds
        else:  # an image: a heat map takes over a gigabyte
            axes.imshow(shares, **options)
        axes.set_xticks(places, shown, rotation=90 if longest > cell else 0, fontsize=8 if few else 6)
        axes.set_yticks(*((places, shown) if own_names else ([], [])), rotation=0, fontsize=8 if few else 6)
        axes.set_title(literal(title), fontsize=10)
        axes.set(xlabel="predicted", ylabel="true" if own_names else "")
    drawn = (panels[0].collections or panels[0].images)[0]
    figure.colorbar(drawn, ax=panels.tolist(), label="share of the true class", aspect=30, fraction=0.03, pad=0.01, shrink=0.8)
    return figure


def plot_reliability(bins: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """`metrics.reliability` by model and seed: accuracy by confidence of all seeds, and how many predictions each bin holds.

    The interval is over the seeds, by the variance of a ratio of sums (Cochran 1977, Sampling Techniques, eq. 2.46), in bins
    that no seed leaves empty.
    """
    figure = Figure(figsize=(3.7 * len(bins), 4.8), layout="constrained")
    rows = figure.subplots(2, len(bins), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for (upper, lower), (model, of_seeds) in zip(rows.T, bins.items(), strict=True):
        images, confidences, correct = np.stack(of_seeds, axis=1)
        total, seeds = images.sum(axis=0), len(images)
        confidence, accuracy = (sums.sum(axis=0) / np.maximum(total, 1) for sums in (confidences, correct))
        residuals = ((correct - accuracy * images) ** 2).sum(axis=0) * seeds / max(seeds - 1, 1)
        half = t.ppf((1 + CONFIDENCE) / 2, max(seeds - 1, 1)) * np.sqrt(residuals) / np.maximum(total, 1)
        every, filled = (images > 0).all(axis=0) & (seeds > 1), total > 0
        (diagonal,) = upper.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
        upper.plot(confidence[filled], accuracy[filled], "-", color="0.6", linewidth=1)
        (hollow,) = upper.plot(confidence[filled], accuracy[filled], "o", color="black", markerfacecolor="white", markersize=5)
        bar = upper.errorbar(confidence[every], accuracy[every], half[every], fmt="o", color="black", capsize=3, markersize=5)
        upper.set(title=model, xlim=(0, 1.02), ylim=(-0.02, 1.02))
        middles = (np.arange(len(total)) + 0.5) / len(total)
        lower.bar(middles, np.maximum(total, 0.5), width=1 / len(total), color="0.5", edgecolor="white")
        lower.set(yscale="log", ylim=(0.5, None), xlabel="confidence")
    rows[0, 0].set(ylabel="accuracy")
    rows[1, 0].set(ylabel="predictions")
    entries = {"perfectly calibrated": diagonal, f"all seeds, {SURE} over them": bar, "not every seed has predictions": hollow}
    add_legend(figure, entries)
    return figure
