"""Stage train_baselines: train ResNet18, or SimpleCNN without a teacher, on the labels, once per seed."""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe, check_method
from pipeline.training.seeds import preload, train_seeds


def main(model: str) -> None:
    params = load_params()
    settings, data = params.training("baselines", model), Path("data/baselines")
    teachers = (Path(),) * (len(params.seeds) if params.distill.ensemble else 1)
    check_method(Recipe(**settings | params.method(), seed=0, data=data, teachers=teachers))  # before a teacher is paid for
    recipes = [Recipe(**settings, seed=seed, data=data) for seed in params.seeds]
    preload()  # beside the import of MLflow
    mirror = Mirror(params.tracking.experiment)
    for record in train_seeds(recipes, trainings_folder(), params.jobs, Path("models/baselines") / model):
        mirror.training(record)


if __name__ == "__main__":
    run(main, model=(TRACKS["baselines"].teacher, TRACKS["baselines"].alone))
