"""Stage evaluate: measure a track's models on the test images and put the figures into metrics/ and MLflow."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.data.prepared import load_dataset, load_split
from pipeline.errors import run
from pipeline.evaluation.figures import curves, plot_confusion, plot_gains, plot_loss_curves, plot_reliability
from pipeline.evaluation.measured import (
    MODELS,
    Measured,
    compare_models,
    gains,
    how_it_was_run,
    measure_track,
    pooled_reliability,
    predictions,
    summarise,
    summarise_classes,
)
from pipeline.evaluation.metrics import report
from pipeline.evaluation.report import sentence
from pipeline.evaluation.statistics import Comparison, share_interval
from pipeline.evaluation.table import results_table
from pipeline.files import folder_whole, write_json, write_whole
from pipeline.inference import choose_device
from pipeline.params import load_params
from pipeline.tracking import Tracker


def main(track: str) -> None:
    params = load_params()
    data = Path("data") / track
    dataset = load_dataset(data)
    measured = measure_track(track, dataset, load_split(data, "test", choose_device(params.device)))
    metrics = {model: summarise(runs) for model, runs in measured.items()}
    comparisons = compare_models(track, measured)
    table = results_table(track, metrics, dataset, len(measured[MODELS[track][0]]))
    plots = Path("metrics/plots") / track
    draw(plots, measured, comparisons, gains(track, measured))
    write_json(Path(f"metrics/{track}.json"), metrics)
    write_json(Path(f"metrics/{track}_comparisons.json"), {key: as_json(one) for key, one in comparisons.items()})
    by_class = {model: summarise_classes(runs) for model, runs in measured.items()}
    write_json(Path(f"metrics/{track}_by_class.json"), by_class)
    how = how_it_was_run(dataset, measured)
    write_json(Path(f"metrics/{track}_run.json"), how)
    write_whole(Path(f"metrics/{track}.md"), table)
    said = io.BytesIO()
    np.savez_compressed(said, **predictions(measured))
    write_whole(Path(f"metrics/predictions/{track}.npz"), said.getvalue())
    tracker = Tracker(params.tracking.experiment)
    publish(tracker, measured)
    # For the charts page, where a slash opens a section and numbers have two digits.
    flat = {f"percent/{model}": 100 * entry["accuracy"] for model, entry in metrics.items()}
    flat |= {f"points/{name}": 100 * one.gain for name, one in comparisons.items()}
    settings = {key: value for model in how["models"].values() for key, value in model["parameters"].items()}
    sentences = " ".join(sentence(name, as_json(one)) for name, one in comparisons.items())
    tracker.log_summary(track, settings, flat, sentences, {"results.md": table}, sorted(plots.glob("*.png")))
    print(f"\n{table}")


def as_json(comparison: Comparison) -> dict[str, float | str]:
    """A comparison's figures and verdict, without those that a single seed does not have."""
    figures = {key: value for key, value in comparison._asdict().items() if not np.isnan(value)}
    return figures | {"verdict": comparison.verdict}


def draw(
    plots: Path, measured: Mapping[str, Sequence[Measured]], comparisons: Mapping[str, Comparison], gains: pd.DataFrame
) -> None:
    """Write every figure as PNG and its values as CSV into the folder `plots`."""
    classes = next(iter(measured.values()))[0].description.dataset.classes
    learning = {model: curves([run.description.history for run in runs]) for model, runs in measured.items()}
    calibration = {model: pooled_reliability(runs) for model, runs in measured.items()}
    confusions = {model: sum(run.confusion for run in runs) for model, runs in measured.items()}
    figures = {
        "loss_curves.png": plot_loss_curves(learning),
        "reliability.png": plot_reliability(calibration),
        "gains.png": plot_gains(comparisons, gains),
    } | {
        f"confusion_{model}.png": plot_confusion(counts, classes, f"{model}, all seeds")
        for model, counts in confusions.items()
    }
    with folder_whole(plots) as folder:
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=100)
        gains.to_csv(folder / "gains.csv")
        for model in measured:
            learning[model].to_csv(folder / f"loss_{model}.csv")
            calibration[model].to_csv(folder / f"reliability_{model}.csv", index=False)
            long_form(confusions[model], classes).to_csv(folder / f"confusion_{model}.csv", index=False)


def long_form(counts: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """A confusion matrix as rows of actual, predicted, count."""
    frame = pd.DataFrame(counts, index=classes, columns=classes)
    return frame.rename_axis(index="actual", columns="predicted").stack().rename("count").reset_index()


def publish(tracker: Tracker, measured: Mapping[str, Sequence[Measured]]) -> None:
    """Put each checkpoint's test results into the MLflow run that made it."""
    for result in (result for runs in measured.values() for result in runs):
        description = result.description
        figures = {
            f"test_{key}": value
            for key, value in result.figures.items()
            if key not in ("final_train_loss", "parameters")
        }
        low, high = share_interval(int(result.right.sum()), len(result.labels))
        figures |= {"test_accuracy_low": low, "test_accuracy_high": high}
        f1 = {f"test_f1.{name}": values["f1"] for name, values in result.by_class.items()}
        title = f"{description.model}, seed {description.seed}"
        classes = description.dataset.classes
        tracker.log_test(
            result.md5,
            description,
            figures | f1,
            {"classification_report.txt": report(result.labels, result.probabilities, classes)},
            {"confusion_matrix.png": plot_confusion(result.confusion, classes, title)},
        )


if __name__ == "__main__":
    run(main, track=tuple(MODELS))
