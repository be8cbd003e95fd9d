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
from pipeline.networks.description import Description, Epoch
from pipeline.networks.outside import read_teacher
from pipeline.training.cache import Entry, Record, open_entry, working_place

if TYPE_CHECKING:
    import torch

    from pipeline.data.prepared import TrainingData
    from pipeline.networks.architectures import Classifier
    from pipeline.training.loop import Progress

CODE = ("data", "networks", "training")  # the packages that decide a training's bytes
LARGEST_RKD = 512  # images of a batch: half a gigabyte of angles


@dataclass(frozen=True)
class Recipe:
    """What decides one training."""

    model: str  # the role, as in models/<track>/<model>
    architecture: str  # this and its arguments as in architectures.build
    arguments: dict[str, Any]
    settings: dict[str, Any]  # as in loop.Settings; precision may be "auto"
    seed: int  # of the first weights, the order of the images, their views and the choice of labels
    data: Path  # the folder of the prepared set
    device: str = "auto"  # as in inference.choose_device
    threads: int = 1  # that PyTorch computes with
    label_fraction: float = 1.0  # share of the training and validation images whose labels are used, 0-1
    label_smoothing: float = 0.0  # as in losses.hard_labels
    class_weights: str = "none"  # or balanced, as in labels.balanced
    augmentation: str = "none"  # a kind of views in augmentation.view_indices
    method: dict[str, Any] | None = None  # for a student with a teacher: the `name` in losses.METHODS and its parameters
    answers: str = "teacher"  # what such a student learns from, or a control in its place, as in answers.answers
    teachers: tuple[Path, ...] = ()  # checkpoints, or files of networks.outside; of several, the mean of their probabilities
    initial: str = ""  # of the prepared set's initial weights, those to start from, as in architectures.load_initial
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

    check_method(recipe)
    torch.set_num_threads(recipe.threads)
    device = choose_device(recipe.device, gpu)
    precision = choose_precision(recipe.settings["precision"], device)
    tiny = min(load_dataset(recipe.data).image_shape[:2]) <= 16
    if device.type == "cpu" and tiny and recipe.architecture not in ("simple_cnn", "compact_cnn"):
        precision = "fp32"  # oneDNN leaves part of a bf16 gradient unwritten where a 3x3 kernel of stride 2 sees one pixel
    recipe = replace(recipe, device=device.type, settings=recipe.settings | {"precision": precision})
    record = _new_record(recipe)
    with open_entry(root, record.digest, lambda: report(None)) as entry:
        if not entry.is_finished():
            with working_place(root, places) if places else contextlib.nullcontext():
                _carry_out(recipe, device, entry, record, report)
        report(entry.record)
        return entry.checkpoint


def check_method(recipe: Recipe) -> None:
    """Raises UserError if a student's method cannot be had on the recipe's data or of its teachers: what, and why."""
    method, dataset = recipe.method or {"name": ""}, load_dataset(recipe.data)
    name, standardized = method["name"], method.get("logit_standardization", False)
    two_classes, labelled = len(dataset.classes) == 2, recipe.label_fraction == 1 and not dataset.images.get("unlabelled")
    plain = method.get("divergence") == "forward" and not standardized
    single = len(recipe.teachers) < 2 and not any(path.suffix == ".npz" for path in recipe.teachers)
    for wrong, reason in (
        (dataset.folds and not single, "folds want a teacher of the student's own seed, neither an ensemble nor a file"),
        (name == "dkd" and two_classes, "dkd wants three classes or more: of two, it is dkd.alpha times kd"),
        (
            standardized and two_classes,
            "logit_standardization wants three classes or more: of two, it takes away how sure the teacher is",
        ),
        (name == "dkd" and not labelled, "dkd wants the label of every training image"),
        (name == "rkd" and not single, "rkd wants one network's embeddings, neither an ensemble's nor a file"),
        (name == "rkd" and recipe.settings["batch_size"] > LARGEST_RKD, f"rkd wants batches of at most {LARGEST_RKD} images"),
        (
            name == "rkd" and recipe.answers == "permuted" and not labelled,
            "rkd, permuted, wants the label of every training image",
        ),
        (
            name and recipe.answers in ("uniform", "hard") and not plain,
            "uniform and hard answers want kd, forward, unstandardized",
        ),
    ):
        if wrong:
            raise UserError(f"distill.method: {name}, distill.answers: {recipe.answers}, {dataset.name}: {reason}")


