"""One training as a value: everything that decides it, and how it is carried out, from fresh weights to a checkpoint.

Needs no PyTorch until it is carried out.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.core.provenance import code_digest
from pipeline.data.dataset import Dataset, load_dataset
from pipeline.networks.description import Description, Epoch, read_description
from pipeline.training.cache import Entry, Record, open_entry, working_place

if TYPE_CHECKING:
    import torch

    from pipeline.data.prepared import TrainingData
    from pipeline.networks.architectures import Classifier
    from pipeline.training.loop import Progress

CODE = ("data", "networks", "training")  # the packages that decide a training's bytes


@dataclass(frozen=True)
class Recipe:
    """What decides one training.

    Attributes
    ----------
    model : str
        The role, as in models/<track>/<model>.
    architecture, arguments
        As in architectures.build.
    settings : dict
        As in loop.Settings; precision may be "auto".
    seed : int
        Of the first weights, the order of the images and the choice of labels.
    data : Path
        The folder of the prepared set.
    device, threads
        "auto", "cpu", "cuda" or "mps", and how many threads PyTorch computes with.
    label_fraction : float
        Share of the training images whose labels are used, 0-1.
    kd : dict, optional
        Arguments of losses.distillation, for a student with a teacher.
    teacher : Path, optional
        The teacher's checkpoint.
    initial : Path, optional
        Weights to start from, as in architectures.load_initial.
    parameters : dict
        Of params.yaml, by dotted name, those that the result depends on: for the record.
    """

    model: str
    architecture: str
    arguments: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    data: Path
    device: str = "auto"
    threads: int = 1
    label_fraction: float = 1.0
    kd: dict[str, Any] | None = None
    teacher: Path | None = None
    initial: Path | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.model}/seed{self.seed}"


def train(
    recipe: Recipe,
    root: Path,
    report: Callable[[Record], None],
    waiting: Callable[[], None] = lambda: None,
    cores: int | None = None,
    gpu: int = 0,
) -> Path:
    """Carry out a training, or take it from `root` if it is there; the path of its checkpoint there.

    One that was interrupted resumes after its last finished epoch; one that another process is at is waited for, after a call
    of `waiting`. `report` is called with the record at the start, after each epoch and at the end. `cores`: how many trainings
    of this checkout may be at work at a time, unless None. `gpu` as `number` in choose_device.

    Raises UserError for a missing or damaged input, and for a loss that is not finite.
    """
    import torch

    from pipeline.networks.inference import choose_device, choose_precision

    torch.set_num_threads(recipe.threads)
    device = choose_device(recipe.device, gpu)
    dataset = load_dataset(recipe.data)
    settings = recipe.settings | {"precision": choose_precision(recipe.settings["precision"], device)}
    if device.type == "cpu" and recipe.architecture == "resnet18" and min(dataset.image_shape[:2]) <= 16:
        # In bf16, oneDNN leaves part of a gradient unwritten where a 3x3 convolution of stride 2 sees a single pixel.
        settings["precision"] = "fp32"
    record = _new_record(recipe, settings, dataset, device.type)
    with open_entry(root, record.key, waiting) as entry:
        if not entry.is_finished():
            if cores is None:
                _carry_out(recipe, settings, device, entry, record, report)
            else:
                with working_place(root, cores):
                    _carry_out(recipe, settings, device, entry, record, report)
        report(entry.record)
        return entry.checkpoint


def _new_record(recipe: Recipe, settings: dict[str, Any], dataset: Dataset, device: str) -> Record:
    """The record before the first epoch, with the digest of everything that decides the training."""
    teacher = read_description(recipe.teacher) if recipe.teacher else None
    parameters = (teacher.parameters if teacher else {}) | recipe.parameters | {"precision": settings["precision"]}
    decisive = {
        "model": recipe.model,
        "architecture": recipe.architecture,
        "arguments": recipe.arguments,
        "settings": settings,
        "data": dataset.model_dump(mode="json"),
        "threads": recipe.threads,
        "label_fraction": recipe.label_fraction,
        "kd": recipe.kd,
        "initial": md5(recipe.initial) if recipe.initial else None,
        "parameters": parameters,
        "device": device,
        "code": code_digest(CODE),
        "torch": version("torch"),
    }
    teacher_md5 = md5(recipe.teacher) if recipe.teacher else None
    return Record(
        key=_digest(decisive | {"teacher": teacher_md5, "seed": recipe.seed}),
        setting=_digest(decisive | {"teacher": teacher.setting if teacher else None}),
        model=recipe.model,
        architecture=recipe.architecture,
        arguments=recipe.arguments,
        dataset=dataset,
        seed=recipe.seed,
        parameters=parameters,
        teacher_md5=teacher_md5,
        device=device,
        epochs=settings["epochs"],
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _carry_out(
    recipe: Recipe,
    settings: dict[str, Any],
    device: "torch.device",
    entry: Entry,
    record: Record,
    report: Callable[[Record], None],
) -> None:
    """Train and leave checkpoint and record in `entry`."""
    from pipeline.data.prepared import load_training_data
    from pipeline.networks.checkpoints import save_checkpoint
    from pipeline.training.loop import Epoch as LoopEpoch
    from pipeline.training.loop import Progress

    progress = None
    if state := entry.load():
        record = Record.model_validate_json(state.pop("record"))
        progress = Progress([LoopEpoch(**epoch.model_dump()) for epoch in record.history], record.best_epoch, state)
    start = time.time()
    spent, record.started = record.seconds or 0.0, record.started or start
    entry.write(record)
    report(record)
    try:
        data = load_training_data(recipe.data, device)
        classifier, epochs = _training(recipe, settings, device, data, progress)
        for progress in epochs:
            record.history.append(Epoch(**progress.history[-1]._asdict()))
            record.best_epoch = progress.best_epoch
            record.loads.append(_machine_load(device))
            record.seconds = spent + time.time() - start
            entry.save(record, progress.state | {"record": record.model_dump_json()})
            report(record)
    except (UserError, ArithmeticError) as error:
        record.failed = str(error)
        entry.write(record)
        report(record)
        raise UserError(record.failed) from error
    shared = {name: getattr(record, name) for name in Description.model_fields if name in Record.model_fields}
    chance = data.val.labels.bincount().max().item() / len(data.val.labels)
    save_checkpoint(entry.checkpoint, classifier, Description(format=3, digest=record.key, chance=chance, **shared))
    entry.finish(record)


def _training(
    recipe: Recipe, settings: dict[str, Any], device: "torch.device", data: "TrainingData", resume: "Progress | None"
) -> tuple["Classifier", Iterator["Progress"]]:
    """The model of a recipe with its first weights, and the training that will change them, epoch by epoch."""
    from pipeline.data.labels import hide_unknown, only_known
    from pipeline.data.streaming import fits, streamed
    from pipeline.networks.architectures import load_initial
    from pipeline.networks.checkpoints import load_checkpoint, load_initial_weights, new_classifier
    from pipeline.networks.inference import predict
    from pipeline.training.loop import Settings, fit, resident
    from pipeline.training.losses import distillation, hard_labels

    classifier = new_classifier(recipe.architecture, recipe.arguments, data.dataset, recipe.seed)
    load_initial(classifier.network, load_initial_weights(recipe.initial) if recipe.initial else {})
    classifier.to(device)
    loss, targets, rows = hard_labels(), (), None
    if recipe.kd is None:
        rows = only_known(data.train.labels, recipe.label_fraction, recipe.seed)
    else:  # the teacher does not change: its logits are computed once
        loss = distillation(**recipe.kd)
        teacher, _ = load_checkpoint(recipe.teacher, device)
        targets = (predict(teacher, data.train.images, settings["precision"]),)
        data = hide_unknown(data, recipe.label_fraction, recipe.seed)
    images = data.train.images
    on_device = images.device == device and (device.type != "cpu" or fits(images.nbytes, device))
    batches = resident if on_device else functools.partial(streamed, device=device)
    options = {"rows": rows, "batches": batches, "resume": resume}
    return classifier, fit(classifier, data.train, data.val, loss, Settings(**settings), recipe.seed, *targets, **options)


def _machine_load(device: "torch.device") -> dict[str, float]:
    """Load of the processor since the last call and memory in use, under the names of MLflow's system metrics."""
    import psutil

    load = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
    }
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        load["system/gpu_0_memory_usage_percentage"] = 100 * (1 - free / total)
    return load
