"""Stage distill_student: train the student on the labels and on its seed's teacher, once per seed.

The teacher does not change, so its logits for the training images are computed once. Weights and batches start as those of
train_student_alone with the same seed, so that the two students can be compared in pairs.
"""

from pathlib import Path

from pipeline.networks.description import checkpoint_path
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.data.labels import hide_unknown
from pipeline.data.prepared import load_training_data
from pipeline.training.losses import DistillationLoss
from pipeline.core.cli import run
from pipeline.core.files import md5
from pipeline.networks.inference import choose_precision
from pipeline.params import load_params
from pipeline.processes import join, predict_together
from pipeline.training.recipe import distillation_recipe, records, train


def main() -> None:
    params = load_params()
    device = join(params.processes, params.device)
    data = load_training_data(Path("data/distillation"), device)
    loss = DistillationLoss(params.kd.temperature, params.kd.alpha, params.kd.divergence)
    recipe = distillation_recipe(params, "student_distilled", "student", "kd")
    with records(params.tracking.experiment) as kept:
        for seed in params.seeds:
            path = checkpoint_path(Path("models/distillation/teacher"), seed)
            teacher, _ = load_checkpoint(path, device)
            logits = predict_together(teacher, data.train.images, choose_precision(params.precision, device))
            taught = recipe._replace(parameters=recipe.parameters | {"teacher_md5": md5(path)})
            known = hide_unknown(data, params.distillation.label_fraction, seed)
            train(taught, known, seed, kept, loss=loss, targets=(logits,))


if __name__ == "__main__":
    run(main)
