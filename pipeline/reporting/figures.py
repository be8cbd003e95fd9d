"""Figures. They can be read in greyscale: what differs, differs in shape or line as well as in colour."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.evaluation.comparisons import Evaluation, loss_curves
from pipeline.evaluation.jackknife import LOWER_IS_BETTER
from pipeline.evaluation.metrics import confusion, reliability
from pipeline.reporting.tables import scale, unit

MARKERS = "osD^vPX"
MOST_COUNTS = 30  # classes up to which the counts are written into a confusion matrix
MOST_NAMES = 100  # classes up to which an axis names every one
LONGEST_NAME = 32  # characters


def draw_figures(evaluation: Evaluation, costs: Mapping[str, Any], exported: Mapping[str, Any]) -> dict[str, bytes]:
    """Every figure of a track's report, as PNG by file name.

    `costs` and `exported` are the contents of metrics/<track>_costs.json and metrics/<track>_export.json.
    """
    pooled = {model: evaluation.pooled(model) for model in evaluation.metrics}
    classes = evaluation.detail["dataset"]["classes"]
    figures = {
        "loss_curves": plot_loss_curves(loss_curves(evaluation)),
        "reliability": plot_reliability({model: reliability(*predictions) for model, predictions in pooled.items()}),
        "gains": plot_gains(evaluation),
        "size": plot_size(evaluation.metrics, costs["models"], exported),
    }
    for model, predictions in pooled.items():
        figures[f"confusion_{model}"] = plot_confusion(confusion(*predictions), classes, f"{model}, all seeds")
    pngs = {}
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=100)
        pngs[f"{name}.png"] = content.getvalue()
    return pngs


def plot_loss_curves(losses: pd.DataFrame) -> Figure:
    """A panel per model of `comparisons.loss_curves`: the mean over the seeds with their range."""
    models = losses["model"].unique()
    figure = Figure(figsize=(4 * len(models), 3.2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        for split, style in (("train", "-"), ("val", "--")):
            curve = losses[(losses["model"] == model) & (losses["split"] == split)]
            if curve.empty:
                continue  # no validation images
            axes.plot(curve["epoch"], curve["loss"], style, marker="o", markersize=3, label=f"{split}_loss")
            axes.fill_between(curve["epoch"], curve["low"], curve["high"], alpha=0.2)
        axes.set(title=model, xlabel="epoch", ylabel="loss (nats per image)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


def plot_confusion(counts: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """A heat map of a confusion matrix (K, K): colour is the share of the true class, the number in a cell the count."""
    few = len(classes) <= MOST_COUNTS
    size = 2.5 + 0.55 * len(classes) if few else 12
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    names, colours = [_literal(name) for name in classes], {"cmap": "Blues", "vmin": 0, "vmax": 1}
    shares = pd.DataFrame(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), names, names)
    bar = {"label": "share of the true class", "shrink": 0.8}
    if few:
        sns.heatmap(shares, annot=counts, fmt="d", annot_kws={"size": 8}, square=True, cbar_kws=bar, ax=axes, **colours)
        axes.tick_params("y", labelrotation=0)
    else:  # an image: a heat map takes over a gigabyte
        figure.colorbar(axes.imshow(shares, **colours), ax=axes, **bar)
        places = range(0, len(names), -(-len(names) // MOST_NAMES))
        axes.set_xticks(places, [names[place] for place in places], rotation=90, fontsize=6)
        axes.set_yticks(places, [names[place] for place in places], fontsize=6)
    axes.set(title=_literal(title), xlabel="predicted", ylabel="true")
    return figure


def _literal(name: str) -> str:
    """A name from the user's data as a short text in which Matplotlib finds no mathematics."""
    text = " ".join(name.split())
    return (text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…").replace("$", r"\$")


def plot_reliability(bins_by_model: Mapping[str, pd.DataFrame]) -> Figure:
    """`metrics.reliability` per model: accuracy by confidence, and below it how many predictions each bin holds."""
    figure = Figure(figsize=(3.6 * len(bins_by_model), 4.4), layout="constrained")
    rows = figure.subplots(2, len(bins_by_model), squeeze=False, sharex=True, height_ratios=[3, 1])
    for (upper, lower), (model, frame) in zip(rows.T, bins_by_model.items(), strict=True):
        filled = frame[frame["images"] > 0]
        upper.plot([0, 1], [0, 1], ":", color="black", linewidth=1, label="perfectly calibrated")
        upper.plot(filled["confidence"], filled["accuracy"], "-o", markersize=4, label="observed")
        upper.set(title=model, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        upper.legend(loc="upper left", fontsize=8)
        width = frame["bin"].iloc[0]
        lower.bar(frame["bin"] - width / 2, np.maximum(frame["images"], 0.5), width=width, color="0.5", edgecolor="white")
        lower.set(yscale="log", ylim=(0.5, None), xlabel="confidence", ylabel="predictions")
    return figure


def plot_gains(evaluation: Evaluation) -> Figure:
    """Each comparison's gain in the figure that verdicts are on, with its 95 % interval, every seed's, and the margin."""
    comparisons, models = evaluation.comparisons, evaluation.detail["models"]
    figure = Figure(figsize=(7, 1.6 + 0.7 * len(comparisons)), layout="constrained")
    axes, answer = figure.subplots(), next(iter(comparisons.values()))
    metric, factor = answer["metric"], scale(answer["metric"])
    sign = -1 if metric in LOWER_IS_BETTER else 1
    for row, (name, comparison) in enumerate(comparisons.items()):
        gain, low, high = (factor * comparison[key] for key in ("gain", "low", "high"))
        mean = axes.errorbar(gain, row, xerr=[[gain - low], [high - gain]], fmt="D", color="black", capsize=5)
        ours, theirs = (np.array([seed[metric] for seed in models[model]["figures"]]) for model in name.split("_vs_"))
        seeds = axes.scatter(factor * sign * (ours - theirs), [row + 0.22] * len(ours), marker="|", s=80, color="0.4")
    margin = axes.axvspan(-factor * answer["margin"], factor * answer["margin"], color="0.9", zorder=0)
    axes.axvline(0, linestyle=":", color="black", linewidth=1)
    axes.set_yticks(range(len(comparisons)), [name.replace("_vs_", "\nagainst ") for name in comparisons])
    axes.set(ylim=(len(comparisons) - 0.5, -0.5), xlabel=f"gain on the test images ({unit(metric)})")
    figure.legend([mean, seeds, margin], ["mean and 95 % interval", "one seed", "margin"], loc="outside lower center", ncols=3)
    return figure


def plot_size(metrics: Mapping[str, Any], costs: Mapping[str, Any], exported: Mapping[str, Any]) -> Figure:
    """Accuracy (%) with its 95 % interval over the size of the file (kB, logarithmic), a marker per model."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    for marker, (model, cost) in zip(MARKERS, costs.items(), strict=False):
        figures = metrics.get(model) or exported[model.removesuffix(".onnx")]
        accuracy, spread = 100 * figures["accuracy"], 100 * figures.get("accuracy_ci95", 0)
        label = model if model in metrics else f"{model} (the exported seed)"
        options = {"fmt": marker, "capsize": 4, "markersize": 7, "label": label}
        axes.errorbar(cost["file_bytes"] / 1000, accuracy, yerr=spread or None, **options)
    axes.set(xscale="log", xlabel="size of the file (kB)", ylabel="test accuracy (%), 95 % interval over seeds")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
