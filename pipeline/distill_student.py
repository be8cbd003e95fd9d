"""Stage distill_student: train the student on the labels and on its seed's teacher, once per seed.

Weights and batches start as those of train_student_alone with the same seed, so that the two students are compared in pairs.
"""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.networks.description import checkpoint_path
from pipeline.params import Params, load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds


def recipe(params: Params, seed: int, data: Path, teacher: Path) -> Recipe:
    """The student of a seed on the prepared set in `data`, distilled from the checkpoint `teacher`."""
    return Recipe(
        "student_distilled",
        "compact_cnn",
        params.student.model_dump(),
        seed=seed,
        data=data,
        label_fraction=params.distillation.label_fraction,
        kd=params.kd.model_dump(),
        teacher=teacher,
        parameters=params.flat("distillation", "student", "kd"),
        **params.training(params.distillation),
    )


def main() -> None:
    params = load_params()
    models = Path("models/distillation")
    teachers = {seed: checkpoint_path(models / "teacher", seed) for seed in params.seeds}
    recipes = [recipe(params, seed, Path("data/distillation"), teacher) for seed, teacher in teachers.items()]
    records = train_seeds(recipes, trainings_folder(), params.jobs, models / "student_distilled")
    mirror = Mirror(params.tracking.experiment)
    for record in records:
        mirror.training(record)


if __name__ == "__main__":
    run(main)
