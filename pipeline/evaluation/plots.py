"""A track's figures as files: PNG for people, their values as CSV for `dvc plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.reporting.figures import curves, plot_confusion, plot_gains, plot_loss_curves, plot_reliability
from pipeline.evaluation.comparisons import Measured, gains, pooled_reliability
from pipeline.evaluation.statistics import Comparison
from pipeline.core.files import atomic_folder


def write_plots(
    plots: Path, track: str, measured: Mapping[str, Sequence[Measured]], comparisons: Mapping[str, Comparison]
) -> None:
    """Write every figure as PNG and its values as CSV into the folder `plots`."""
    classes = next(iter(measured.values()))[0].description.dataset.classes
    learning = {model: curves([run.description.history for run in runs]) for model, runs in measured.items()}
    calibration = {model: pooled_reliability(runs) for model, runs in measured.items()}
    confusions = {model: sum(run.confusion for run in runs) for model, runs in measured.items()}
    gained = gains(track, measured)
    figures = {
        "loss_curves.png": plot_loss_curves(learning),
        "reliability.png": plot_reliability(calibration),
        "gains.png": plot_gains(comparisons, gained),
    } | {
        f"confusion_{model}.png": plot_confusion(counts, classes, f"{model}, all seeds")
        for model, counts in confusions.items()
    }
    with atomic_folder(plots) as folder:
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=100)
        gained.to_csv(folder / "gains.csv")
        for model in measured:
            learning[model].to_csv(folder / f"loss_{model}.csv")
            calibration[model].to_csv(folder / f"reliability_{model}.csv", index=False)
            _long_form(confusions[model], classes).to_csv(folder / f"confusion_{model}.csv", index=False)


def _long_form(counts: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """A confusion matrix as rows of actual, predicted, count."""
    frame = pd.DataFrame(counts, index=classes, columns=classes)
    return frame.rename_axis(index="actual", columns="predicted").stack().rename("count").reset_index()
