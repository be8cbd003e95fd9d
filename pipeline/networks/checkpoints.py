"""Save and load weights together with their description, in one safetensors file."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from pipeline.core.errors import UserError, user_error
from pipeline.core.files import write_atomic
from pipeline.data.dataset import Dataset
from pipeline.networks.architectures import Classifier, build, build_meta
from pipeline.networks.description import Description, read_description

_DRAWING = threading.Lock()  # from the process's generator


def new_classifier(architecture: str, arguments: dict[str, Any], dataset: Dataset, seed: int) -> Classifier:
    """A classifier for `dataset` whose random weights `seed` alone determines."""
    with _DRAWING:
        torch.manual_seed(seed)
        return Classifier(_network(build, architecture, arguments, dataset), dataset.mean, dataset.std)


def _network(new: Callable[..., nn.Module], architecture: str, arguments: dict[str, Any], dataset: Dataset) -> nn.Module:
    *size, channels = dataset.image_shape
    return new(architecture, **arguments | {"in_channels": channels, "image_size": size, "num_classes": len(dataset.classes)})


def save_checkpoint(path: Path, classifier: Classifier, description: Description) -> None:
    """Write weights and description to `path`, atomically. Equal input, equal bytes."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in classifier.network.state_dict().items()}
    # One metadata entry: safetensors does not keep the order of several.
    write_atomic(path, save(tensors, {"description": description.model_dump_json()}))


def load_checkpoint(path: Path, device: torch.device) -> tuple[Classifier, Description]:
    """Read a checkpoint, ready for inference on `device`.

    Raises UserError for a file that is missing, truncated or no checkpoint, and for weights that do not fit their description.
    """
    description = read_description(path)
    dataset = description.dataset
    errors = OSError, SafetensorError, KeyError, RuntimeError, UserError
    with user_error(f"{path}: damaged, or weights that do not fit their description", *errors):
        tensors = load_file(path)
        # Without memory, until the tensors in the file are known to be of these sizes.
        network = _network(build_meta, description.architecture, description.arguments, dataset)
        actual, expected = (
            {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} for state in (tensors, network.state_dict())
        )
        if wrong := min((name for name, _ in expected.items() ^ actual.items()), default=None):
            raise UserError(f"{wrong} is {actual.get(wrong, 'missing')}, described as {expected.get(wrong, 'absent')}")
        network.load_state_dict(tensors, assign=True)
    return Classifier(network, dataset.mean, dataset.std).to(device).eval(), description


def load_initial_weights(path: Path) -> dict[str, Tensor]:
    """What a training starts from instead of random weights, by name. Raises UserError if the file is missing or damaged."""
    with user_error(f"{path}: cannot be read", OSError, SafetensorError, KeyError):
        return load(path.read_bytes())
