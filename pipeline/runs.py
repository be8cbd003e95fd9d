"""One training from fresh weights to a checkpoint with an MLflow run: what every training stage does for each seed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pipeline.checkpoints import Description, checkpoint_path, new_classifier, save_checkpoint
from pipeline.data.prepared import TrainingData
from pipeline.files import md5
from pipeline.inference import choose_precision
from pipeline.models import load_initial
from pipeline.params import Params
from pipeline.tracking import Tracker
from pipeline.training import fit


class Recipe(NamedTuple):
    """What to train and how.

    Attributes
    ----------
    folder : Path
        Where the checkpoints go, models/<track>/<model>.
    architecture, arguments :
        As in models.build.
    epochs, batch_size, lr :
        As in training.fit.
    precision :
        As in params.yaml.
    parameters : dict
        Of params.yaml, by dotted name, those that the result depends on: for the record.
    """

    folder: Path
    architecture: str
    arguments: dict[str, Any]
    epochs: int
    batch_size: int
    lr: float
    precision: str
    parameters: dict[str, Any]


def distillation_recipe(params: Params, model: str, network: Literal["teacher", "student"], *recorded: str) -> Recipe:
    """The recipe of a model of the distillation track, of the size of the block `network`; `recorded` as in Params.flat."""
    block = params.distillation
    return Recipe(
        folder=Path("models/distillation") / model,
        architecture="compact_cnn",
        arguments=getattr(params, network).model_dump(),
        epochs=block.epochs,
        batch_size=block.batch_size,
        lr=block.lr,
        precision=params.precision,
        parameters=params.flat("distillation", network, *recorded),
    )


def train(
    recipe: Recipe,
    data: TrainingData,
    seed: int,
    tracker: Tracker,
    *,
    loss: Callable[..., Tensor] = F.cross_entropy,
    targets: tuple[Tensor, ...] = (),
    initial: dict[str, Tensor] | None = None,
) -> None:
    """Train one seed and write its checkpoint, `seed<seed>.safetensors` in the recipe's folder.

    `loss` and `targets` as in training.fit, `initial` as in models.load_initial.
    """
    model = recipe.folder.name
    device = data.train.images.device
    precision = choose_precision(recipe.precision, device)
    parameters = recipe.parameters | {"precision": precision}
    classifier = new_classifier(recipe.architecture, recipe.arguments, data.dataset, seed)
    load_initial(classifier.network, initial or {})
    classifier.to(device)
    with tracker.training(model, seed, data.dataset, parameters, device.type) as run:
        start = time.perf_counter()
        result = fit(
            classifier,
            data.train,
            data.val,
            loss,
            *targets,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            seed=seed,
            precision=precision,
            on_epoch=run.log_epoch,
            title=f"{model}/seed{seed}",
        )
        seconds = time.perf_counter() - start
        path = checkpoint_path(recipe.folder, seed)
        description = Description(
            model=model,
            architecture=recipe.architecture,
            arguments=recipe.arguments,
            dataset=data.dataset,
            seed=seed,
            parameters=parameters,
            history=result.history,
            best_epoch=result.best_epoch,
        )
        save_checkpoint(path, classifier, description)
        run.log_checkpoint(md5(path), result.best_epoch, seconds)
    best = result.history[result.best_epoch - 1]
    print(
        f"{model}/seed{seed}: validation accuracy {best.val_accuracy:.4f} after epoch {result.best_epoch}"
        f" of {recipe.epochs}; {seconds:.1f} s on {device.type}, {precision}",
        flush=True,
    )
