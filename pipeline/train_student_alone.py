"""Stage train_student_alone: train the same student on the labels, without a teacher, once per seed."""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.params import Params, load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds


def recipe(params: Params, seed: int, data: Path) -> Recipe:
    """The lone student of a seed on the prepared set in `data`."""
    return Recipe(
        "student_alone",
        "compact_cnn",
        params.student.model_dump(),
        seed=seed,
        data=data,
        label_fraction=params.distillation.label_fraction,
        parameters=params.flat("distillation", "student"),
        **params.training(params.distillation),
    )


def main() -> None:
    params = load_params()
    recipes = [recipe(params, seed, Path("data/distillation")) for seed in params.seeds]
    records = train_seeds(recipes, trainings_folder(), params.jobs, Path("models/distillation/student_alone"))
    mirror = Mirror(params.tracking.experiment)
    for record in records:
        mirror.training(record)


if __name__ == "__main__":
    run(main)
