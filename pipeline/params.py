"""params.yaml as typed, validated objects, and the two tracks as one table."""

import functools
import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import UserError
from pipeline.core.files import from_main_checkout, main_checkout, read_yaml
from pipeline.networks.names import architecture_arguments

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
Smoothing = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(gt=0, le=1000)]
Weight = Annotated[float, Field(ge=0, le=1000)]
SETTINGS = ("epochs", "batch_size", "lr", "schedule", "weight_decay", "selection")  # of a track, as in training.loop.Settings
OWN_FILES = (".dataset", "teacher.logits", "teacher.features")  # ends of the names of parameters that may be paths
OF_RESNET18 = ("baselines.pretrained", "baselines.resnet18.stem")


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("a seed is listed twice")
    return seeds


class Block(BaseModel):
    """A block of params.yaml: its keys are exactly these, their types exact."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Track(NamedTuple):
    """One question, and the models that answer it: a big network, a small one that learns from it, the same small one alone."""

    teacher: str  # each as in models/<track>/<model>
    distilled: str
    alone: str
    report: str  # its file in metrics/, without the suffix
    original_dataset: str  # what the original course project ran it on

    @property
    def question(self) -> str:
        """The report's heading."""
        return f"Is {self.distilled} better than {self.alone}?"

    @property
    def models(self) -> tuple[str, ...]:
        """All of them."""
        return self.teacher, self.distilled, self.alone

    @property
    def comparisons(self) -> tuple[tuple[str, str], ...]:
        """(model, other), trained with the same seeds; the question's own comes first."""
        return (self.distilled, self.alone), (self.teacher, self.distilled), (self.teacher, self.alone)

    @property
    def teachers(self) -> dict[str, str]:
        """By student, the model that its fidelity is measured against."""
        return dict.fromkeys((self.distilled, self.alone), self.teacher)


TRACKS = {
    "baselines": Track("resnet18", "simple_cnn_distilled", "simple_cnn", "baselines_report", "pathmnist"),
    "distillation": Track("teacher", "student_distilled", "student_alone", "report", "mnist"),
}


class ResNet18(Block):
    stem: Literal["imagenet", "cifar"]


class Training(Block):
    """A track: its data, and how its networks are trained."""

    dataset: Text
    size: Literal[28, 64, 128, 224]
    validation: Annotated[float, Field(ge=0, lt=0.5)]
    folds: Annotated[int, Field(ge=3, le=20)] | None
    label_fraction: Annotated[float, Field(gt=0, le=1)]
    epochs: Epochs
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)]
    lr: Annotated[float, Field(gt=0, le=10)]
    schedule: Literal["constant", "cosine", "one_cycle", "steps"]
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    label_smoothing: Smoothing
    class_weights: Literal["none", "balanced"]
    augmentation: Literal["none", "shifts", "flips_and_shifts"]
    selection: Literal["accuracy", "auc", "loss", "last"]
    teacher_epochs: Epochs | None
    alone_epochs: Epochs | None
    teacher_label_smoothing: Smoothing | None

    @model_validator(mode="after")
    def _can_select(self) -> "Training":
        if self.validation == 0 and self.selection != "last":
            raise ValueError(f"validation: 0 wants selection: last, not {self.selection}")
        return self


class Baselines(Training):
    pretrained: bool
    resnet18: ResNet18


class Distillation(Training):
    pass


class Network(Block):
    """A network of the distillation track, by its name; of the options, those count that it takes."""

    architecture: Text
    width: Annotated[int, Field(ge=1, le=4096)]
    hidden: Annotated[int, Field(ge=1, le=65_536)]
    stem: Literal["imagenet", "cifar"]
    pretrained: bool


class Teacher(Network):
    logits: Text | None
    features: Text | None

    @property
    def file(self) -> Path | None:
        """The file of a teacher from outside, absolute; None where a network is the teacher."""
        name = self.logits or self.features
        return from_main_checkout(name) if name else None

    @model_validator(mode="after")
    def _has_one_source(self) -> "Teacher":
        if self.logits and self.features:
            raise ValueError("logits or features: one of them is wanted, the other is null")
        return self


class Distill(Block):
    """What the distilled students of both tracks learn from, and by which method: its parameters are the block of its name."""

    method: Literal["kd", "dkd", "dist", "wttm", "rkd"]
    ensemble: bool
    answers: Literal["teacher", "permuted", "uniform", "hard"]


class KD(Block):
    temperature: Temperature
    alpha: Annotated[float, Field(ge=0, le=1)]
    divergence: Literal["forward", "reverse"]
    logit_standardization: bool


class DKD(Block):
    weight: Weight
    alpha: Weight
    beta: Weight
    temperature: Temperature
    warm_up: Annotated[float, Field(ge=0, le=1)]
    logit_standardization: bool


class DIST(Block):
    weight: Weight
    beta: Weight
    gamma: Weight
    temperature: Temperature


class WTTM(Block):
    weight: Weight
    beta: Weight
    gamma: Annotated[float, Field(gt=0, le=1)]


class RKD(Block):
    weight: Weight
    distance: Weight
    angle: Weight


class Verdicts(Block):
    primary: Literal["accuracy", "auc", "balanced_accuracy", "nll"]
    margin: Annotated[float, Field(ge=0, le=1)]


class Tracking(Block):
    experiment: Text


