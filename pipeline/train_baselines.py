"""Stage train_baselines: train SimpleCNN or ResNet18, once per seed."""

from pathlib import Path

from pipeline.data.prepared import load_initial_weights, load_training_data
from pipeline.errors import run
from pipeline.inference import choose_device
from pipeline.params import load_params
from pipeline.progress import Progress
from pipeline.runs import Recipe, train
from pipeline.tracking import Tracker

DATA = Path("data/baselines")


def main(model: str) -> None:
    params = load_params()
    block = params.baselines
    data = load_training_data(DATA, choose_device(params.device))
    initial = load_initial_weights(DATA, model)
    options = {"resnet18": ["baselines.resnet18"], "simple_cnn": []}[model]
    recipe = Recipe(
        folder=Path("models/baselines") / model,
        architecture=model,
        arguments={"stem": block.resnet18.stem} if model == "resnet18" else {},
        epochs=block.epochs,
        batch_size=block.batch_size,
        lr=block.lr,
        precision=params.precision,
        parameters=params.flat("baselines.epochs", "baselines.batch_size", "baselines.lr", *options)
        | {"baselines.pretrained": bool(initial)},
    )
    tracker = Tracker(params.tracking.experiment)
    with Progress() as progress:
        for seed in params.seeds:
            train(recipe, data, seed, tracker, progress, initial=initial)


if __name__ == "__main__":
    run(main, model=("simple_cnn", "resnet18"))
