"""Figures: loss curves and confusion matrices."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from pipeline.checkpoints import Epoch


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
