"""params.yaml as typed, validated objects, and the two tracks as one table."""

import functools
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import UserError
from pipeline.core.files import from_main_checkout, main_checkout, read_yaml

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("a seed is listed twice")
    return seeds


class Block(BaseModel):
    """A block of params.yaml: its keys are exactly these, their types exact."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Track(NamedTuple):
    """One question, and the models that answer it."""

    question: str  # the report's heading
    models: tuple[str, ...]  # as in models/<track>/<model>
    comparisons: tuple[tuple[str, str], ...]  # (model, other), trained with the same seeds; the question's own comes first
    teachers: dict[str, str]  # by student, the model that its fidelity is measured against
    report: str  # its file in metrics/, without the suffix
    original_dataset: str  # what the original course project ran it on


TRACKS = {
    "baselines": Track(
        question="Is ResNet18 worth more than SimpleCNN?",
        models=("simple_cnn", "resnet18"),
        comparisons=(("resnet18", "simple_cnn"),),
        teachers={},
        report="baselines_report",
        original_dataset="pathmnist",
    ),
    "distillation": Track(
        question="Is the distilled student better than the same student trained alone?",
        models=("teacher", "student_distilled", "student_alone"),
        comparisons=(("student_distilled", "student_alone"), ("teacher", "student_distilled"), ("teacher", "student_alone")),
        teachers={"student_distilled": "teacher", "student_alone": "teacher"},
        report="report",
        original_dataset="mnist",
    ),
}


class ResNet18(Block):
    stem: Literal["imagenet", "cifar"]


class Training(Block):
    dataset: Text
    size: Literal[28, 64, 128, 224]
    validation: Annotated[float, Field(gt=0, lt=0.5)]
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)]
    lr: Annotated[float, Field(gt=0, le=10)]


class Baselines(Training):
    pretrained: bool
    resnet18: ResNet18


class Distillation(Training):
    label_fraction: Annotated[float, Field(gt=0, le=1)]


class CompactCNN(Block):
    width: Annotated[int, Field(ge=1, le=4096)]
    hidden: Annotated[int, Field(ge=1, le=65_536)]


class KD(Block):
    temperature: Annotated[float, Field(gt=0, le=1000)]
    alpha: Annotated[float, Field(ge=0, le=1)]
    divergence: Literal["forward", "reverse"]


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
    teacher: CompactCNN
    student: CompactCNN
    kd: KD
    tracking: Tracking

    def training(self, track: Training) -> dict[str, Any]:
        """How a track's networks are trained: arguments of training.recipe.Recipe."""
        settings = {name: getattr(track, name) for name in ("epochs", "batch_size", "lr")} | {"precision": self.precision}
        return {"settings": settings, "device": self.device, "threads": self.threads}

    def flat(self, *keys: str) -> dict[str, Any]:
        """As `values`, for records that others see: a data set's file outside the checkout is named without its folder."""
        return {key: without_place(value) if key.endswith(".dataset") else value for key, value in self.values(*keys).items()}

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
    """A data set's name; of a path, the part in the checkout or, if it leads elsewhere, the file's name."""
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
