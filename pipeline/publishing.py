"""What an evaluation puts into MLflow: each checkpoint's results into the run that made it, and a summary run per track."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.reporting.figures import plot_confusion
from pipeline.evaluation.comparisons import Measured
from pipeline.evaluation.metrics import report
from pipeline.reporting.report import sentence
from pipeline.evaluation.statistics import Comparison, share_interval
from pipeline.tracking.mirror import Tracker


def publish_tests(tracker: Tracker, measured: Mapping[str, Sequence[Measured]]) -> None:
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
            {"confusion_matrix.png": partial(plot_confusion, result.confusion, classes, title)},
        )


def publish_summary(
    tracker: Tracker,
    track: str,
    metrics: Mapping[str, Mapping[str, float]],
    comparisons: Mapping[str, Comparison],
    how: Mapping[str, Any],
    table: str,
    plots: Path,
) -> None:
    """Put a track's table, its figures (the PNG in `plots`) and what they show into a run of their own.

    `metrics` and `how` are the contents of metrics/<track>.json and metrics/<track>_run.json.
    """
    # For the charts page, where a slash opens a section and numbers have two digits.
    flat = {f"percent/{model}": 100 * entry["accuracy"] for model, entry in metrics.items()}
    flat |= {f"points/{name}": 100 * one.gain for name, one in comparisons.items()}
    settings = {key: value for model in how["models"].values() for key, value in model["parameters"].items()}
    sentences = " ".join(sentence(name, one.as_json()) for name, one in comparisons.items())
    tracker.log_summary(track, settings, flat, sentences, {"results.md": table}, sorted(plots.glob("*.png")))