def _new_record(recipe: Recipe) -> Record:
    """The record before the first epoch, with the digest of everything that decides the training."""
    dataset = load_dataset(recipe.data)
    teachers, teachers_md5 = [read_teacher(path) for path in recipe.teachers], [md5(path) for path in recipe.teachers]
    parameters = (teachers[0].parameters if teachers else {}) | recipe.parameters | {"precision": recipe.settings["precision"]}
    initial = md5(initial_path(recipe)) if recipe.initial else None
    decisive = asdict(recipe) | {"data": dataset.model_dump(mode="json"), "parameters": parameters, "initial": initial}
    decisive |= {"code": code_digest(CODE), "torch": version("torch"), "teachers": teachers_md5}
    of_setting = decisive | {"seed": None, "teachers": sorted(teacher.setting for teacher in teachers)}
    described = {name: getattr(recipe, name) for name in ("model", "architecture", "arguments", "device", "seed")}
    described |= {"dataset": dataset, "parameters": parameters, "teachers_md5": teachers_md5}
    return Record(format=4, digest=_digest(decisive), setting=_digest(of_setting), epochs=recipe.settings["epochs"], **described)


def initial_path(recipe: Recipe) -> Path:
    """Where the weights lie that a training starts from, if its recipe names some."""
    return recipe.data / "initial" / f"{recipe.initial}.safetensors"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _carry_out(
    recipe: Recipe, device: "torch.device", entry: Entry, record: Record, report: Callable[[Record | None], None]
) -> None:
    """Train and leave checkpoint and record in `entry`."""
    from pipeline.data.labels import part
    from pipeline.data.prepared import load_training_data
    from pipeline.networks.checkpoints import save_checkpoint
    from pipeline.networks.inference import own_stream
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
    _machine_load()  # a thread's first call says nothing
    try:
        with own_stream(device):
            data = load_training_data(recipe.data, device, recipe.seed)
            val = part(data.val, recipe.label_fraction, recipe.seed)  # no more labels to select an epoch by than to train on
            classifier, epochs = _training(recipe, device, data._replace(val=val), progress)
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
    record.val_images = len(val.labels)
    record.chance = val.labels.bincount().max().item() / len(val.labels) if len(val.labels) else 0.0
    description = Description.model_validate(record.model_dump(include=set(Description.model_fields)))
    save_checkpoint(entry.checkpoint, classifier, description)
    entry.write(record.model_copy(update={"checkpoint_md5": md5(entry.checkpoint)}))


def _training(
    recipe: Recipe, device: "torch.device", data: "TrainingData", resume: "Progress | None"
) -> tuple["Classifier", Iterator["Progress"]]:
    """The model of a recipe with its first weights, and the training that will change them, epoch by epoch."""
    from pipeline.data.augmentation import check_augmentation, view, view_indices
    from pipeline.data.labels import UNKNOWN, balanced, hide_unknown, only_known
    from pipeline.data.streaming import fits, streamed
    from pipeline.networks.architectures import load_initial
    from pipeline.networks.checkpoints import load_initial_weights, new_classifier
    from pipeline.training.answers import answers, with_own_embeddings
    from pipeline.training.loop import Settings, fit, resident
    from pipeline.training.losses import METHODS, ON_EMBEDDINGS, hard_labels

    check_augmentation(recipe.augmentation, data.dataset.name)
    classifier = new_classifier(recipe.architecture, recipe.arguments, data.dataset, recipe.seed)
    load_initial(classifier.network, load_initial_weights(initial_path(recipe)) if recipe.initial else {})
    classifier.to(device)
    train, rows, targets, options = data.train, None, (), {}
    indices = view_indices(recipe.augmentation, *train.images.shape[1:3])
    if indices is not None:
        indices = indices.to(device)
        options = {"views": len(indices), "view": functools.partial(view, indices=indices)}
    partly_labelled = hide_unknown(train, recipe.label_fraction, recipe.seed)
    weights = balanced(partly_labelled.labels, len(data.dataset.classes)) if recipe.class_weights == "balanced" else None
    if recipe.method is None:
        rows = only_known(train.labels, recipe.label_fraction, recipe.seed)
        loss = hard_labels(recipe.label_smoothing, weights)
    else:
        train, share = partly_labelled, (partly_labelled.labels != UNKNOWN).float().mean().item()
        arguments = dict(recipe.method)
        method = METHODS[name := arguments.pop("name")](hard_labels(recipe.label_smoothing, weights, share), **arguments)
        loss = with_own_embeddings(method, classifier) if name in ON_EMBEDDINGS else method
        targets = (answers(recipe, device, train, indices, name in ON_EMBEDDINGS),)
    images = train.images
    on_device = images.device == device and (device.type != "cpu" or fits(images.nbytes, device))
    batches = resident if on_device else functools.partial(streamed, device=device)
    options |= {"rows": rows, "batches": batches, "resume": resume}
    return classifier, fit(classifier, train, data.val, loss, Settings(**recipe.settings), recipe.seed, *targets, **options)


def _machine_load() -> dict[str, float]:
    """Load of the processor since the last call and memory in use, in percent, under the names of MLflow's system metrics."""
    import psutil

    memory = psutil.virtual_memory().percent
    return {"system/cpu_utilization_percentage": psutil.cpu_percent(), "system/system_memory_usage_percentage": memory}
