"""Stage evaluate: predict the validation and test images with every checkpoint of a track and compare its models on test."""

from pathlib import Path

import torch

from pipeline.core.cli import run
from pipeline.data.dataset import load_dataset
from pipeline.data.npy import read_npy
from pipeline.data.prepared import load_split
from pipeline.evaluation.comparisons import evaluate_track, write_evaluation
from pipeline.networks.inference import choose_device
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import Mirror


def main(track: str) -> None:
    params, data, plan = load_params(), Path("data") / track, TRACKS[track]
    torch.set_num_threads(params.threads)
    mirror, device = Mirror(params.tracking.experiment), choose_device(params.device)
    evaluation = evaluate_track(
        track,
        Path("models") / track,
        load_dataset(data),
        load_split(data, "test", device),
        models=plan.models,
        comparisons=plan.comparisons,
        teachers=plan.teachers,
        metric=params.evaluation.primary,
        margin=params.evaluation.margin,
        validation=load_split(data, "val", device),
        train_labels=read_npy(data / "train" / "labels.npy"),
    )
    write_evaluation(evaluation, Path())
    for model, figures in evaluation.metrics.items():
        means = f"test accuracy {100 * figures['accuracy']:.2f} %, AUC {figures['auc']:.4f}"
        print(f"{model}: {means}, mean over {len(evaluation.probabilities[model])} seeds")
    mirror.evaluation(evaluation)


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
