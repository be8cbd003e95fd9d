"""Stage train_teacher: train the teacher on the labels, once per seed."""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.params import load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds


def main() -> None:
    params, model = load_params(), "teacher"
    settings = params.training("distillation", model)
    recipes = [Recipe(**settings, seed=seed, data=Path("data/distillation")) for seed in params.seeds]
    records = train_seeds(recipes, trainings_folder(), params.jobs, Path("models/distillation") / model)
    mirror = Mirror(params.tracking.experiment)
    for record in records:
        mirror.training(record)


if __name__ == "__main__":
    run(main)
