"""Stage train_baselines: train SimpleCNN or ResNet18, once per seed."""

from pathlib import Path

from pipeline.data.prepared import load_initial_weights, load_training_data
from pipeline.core.cli import run
from pipeline.params import load_params
from pipeline.processes import join
from pipeline.training.recipe import Recipe, records, train

DATA = Path("data/baselines")


def main(model: str) -> None:
    params = load_params()
    block = params.baselines
    data = load_training_data(DATA, join(params.processes, params.device))
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
        micro_batches=params.micro_batches,
        parameters=params.flat("baselines.epochs", "baselines.batch_size", "baselines.lr", *options)
        | {"baselines.pretrained": bool(initial)},
    )
    with records(params.tracking.experiment) as kept:
        for seed in params.seeds:
            train(recipe, data, seed, kept, initial=initial)


if __name__ == "__main__":
    run(main, model=("simple_cnn", "resnet18"))
