"""Stage evaluate: predict the validation and test images with every checkpoint of a track and compare its models on test."""

from pathlib import Path

import torch

from pipeline.core.cli import run
from pipeline.data.npy import read_npy
from pipeline.data.prepared import load_evaluation_data
from pipeline.evaluation.comparisons import evaluate_track, write_evaluation
from pipeline.networks.inference import choose_device
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import Mirror


def main(track: str) -> None:
    params, folder, plan = load_params(), Path("data") / track, TRACKS[track]
    torch.set_num_threads(params.threads)
    mirror, device = Mirror(params.tracking.experiment), choose_device(params.device)
    held = load_evaluation_data(folder, device)
    train_labels = read_npy(folder / "train" / "labels.npy")
    if held.folds is not None:  # of the first seed, whose numbers those of the others resemble
        train_labels = train_labels[: len(held.folds)][~(held.rows("test", 0) | held.rows("val", 0))]
    evaluation = evaluate_track(
        track,
        Path("models") / track,
        held,
        models=plan.models,
        comparisons=plan.comparisons,
        teachers=plan.teachers,
        metric=params.evaluation.primary,
        margin=params.evaluation.margin,
        train_labels=train_labels,
    )
    write_evaluation(evaluation, Path())
    for model, figures in evaluation.metrics.items():
        means = f"test accuracy {100 * figures['accuracy']:.2f} %, AUC {figures['auc']:.4f}"
        print(f"{model}: {means}, mean over {len(evaluation.probabilities[model])} seeds")
    mirror.evaluation(evaluation)


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
