"""Figures. They can be read in greyscale: what differs, differs in shape or line as well as in colour."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.networks.description import Epoch
from pipeline.evaluation.statistics import Comparison


def curves(histories: Sequence[Sequence[Epoch]]) -> pd.DataFrame:
    """Learning curves of one model: a row per epoch (from 1), columns the means over the seeds, and `_min` and `_max` of each."""
    frames = [
        pd.DataFrame([dict(epoch) for epoch in history], index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
        for history in histories
    ]
    grouped = pd.concat(frames).groupby("epoch")
    mean, low, high = grouped.mean(), grouped.min().add_suffix("_min"), grouped.max().add_suffix("_max")
    return pd.concat([mean, low, high], axis=1)


def plot_loss_curves(curves_by_model: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel per model: training and validation loss by epoch, the mean over the seeds with their range."""
    figure = Figure(figsize=(4 * len(curves_by_model), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves_by_model), squeeze=False)[0]
    for axes, (model, frame) in zip(panels, curves_by_model.items(), strict=True):
        for split, style in (("train", "-"), ("val", "--")):
            name = f"{split}_loss"
            axes.plot(frame.index, frame[name], style, marker="o", markersize=3, label=name)
            axes.fill_between(frame.index, frame[f"{name}_min"], frame[f"{name}_max"], alpha=0.2)
        axes.set(title=model, xlabel="epoch", ylabel="loss (nats per image)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


def plot_confusion(counts: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """A heat map of a confusion matrix: colour is the share of the true class, the number in a cell the count of images."""
    size = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    sns.heatmap(
        shares,
        annot=counts,
        fmt="d",
        annot_kws={"size": 8},
        cmap="Blues",
        vmin=0,
        vmax=1,
        square=True,
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"label": "share of the true class"},
        ax=axes,
    )
    axes.set(title=title, xlabel="predicted", ylabel="true")
    return figure


def plot_reliability(bins_by_model: Mapping[str, pd.DataFrame]) -> Figure:
    """A reliability diagram per model: accuracy by confidence, and below it how many predictions each bin holds.

    The frames are those of `metrics.reliability`.
    """
    figure = Figure(figsize=(3.6 * len(bins_by_model), 4.4), layout="constrained")
    rows = figure.subplots(2, len(bins_by_model), squeeze=False, sharex=True, height_ratios=[3, 1])
    for (upper, lower), (model, frame) in zip(rows.T, bins_by_model.items(), strict=True):
        filled = frame[frame["images"] > 0]
        upper.plot([0, 1], [0, 1], ":", color="black", linewidth=1, label="perfectly calibrated")
        upper.plot(filled["confidence"], filled["accuracy"], "-o", markersize=4, label="observed")
        upper.set(title=model, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        upper.legend(loc="upper left", fontsize=8)
        width = frame["bin"].iloc[0]
        lower.bar(
            frame["bin"] - width / 2, np.maximum(frame["images"], 0.5), width=width, color="0.5", edgecolor="white"
        )
        lower.set(yscale="log", ylim=(0.5, None), xlabel="confidence", ylabel="predictions")
    return figure


def plot_gains(comparisons: Mapping[str, Comparison], gains: pd.DataFrame) -> Figure:
    """Each comparison's gain in accuracy with its 95 % interval, and every seed's: percentage points."""
    figure = Figure(figsize=(7, 1.1 + 0.7 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for row, (name, one) in enumerate(comparisons.items()):
        ends = [[100 * (one.gain - one.low)], [100 * (one.high - one.gain)]]
        mean = axes.errorbar(100 * one.gain, row, xerr=ends, fmt="D", color="black", capsize=5)
        seeds = axes.scatter(100 * gains[name], [row + 0.22] * len(gains), marker="|", s=80, color="0.4")
    axes.axvline(0, linestyle=":", color="black", linewidth=1)
    axes.set_yticks(range(len(comparisons)), [name.replace("_vs_", "\nagainst ") for name in comparisons])
    axes.set(ylim=(len(comparisons) - 0.5, -0.5), xlabel="difference in test accuracy (percentage points)")
    axes.legend([mean, seeds], ["mean and 95 % interval", "one seed"], fontsize=8)
    return figure
