"""Stage evaluate: predict the validation and test images with every checkpoint of a track and compare its models on test."""

import importlib
from pathlib import Path

import numpy as np

from pipeline.core.cli import run
from pipeline.data.dataset import held_out, load_dataset
from pipeline.data.npy import read_npy
from pipeline.evaluation.comparisons import evaluate_track, write_evaluation
from pipeline.evaluation.predictions import predicted_meanwhile
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import Mirror


def main(track: str) -> None:
    params, data, plan = load_params(), Path("data") / track, TRACKS[track]
    with predicted_meanwhile(Path("models") / track, data, plan.models, params.device, params.threads) as predictions:
        mirror = Mirror(params.tracking.experiment)
        for module in ("pipeline.evaluation.metrics", "pipeline.reporting.report"):  # else imported after the wait
            importlib.import_module(module)
        evaluation = evaluate_track(
            track,
            predictions(),
            comparisons=plan.comparisons,
            teachers=plan.teachers,
            metric=params.evaluation.primary,
            margin=params.evaluation.margin,
            train_labels=train_labels(data),
        )
    write_evaluation(evaluation, Path())
    for model, figures in evaluation.metrics.items():
        means = f"test accuracy {100 * figures['accuracy']:.2f} %, AUC {figures['auc']:.4f}"
        print(f"{model}: {means}, mean over {len(evaluation.probabilities[model])} seeds")
    mirror.evaluation(evaluation)


def train_labels(data: Path) -> np.ndarray:
    """Of the images that are trained on: in a cross-validation by the first seed, whose numbers those of the others resemble."""
    labels, folds = read_npy(data / "train" / "labels.npy"), load_dataset(data).folds
    if not folds:
        return labels
    of_images = read_npy(data / "test" / "folds.npy")
    return labels[: len(of_images)][~(held_out(of_images, folds, 0, "test") | held_out(of_images, folds, 0, "val"))]


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
