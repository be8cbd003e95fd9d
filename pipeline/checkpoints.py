"""Save and load weights together with their description, in one safetensors file."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.data.prepared import Dataset
from pipeline.errors import UserError
from pipeline.files import write_whole
from pipeline.models import Classifier, build


class Epoch(BaseModel):
    """One pass over the training images. Losses are means per image; accuracies are shares of the images, 0-1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_loss: float  # the loss that was minimised, while the weights were changing
    train_accuracy: float  # likewise
    val_loss: float  # cross-entropy after the epoch, whatever was minimised
    val_accuracy: float


class Description(BaseModel):
    """Everything about a checkpoint that its weights do not say. Equal trainings have equal descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2]  # of the file; without it, the inputs of a small network's fc1 lie in another order
    model: str  # the role: simple_cnn, resnet18, teacher, student_distilled, student_alone
    architecture: str  # a name in models.ARCHITECTURES
    arguments: dict[str, Any]  # of that architecture
    dataset: Dataset  # classes, input scaling and fingerprint among it
    seed: int
    parameters: dict[str, Any]  # of the training, by their key in params.yaml
    history: list[Epoch]
    best_epoch: Annotated[int, Field(ge=1)]  # 1-based; the weights are those after this epoch
    chance: Annotated[float, Field(ge=0, le=1)]  # validation accuracy of always naming the commonest class

    @model_validator(mode="after")
    def _has_its_best_epoch(self) -> Self:
        if self.best_epoch > len(self.history):
            raise ValueError(f"best_epoch {self.best_epoch} of {len(self.history)}")
        return self

    def best(self) -> tuple[float, float]:
        """How good the weights are on the validation images, to compare with others': accuracy, then minus the loss."""
        epoch = self.history[self.best_epoch - 1]
        return epoch.val_accuracy, -epoch.val_loss


def new_classifier(architecture: str, arguments: dict[str, Any], dataset: Dataset, seed: int) -> Classifier:
    """A classifier for `dataset` whose random weights `seed` alone determines."""
    torch.manual_seed(seed)
    return Classifier(_network(architecture, arguments, dataset), dataset.mean, dataset.std)


def _network(architecture: str, arguments: dict[str, Any], dataset: Dataset) -> nn.Module:
    height, width, channels = dataset.image_shape
    shape = {"in_channels": channels, "image_size": (height, width), "num_classes": len(dataset.classes)}
    return build(architecture, **(arguments | shape))


def save_checkpoint(path: Path, classifier: Classifier, description: Description) -> None:
    """Write weights and description to `path`: the whole file or, when that fails, none. Equal input, equal bytes."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    # One metadata entry: safetensors does not keep the order of several.
    write_whole(path, save(tensors, {"description": description.model_dump_json()}))


def load_checkpoint(path: Path, device: torch.device) -> tuple[Classifier, Description]:
    """Read a checkpoint, ready for inference on `device`.

    Raises UserError for a file that is missing, truncated or no checkpoint, and for weights that do not fit their description.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if "description" not in metadata:
                raise UserError("no checkpoint of this project: its description is missing")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        description = Description.model_validate_json(metadata["description"])
        dataset = description.dataset
        with torch.device("meta"):  # without memory, until the tensors in the file are known to be of these sizes
            network = _network(description.architecture, description.arguments, dataset)
        if (described := _sizes(network.state_dict())) != (found := _sizes(tensors)):
            name = min(name for name, _ in described.items() ^ found.items())
            raise UserError(f"{name} is {found.get(name, 'missing')}, described as {described.get(name, 'absent')}")
        network.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, KeyError, ValidationError, RuntimeError, UserError) as error:
        raise UserError(f"{path}: damaged, or weights that do not fit their description: {error}") from error
    return Classifier(network, dataset.mean, dataset.std).to(device).eval(), description


def _sizes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of one model, by seed. Raises UserError if there are none."""
    numbered = [path for path in folder.glob("seed*.safetensors") if path.stem.removeprefix("seed").isdecimal()]
    paths = sorted(numbered, key=lambda path: int(path.stem.removeprefix("seed")))
    if not paths:
        raise UserError(f"{folder}: no checkpoints: run the stage that trains this model first (dvc repro)")
    return paths


def checkpoint_path(folder: Path, seed: int) -> Path:
    """Where the checkpoint of one seed lies."""
    return folder / f"seed{seed}.safetensors"
