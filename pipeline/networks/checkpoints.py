"""Save and load weights together with their description, in one safetensors file."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.data.dataset import Dataset
from pipeline.networks.architectures import Classifier, build
from pipeline.networks.description import Description, parse_description


def new_classifier(architecture: str, arguments: dict[str, Any], dataset: Dataset, seed: int) -> Classifier:
    """A classifier for `dataset` whose random weights `seed` alone determines."""
    torch.manual_seed(seed)
    return Classifier(_network(architecture, arguments, dataset), dataset.mean, dataset.std)


def _network(architecture: str, arguments: dict[str, Any], dataset: Dataset) -> nn.Module:
    height, width, channels = dataset.image_shape
    shape = {"in_channels": channels, "image_size": (height, width), "num_classes": len(dataset.classes)}
    return build(architecture, **(arguments | shape))


def save_checkpoint(path: Path, classifier: Classifier, description: Description) -> None:
    """Write weights and description to `path`, atomically. Equal input, equal bytes."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    # One metadata entry: safetensors does not keep the order of several.
    write_atomic(path, save(tensors, {"description": description.model_dump_json()}))


def load_checkpoint(path: Path, device: torch.device) -> tuple[Classifier, Description]:
    """Read a checkpoint, ready for inference on `device`.

    Raises UserError for a file that is missing, truncated or no checkpoint, and for weights that do not fit their description.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            description = parse_description(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        dataset = description.dataset
        with torch.device("meta"):  # without memory, until the tensors in the file are known to be of these sizes
            network = _network(description.architecture, description.arguments, dataset)
        if (expected := _sizes(network.state_dict())) != (actual := _sizes(tensors)):
            name = min(name for name, _ in expected.items() ^ actual.items())
            raise UserError(f"{name} is {actual.get(name, 'missing')}, described as {expected.get(name, 'absent')}")
        network.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, KeyError, ValidationError, RuntimeError, UserError) as error:
        raise UserError(f"{path}: damaged, or weights that do not fit their description: {error}") from error
    return Classifier(network, dataset.mean, dataset.std).to(device).eval(), description


def _sizes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def load_initial_weights(path: Path) -> dict[str, Tensor]:
    """What a training starts from instead of random weights, by name. Raises UserError if the file is missing or damaged."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
