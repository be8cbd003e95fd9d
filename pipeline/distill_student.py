"""Stage distill_student: train a track's student on the labels and on its seed's teacher, once per seed.

Weights and batches start as those of the lone student with the same seed, so that the two are compared in pairs. With
`distill.ensemble`, the students learn from the teachers of all seeds.
"""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.networks.outside import teacher_path
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import trainings_folder
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import preload, train_seeds


def main(track: str) -> None:
    params, plan, models = load_params(), TRACKS[track], Path("models") / track
    settings = params.training(track, plan.distilled)
    teachers = {seed: teacher_path(models / plan.teacher, seed) for seed in params.seeds}
    if params.distill.ensemble:
        teachers = dict.fromkeys(teachers, tuple(teachers.values()))
    else:
        teachers = {seed: (path,) for seed, path in teachers.items()}
    data = Path("data") / track
    recipes = [Recipe(**settings, seed=seed, data=data, teachers=paths) for seed, paths in teachers.items()]
    preload()  # beside the import of MLflow
    mirror = Mirror(params.tracking.experiment)
    for record in train_seeds(recipes, trainings_folder(), params.jobs, models / plan.distilled):
        mirror.training(record)


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
