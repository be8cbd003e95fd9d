"""One training as a value: everything that decides it, and how it is carried out, from fresh weights to a checkpoint.

Needs no PyTorch until it is carried out.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.core.provenance import code_digest
from pipeline.data.dataset import load_dataset
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
    """What decides one training."""

    model: str  # the role, as in models/<track>/<model>
    architecture: str  # this and its arguments as in architectures.build
    arguments: dict[str, Any]
    settings: dict[str, Any]  # as in loop.Settings; precision may be "auto"
    seed: int  # of the first weights, the order of the images and the choice of labels
    data: Path  # the folder of the prepared set
    device: str = "auto"  # as in inference.choose_device
    threads: int = 1  # that PyTorch computes with
    label_fraction: float = 1.0  # share of the training images whose labels are used, 0-1
    kd: dict[str, Any] | None = None  # for a student with a teacher: arguments of losses.distillation
    teacher: Path | None = None  # its checkpoint
    initial: Path | None = None  # weights to start from, as in architectures.load_initial
    parameters: dict[str, Any] = field(default_factory=dict)  # of params.yaml, by dotted name: for the record

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.model}/seed{self.seed}"


def train(recipe: Recipe, root: Path, report: Callable[[Record | None], None], places: int | None = None, gpu: int = 0) -> Path:
    """Carry out a training, or take it from `root` if it is there; the path of its checkpoint there.

    One that was interrupted resumes after its last finished epoch. `report` is called with the record at the start, after each
    epoch and at the end, and with None before another process, which is at the same training, is waited for. `places`: how many
    trainings may be at work in `root` at a time; None: any number. `gpu`: as `number` in choose_device.

    Raises UserError for a missing or damaged input, and for a loss that is not finite.
    """
    import torch

    from pipeline.networks.inference import choose_device, choose_precision

    torch.set_num_threads(recipe.threads)
    device = choose_device(recipe.device, gpu)
    precision = choose_precision(recipe.settings["precision"], device)
    if device.type == "cpu" and recipe.architecture == "resnet18" and min(load_dataset(recipe.data).image_shape[:2]) <= 16:
        precision = "fp32"  # oneDNN leaves part of a bf16 gradient unwritten where a 3x3 kernel of stride 2 sees one pixel
    recipe = replace(recipe, device=device.type, settings=recipe.settings | {"precision": precision})
    record = _new_record(recipe)
    with open_entry(root, record.digest, lambda: report(None)) as entry:
        if not entry.is_finished():
            with working_place(root, places) if places else contextlib.nullcontext():
                _carry_out(recipe, device, entry, record, report)
        report(entry.record)
        return entry.checkpoint


def _new_record(recipe: Recipe) -> Record:
    """The record before the first epoch, with the digest of everything that decides the training."""
    dataset = load_dataset(recipe.data)
    teacher = read_description(recipe.teacher) if recipe.teacher else None
    teacher_md5 = md5(recipe.teacher) if recipe.teacher else None
    parameters = (teacher.parameters if teacher else {}) | recipe.parameters | {"precision": recipe.settings["precision"]}
    initial = md5(recipe.initial) if recipe.initial else None
    decisive = asdict(recipe) | {"data": dataset.model_dump(mode="json"), "parameters": parameters, "initial": initial}
    decisive |= {"code": code_digest(CODE), "torch": version("torch"), "teacher": teacher_md5}
    of_setting = decisive | {"seed": None, "teacher": teacher.setting if teacher else None}
    described = {name: getattr(recipe, name) for name in ("model", "architecture", "arguments", "device", "seed")}
    described |= {"dataset": dataset, "parameters": parameters, "teacher_md5": teacher_md5}
    return Record(format=3, digest=_digest(decisive), setting=_digest(of_setting), epochs=recipe.settings["epochs"], **described)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _carry_out(
    recipe: Recipe, device: "torch.device", entry: Entry, record: Record, report: Callable[[Record | None], None]
) -> None:
    """Train and leave checkpoint and record in `entry`."""
    from pipeline.data.prepared import load_training_data
    from pipeline.networks.checkpoints import save_checkpoint
    from pipeline.training.loop import Epoch as LoopEpoch
    from pipeline.training.loop import Progress

    progress = None
    if saved := entry.load():
        record, state = saved
        progress = Progress([LoopEpoch(**epoch.model_dump()) for epoch in record.history], record.best_epoch, state)
    start, spent = time.time(), record.seconds or 0.0
    record.started = record.started or start
    entry.write(record)
    report(record)
    try:
        data = load_training_data(recipe.data, device)
        classifier, epochs = _training(recipe, device, data, progress)
        for progress in epochs:
            record.history.append(Epoch(**progress.history[-1]._asdict()))
            record.best_epoch = progress.best_epoch
            record.loads.append(_machine_load())
            record.seconds = spent + time.time() - start
            entry.save(record, progress.state)
            report(record)
    except (UserError, ArithmeticError) as error:
        record.failed = str(error)
        entry.write(record)
        report(record)
        raise UserError(record.failed) from error
    record.chance = data.val.labels.bincount().max().item() / len(data.val.labels)
    description = Description.model_validate(record.model_dump(include=set(Description.model_fields)))
    save_checkpoint(entry.checkpoint, classifier, description)
    entry.write(record.model_copy(update={"checkpoint_md5": md5(entry.checkpoint)}))


def _training(
    recipe: Recipe, device: "torch.device", data: "TrainingData", resume: "Progress | None"
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
        targets = (predict(teacher, data.train.images, recipe.settings["precision"]),)
        data = hide_unknown(data, recipe.label_fraction, recipe.seed)
    images = data.train.images
    on_device = images.device == device and (device.type != "cpu" or fits(images.nbytes, device))
    batches = resident if on_device else functools.partial(streamed, device=device)
    options = {"rows": rows, "batches": batches, "resume": resume}
    return classifier, fit(classifier, data.train, data.val, loss, Settings(**recipe.settings), recipe.seed, *targets, **options)


def _machine_load() -> dict[str, float]:
    """Load of the processor since the last call and memory in use, in percent, under the names of MLflow's system metrics."""
    import psutil

    memory = psutil.virtual_memory().percent
    return {"system/cpu_utilization_percentage": psutil.cpu_percent(), "system/system_memory_usage_percentage": memory}
