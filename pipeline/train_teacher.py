"""Stage train_teacher: train the teacher on the labels, once per seed; or make it of the user's file of logits or features."""

from pathlib import Path
from typing import Any

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.params import Params, load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe, check_method
from pipeline.training.seeds import preload, train_seeds

DATA = Path("data/distillation")
MODEL = "teacher"
FOLDER = Path("models/distillation") / MODEL


def main() -> None:
    params = load_params()
    linked = next((path for path in Path("data/own/distillation/teacher").glob("*") if path.is_symlink()), None)
    if params.teacher.file != (linked and linked.readlink()):
        raise UserError("teacher.logits or teacher.features has changed: run dvc repro, which fetches the file first")
    settings = params.training("distillation", MODEL)
    teachers = (params.teacher.file,) if linked else (Path(),) * (len(params.seeds) if params.distill.ensemble else 1)
    check_method(Recipe(**settings | params.method(), seed=0, data=DATA, teachers=teachers))  # before a teacher is paid for
    if linked:
        from_outside(params.teacher.file, params, settings)
        return
    recipes = [Recipe(**settings, seed=seed, data=DATA) for seed in params.seeds]
    preload()  # beside the import of MLflow
    mirror = Mirror(params.tracking.experiment)
    for record in train_seeds(recipes, trainings_folder(), params.jobs, FOLDER):
        mirror.training(record)


def from_outside(file: Path, params: Params, settings: dict[str, Any]) -> None:
    """Make every seed's teacher of the user's file, by `settings` as of a training. Raises UserError if it does not fit."""
    import torch

    from pipeline.data.prepared import load_training_data
    from pipeline.training.outside import write_teachers

    kind = "logits" if params.teacher.logits else "features"
    options = {name: settings[name] for name in ("augmentation", "label_fraction", "threads")}
    data = load_training_data(DATA, torch.device("cpu"))
    write_teachers(file, kind, data, FOLDER, params.seeds, **options, parameters=params.flat(f"teacher.{kind}"))


if __name__ == "__main__":
    run(main)
