"""Stage train_baselines: train SimpleCNN or ResNet18 on the labels, once per seed."""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.params import TRACKS, Params, load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds

OPTIONS = {"simple_cnn": (), "resnet18": ("baselines.resnet18", "baselines.pretrained")}  # of one network alone


def recipe(params: Params, model: str, seed: int, data: Path) -> Recipe:
    """A baseline of a seed on the prepared set in `data`."""
    return Recipe(
        model,
        model,
        {"stem": params.baselines.resnet18.stem} if model == "resnet18" else {},
        seed=seed,
        data=data,
        initial=data / "initial" / f"{model}.safetensors",
        parameters=params.flat("baselines.epochs", "baselines.batch_size", "baselines.lr", *OPTIONS[model]),
        **params.training(params.baselines),
    )


def main(model: str) -> None:
    params = load_params()
    recipes = [recipe(params, model, seed, Path("data/baselines")) for seed in params.seeds]
    records = train_seeds(recipes, trainings_folder(), params.jobs, Path("models/baselines") / model)
    mirror = Mirror(params.tracking.experiment)
    for record in records:
        mirror.training(record)


if __name__ == "__main__":
    run(main, model=TRACKS["baselines"].models)
