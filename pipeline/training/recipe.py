"""One training from fresh weights to a checkpoint with an MLflow run: what every training stage does for each seed."""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from pipeline import processes
from pipeline.networks.description import Description, Epoch, checkpoint_path
from pipeline.networks.checkpoints import new_classifier, save_checkpoint
from pipeline.data.prepared import TrainingData
from pipeline.core.files import md5
from pipeline.networks.inference import choose_precision
from pipeline.networks.architectures import load_initial
from pipeline.params import Params
from pipeline.training.cache import Progress, Unfinished
from pipeline.tracking.mirror import Tracker
from pipeline.training.loop import Fit, State, fit


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
    micro_batches: int
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
        micro_batches=params.micro_batches,
        parameters=params.flat("distillation", network, *recorded),
    )


class Records(NamedTuple):
    """Where a stage's trainings are recorded."""

    tracker: Tracker
    progress: Progress


@contextlib.contextmanager
def records(experiment: str) -> Iterator[Records | None]:
    """The records of a stage; of several processes that train together, the first alone has them."""
    if processes.rank() > 0:
        yield None
        return
    tracker = Tracker(experiment)
    with Progress() as progress:
        yield Records(tracker, progress)


def train(
    recipe: Recipe,
    data: TrainingData,
    seed: int,
    records: Records | None,
    *,
    loss: Callable[..., Tensor] = F.cross_entropy,
    targets: tuple[Tensor, ...] = (),
    rows: Tensor | None = None,
    initial: dict[str, Tensor] | None = None,
) -> None:
    """Train one seed and write its checkpoint, `seed<seed>.safetensors` in the recipe's folder.

    A training that was killed goes on after its last finished epoch, in its MLflow run. A process without `records` helps
    another that has them. `loss`, `targets` and `rows` as in training.fit, `initial` as in models.load_initial.
    """
    model = recipe.folder.name
    device = data.train.labels.device
    precision = choose_precision(recipe.precision, device)
    if device.type == "cpu" and recipe.architecture == "resnet18" and min(data.dataset.image_shape[:2]) <= 16:
        # In bf16, oneDNN leaves part of a gradient unwritten where a 3x3 convolution of stride 2 sees a single pixel.
        precision = "fp32"
    parameters = recipe.parameters | {"precision": precision}
    classifier = new_classifier(recipe.architecture, recipe.arguments, data.dataset, seed)
    load_initial(classifier.network, initial or {})
    classifier.to(device)
    title = f"{model}/seed{seed}"

    def fitted(resume: State | None, on_epoch: Callable[[State], None] | None = None) -> Fit:
        return fit(
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
            micro_batches=recipe.micro_batches,
            rows=rows,
            on_epoch=on_epoch,
            resume=processes.from_first(resume),
            title=title,
        )

    if not records:
        fitted(None)
        return
    identity = parameters | {
        "model": model,
        "architecture": recipe.architecture,
        "arguments": recipe.arguments,
        "data": data.dataset.fingerprint,
        "seed": seed,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "micro_batches": recipe.micro_batches,
        "initial": hashlib.sha256(save(initial or {})).hexdigest(),
    }
    with records.progress.of(identity) as file:
        before = file.load() if file else None
        facts = before.facts if before else {"history": [], "best_epoch": 0, "seconds": 0.0, "run": uuid.uuid4().hex}
        if file and not before:  # killed in its first epoch, it goes on in the same MLflow run all the same
            file.save(Unfinished({}, facts))
        done = [Epoch(**epoch) for epoch in facts["history"]]
        how = {"device": device.type, "processes": processes.count(), "micro_batches": recipe.micro_batches}
        tags = {key: str(value) for key, value in how.items()}
        with records.tracker.training(model, seed, data.dataset, parameters, tags, facts["run"], done) as run:
            start = time.perf_counter() - facts["seconds"]

            def keep(state: State) -> None:
                if file:
                    facts = {
                        "history": [dict(epoch) for epoch in state.history],
                        "best_epoch": state.best_epoch,
                        "seconds": time.perf_counter() - start,
                        "run": run.key,
                    }
                    file.save(Unfinished(state.tensors, facts))
                run.log_epoch(len(state.history), state.history[-1])

            result = fitted(State(done, facts["best_epoch"], before.tensors) if done else None, keep)
            seconds = time.perf_counter() - start
            path = checkpoint_path(recipe.folder, seed)
            description = Description(
                format=2,
                model=model,
                architecture=recipe.architecture,
                arguments=recipe.arguments,
                dataset=data.dataset,
                seed=seed,
                parameters=parameters,
                history=result.history,
                best_epoch=result.best_epoch,
                chance=data.val.labels.bincount().max().item() / len(data.val.labels),
            )
            save_checkpoint(path, classifier, description)
            run.log_checkpoint(md5(path), result.best_epoch, seconds)
    best = result.history[result.best_epoch - 1]
    together = f", {processes.count()} processes" if processes.count() > 1 else ""
    print(
        f"{title}: validation accuracy {best.val_accuracy:.4f} after epoch {result.best_epoch}"
        f" of {recipe.epochs}; {seconds:.1f} s on {device.type}, {precision}{together}",
        flush=True,
    )
