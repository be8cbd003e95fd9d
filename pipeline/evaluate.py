"""Stage evaluate: measure a track's models on the test images and put the figures into metrics/ and MLflow.

The only stage that reads a test split.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.checkpoints import Description, checkpoints_in, load_checkpoint
from pipeline.data.prepared import Dataset, Split, load_dataset, load_split
from pipeline.errors import UserError, run
from pipeline.evaluation.figures import curves, plot_confusion, plot_loss_curves
from pipeline.evaluation.metrics import confusion, f1_by_class, over_seeds, report, score
from pipeline.evaluation.table import results_table
from pipeline.files import folder_whole, md5, write_whole
from pipeline.inference import choose_device, predict
from pipeline.params import load_params
from pipeline.tracking import Tracker

MODELS = {
    "baselines": ("simple_cnn", "resnet18"),
    "distillation": ("teacher", "student_distilled", "student_alone"),
}


class Measured(NamedTuple):
    """One checkpoint on the test images."""

    md5: str
    description: Description
    figures: dict[str, float]
    f1_by_class: dict[str, float]
    report: str
    confusion: np.ndarray


def main(track: str) -> None:
    params = load_params()
    device = choose_device(params.device)
    dataset = load_dataset(Path("data") / track)
    test = load_split(Path("data") / track, "test", device)
    measured = {
        model: [measure(path, dataset, test) for path in checkpoints_in(Path("models") / track / model)]
        for model in MODELS[track]
    }
    metrics = {model: summarise(runs) for model, runs in measured.items()}
    table = results_table(track, metrics, dataset, len(measured[MODELS[track][0]]))
    learning = {model: curves([run.description.history for run in runs]) for model, runs in measured.items()}
    confusions = {model: sum(run.confusion for run in runs) for model, runs in measured.items()}
    figures = {"loss_curves.png": plot_loss_curves(learning)} | {
        f"confusion_{model}.png": plot_confusion(counts, dataset.classes, f"{model}, all seeds")
        for model, counts in confusions.items()
    }
    plots = Path("metrics/plots") / track
    with folder_whole(plots) as folder:
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=100)
        for model in measured:
            learning[model].to_csv(folder / f"loss_{model}.csv")
            long_form(confusions[model], dataset.classes).to_csv(folder / f"confusion_{model}.csv", index=False)
    write_whole(Path(f"metrics/{track}.md"), table)
    write_json(Path(f"metrics/{track}.json"), metrics)
    by_class = {model: over_seeds([run.f1_by_class for run in runs]) for model, runs in measured.items()}
    write_json(Path(f"metrics/{track}_f1_by_class.json"), by_class)
    publish(
        Tracker(params.tracking.experiment),
        track,
        params.flat(track),
        measured,
        metrics,
        table,
        sorted(plots.glob("*.png")),
    )
    print(f"\n{table}")


def measure(path: Path, dataset: Dataset, test: Split) -> Measured:
    """One checkpoint's results. Raises UserError if it was trained on other data than `dataset`."""
    classifier, description = load_checkpoint(path, test.images.device)
    if description.dataset != dataset:
        raise UserError(f"{path}: trained on other data ({description.dataset.name}) than is in data/: run dvc repro")
    labels = test.labels.cpu().numpy()
    probabilities = torch.softmax(predict(classifier, test.images).double(), dim=1).cpu().numpy()
    figures = score(labels, probabilities) | {
        "final_train_loss": description.history[-1].train_loss,
        "parameters": sum(tensor.numel() for tensor in classifier.parameters()),
    }
    return Measured(
        md5(path),
        description,
        figures,
        f1_by_class(labels, probabilities, dataset.classes),
        report(labels, probabilities, dataset.classes),
        confusion(labels, probabilities),
    )


def summarise(runs: list[Measured]) -> dict[str, float]:
    """One model's entry in metrics/<track>.json: means over the seeds, `_sd` beside what varies."""
    summary = over_seeds([run.figures for run in runs])
    summary.pop("parameters_sd", None)
    summary["parameters"] = runs[0].figures["parameters"]
    return summary


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, indented."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def long_form(counts: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """A confusion matrix as rows of actual, predicted, count."""
    frame = pd.DataFrame(counts, index=classes, columns=classes)
    return frame.rename_axis(index="actual", columns="predicted").stack().rename("count").reset_index()


def publish(
    tracker: Tracker,
    track: str,
    parameters: dict[str, Any],
    measured: dict[str, list[Measured]],
    metrics: dict[str, Any],
    table: str,
    plots: list[Path],
) -> None:
    """Put the results into MLflow: each checkpoint's into the run that made it, the track's into a summary run."""
    for result in (result for runs in measured.values() for result in runs):
        description = result.description
        title = f"{description.model}, seed {description.seed}"
        by_class = {f"test_f1/{name}": value for name, value in result.f1_by_class.items()}
        tracker.log_test(
            result.md5,
            description,
            {f"test_{key}": result.figures[key] for key in ("accuracy", "auc", "f1_weighted")} | by_class,
            {"classification_report.txt": result.report},
            {"confusion_matrix.png": plot_confusion(result.confusion, description.dataset.classes, title)},
        )
    flat = {f"{model}/{key}": value for model, entry in metrics.items() for key, value in entry.items()}
    tracker.log_summary(track, parameters, flat, {"results.md": table}, plots)


if __name__ == "__main__":
    run(main, track=tuple(MODELS))
