"""Stage train_teacher: train the teacher on the labels, once per seed."""

from pathlib import Path

from pipeline.data.labels import only_known
from pipeline.data.prepared import load_training_data
from pipeline.errors import run
from pipeline.inference import choose_device
from pipeline.params import load_params
from pipeline.progress import Progress
from pipeline.runs import distillation_recipe, train
from pipeline.tracking import Tracker


def main() -> None:
    params = load_params()
    data = load_training_data(Path("data/distillation"), choose_device(params.device))
    recipe = distillation_recipe(params, "teacher", "teacher")
    tracker = Tracker(params.tracking.experiment)
    with Progress() as progress:
        for seed in params.seeds:
            train(recipe, only_known(data, params.distillation.label_fraction, seed), seed, tracker, progress)


if __name__ == "__main__":
    run(main)
