"""Stage train_student_alone: train the same student on the labels, without a teacher, once per seed."""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.params import load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import preload, train_seeds


def main() -> None:
    params, model = load_params(), "student_alone"
    settings = params.training("distillation", model)
    recipes = [Recipe(**settings, seed=seed, data=Path("data/distillation")) for seed in params.seeds]
    preload()  # beside the import of MLflow
    mirror = Mirror(params.tracking.experiment)
    for record in train_seeds(recipes, trainings_folder(), params.jobs, Path("models/distillation") / model):
        mirror.training(record)


if __name__ == "__main__":
    run(main)