class Params(Block):
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["auto", "fp32", "bf16"]
    threads: Annotated[int, Field(ge=1, le=1024)]
    jobs: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]
    baselines: Baselines
    distillation: Distillation
    teacher: Teacher
    student: Network
    distill: Distill
    kd: KD
    dkd: DKD
    dist: DIST
    wttm: WTTM
    rkd: RKD
    evaluation: Verdicts
    tracking: Tracking

    @model_validator(mode="after")
    def _seeds_fill_folds(self) -> "Params":
        for track in TRACKS:
            if folds := getattr(self, track).folds:
                if getattr(self, track).label_fraction < 1:
                    raise ValueError(f"{track}.folds wants label_fraction: 1, the labels of all training images")
                numbers = Counter(seed % folds for seed in self.seeds)
                if len(numbers) < folds or len(set(numbers.values())) > 1:
                    wanted = f"as many of each fold, such as {list(range(folds))}: seed s is tested on fold s mod {folds}"
                    raise ValueError(f"{track}.folds = {folds} wants seeds, {wanted}")
        return self

    def network(self, track: str, model: str) -> tuple[str, dict[str, Any]]:
        """The architecture of a track's model and its arguments, as in networks.architectures.build. Raises UserError."""
        big = model == TRACKS[track].teacher
        if track == "baselines":
            return ("resnet18", self.baselines.resnet18.model_dump()) if big else ("simple_cnn", {})
        block = self.teacher if big else self.student
        return block.architecture, architecture_arguments(block.architecture, block.model_dump())

    def pretrained(self, track: str) -> dict[str, str | None]:
        """Of which architecture torchvision's weights are that a track's teacher and student start from; None: of none."""
        if track == "baselines":
            return {"teacher": "resnet18" if self.baselines.pretrained else None, "student": None}
        blocks = {"teacher": self.teacher, "student": self.student}
        return {name: block.architecture if block.pretrained else None for name, block in blocks.items()}

    def training(self, track: str, model: str) -> dict[str, Any]:
        """How a track's model is trained: arguments of training.recipe.Recipe, all but seed, data and teacher's checkpoints."""
        block, plan = getattr(self, track), TRACKS[track]
        big, distilled = model == plan.teacher, model == plan.distilled
        architecture, arguments = self.network(track, model)
        settings = {name: getattr(block, name) for name in SETTINGS} | {"precision": self.precision}
        smoothing = block.label_smoothing
        if model == plan.alone:
            settings["epochs"] = block.alone_epochs or block.epochs
        if big:
            settings["epochs"] = block.teacher_epochs or block.epochs
            smoothing = smoothing if block.teacher_label_smoothing is None else block.teacher_label_smoothing
        keys = [track]
        if track == "distillation":
            keys.append("teacher" if big else "student")
        if distilled:
            keys += ["distill", self.distill.method]
        of_teacher = {f"{track}.teacher_epochs", f"{track}.teacher_label_smoothing", *OF_RESNET18}
        of_others = (set() if big else of_teacher) | (set() if model == plan.alone else {f"{track}.alone_epochs"})
        of_method = self.method() if distilled else {}
        return of_method | {
            "model": model,
            "architecture": architecture,
            "arguments": arguments,
            "settings": settings,
            "label_smoothing": smoothing,
            "class_weights": block.class_weights,
            "augmentation": block.augmentation,
            "label_fraction": block.label_fraction,
            "initial": "teacher" if big else "student",
            "device": self.device,
            "threads": self.threads,
            "parameters": {name: value for name, value in self.flat(*keys).items() if name not in of_others},
        }

    def method(self) -> dict[str, Any]:
        """What distilled students learn from and by which method: arguments of training.recipe.Recipe."""
        name = self.distill.method
        return {"method": {"name": name} | getattr(self, name).model_dump(), "answers": self.distill.answers}

    def flat(self, *keys: str) -> dict[str, Any]:
        """As `values`, for records that others see: a file of the user's outside the checkout is named without its folder."""
        values = self.values(*keys)
        return {key: without_place(value) if value and key.endswith(OWN_FILES) else value for key, value in values.items()}

    def values(self, *keys: str) -> dict[str, Any]:
        """The values under `keys`, dotted names of parameters or whole blocks, each by its full dotted name."""
        values = {}
        for key in keys:
            value = functools.reduce(getattr, key.split("."), self)
            if isinstance(value, Block):
                values |= self.values(*(f"{key}.{name}" for name in type(value).model_fields))
            else:
                values[key] = value
        return values


def without_place(dataset: str) -> str:
    """The name of a data set or teacher; of a path, the part in the checkout or, if it leads elsewhere, the file's name."""
    if "/" not in dataset:
        return dataset
    path = from_main_checkout(dataset)
    return str(path.relative_to(main_checkout())) if path.is_relative_to(main_checkout()) else path.name


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check the parameters.

    Raises UserError, in one line, for a file that is missing or no YAML, and for every unknown or missing key, wrong
    type and value out of range in it: the key, the value and what is allowed.
    """
    content = read_yaml(Path(path))
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_describe(problem) for problem in error.errors())) from error


def _describe(problem: dict) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    match problem["type"]:
        case "extra_forbidden":
            return f"{key} = {shown(problem['input'])} is not a parameter (allowed: {', '.join(_siblings(problem['loc']))})"
        case "missing":
            return f"{key} is missing"
        case _:
            return f"{key} = {shown(problem['input'])}: {problem['msg']}"


def shown(value: object) -> str:
    """A value for a message, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write whole numbers of over 4300 digits
        return "a very large number"


def _siblings(loc: tuple) -> list[str]:
    block = Params
    for part in loc[:-1]:
        block = block.model_fields[part].annotation
    return list(block.model_fields)
