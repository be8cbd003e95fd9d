"""Stage train_teacher: train the teacher on the labels, once per seed."""

from pathlib import Path

from pipeline.data.labels import only_known
from pipeline.data.prepared import load_training_data
from pipeline.core.cli import run
from pipeline.params import load_params
from pipeline.processes import join
from pipeline.training.recipe import distillation_recipe, records, train


def main() -> None:
    params = load_params()
    data = load_training_data(Path("data/distillation"), join(params.processes, params.device))
    recipe = distillation_recipe(params, "teacher", "teacher")
    with records(params.tracking.experiment) as kept:
        for seed in params.seeds:
            rows = only_known(data.train.labels, params.distillation.label_fraction, seed)
            train(recipe, data, seed, kept, rows=rows)


if __name__ == "__main__":
    run(main)
