"""A track's checkpoints, of untrained networks (their classes are those that random weights name), and their evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.dataset import Dataset
from pipeline.data.prepared import EvaluationData, Split, TrainingData
from pipeline.evaluation.comparisons import Evaluation, evaluate_track
from pipeline.evaluation.predictions import predict_track
from pipeline.networks.checkpoints import new_classifier, save_checkpoint
from pipeline.networks.description import Description, checkpoint_path
from pipeline.params import TRACKS

PLAN = TRACKS["distillation"]
SEEDS = [0, 3]


def save(folder: Path, dataset: Dataset, model: str, seed: int, parameters: Mapping[str, Any] = {"a": 1}) -> None:
    arguments = {"width": 2, "hidden": 8 if model == "teacher" else 4}
    network = {"architecture": "compact_cnn", "arguments": arguments, "dataset": dataset, "device": "cpu"}
    training = {"digest": f"{model}{seed}", "setting": model, "model": model, "seed": seed, "parameters": parameters}
    accuracies = {"train_accuracy": 0.5, "val_accuracy": 0.1 if (model, seed) == ("student_alone", 3) else 0.5}
    history = [accuracies | {"train_loss": 2.0, "val_loss": 1.0}, accuracies | {"train_loss": 1.5 + seed, "val_loss": 0.5}]
    description = Description(format=4, **network, **training, history=history, best_epoch=2, val_images=100, chance=0.1)
    save_checkpoint(checkpoint_path(folder / model, seed), new_classifier("compact_cnn", arguments, dataset, seed), description)


def evaluate(folder: Path, data: TrainingData) -> Evaluation:
    """The evaluation, the 400 training images for test images, of the checkpoints in `folder`; of new ones if it has none."""
    for model in () if folder.exists() else PLAN.models:
        for seed in SEEDS:
            save(folder, data.dataset, model, seed)
    predictions = predict_track(folder, EvaluationData(data.dataset, data.train, data.val), PLAN.models)
    return evaluate_track("distillation", predictions, PLAN.comparisons, PLAN.teachers, train_labels=data.val.labels.numpy())


def even_odd(data: TrainingData) -> TrainingData:
    """The same images in two classes."""
    train, val = (Split(split.images, split.labels % 2) for split in (data.train, data.val))
    return TrainingData(data.dataset.model_copy(update={"classes": ["even", "odd"]}), train, val)


def with_validation(data: TrainingData, count: int) -> TrainingData:
    """The first `count` of the validation images alone."""
    images = data.dataset.images | {"val": count}
    val = Split(data.val.images[:count], data.val.labels[:count])
    return data._replace(dataset=data.dataset.model_copy(update={"images": images}), val=val)
