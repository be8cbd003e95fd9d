"""The networks, and the classifier that wraps one so that it takes images as they are stored.

A network takes float32 images of shape (N, C, H, W) and returns logits of shape (N, num_classes).
"""

import difflib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import UserError, user_error
from pipeline.networks import onednn, torchvision_models

SIDES = (28, 32, 64, 96, 128, 224)  # of images, in pixels: what an error proposes instead


class Classifier(nn.Module):
    """A network with its input scaling: it sees (pixel / 255 - mean) / std."""

    def __init__(self, network: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (N, num_classes) for uint8 images of shape (N, H, W, C)."""
        # Stored channels last, seen as (N, C, H, W): no copy, and the layout that convolutions are fastest in.
        scaled = images.permute(0, 3, 1, 2).float().sub(255 * self.mean).div(255 * self.std)
        return self.network(scaled)


def _relu_pool(x: Tensor) -> Tensor:
    """ReLU and 2x2 max pool: the order makes no difference to the result, and this one has a quarter of the ReLUs to do."""
    return F.relu(F.max_pool2d(x, 2, 2))


class SimpleCNN(nn.Module):
    """Two padded convolutions, each with a pool, and two linear layers: the original course project's small baseline."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        height, width = image_size
        self.conv1 = onednn.Conv2d(in_channels, 32, 3, padding=1)
        self.conv2 = onednn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = _relu_pool(self.conv1(onednn.enter(x, self.conv1.out_channels)))
        x = onednn.leave(_relu_pool(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class CompactCNN(nn.Module):
    """Two unpadded convolutions, a pool, two linear layers: the original course project's teacher and, half as wide, student."""

    def __init__(self, width: int, hidden: int, in_channels: int, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        rows, columns = ((side - 4) // 2 for side in image_size)
        self.conv1 = onednn.Conv2d(in_channels, width, 3)
        self.conv2 = onednn.Conv2d(width, 2 * width, 3)
        self.fc1 = nn.Linear(2 * width * rows * columns, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(onednn.enter(x, self.conv1.out_channels)))
        x = onednn.leave(_relu_pool(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


RESNETS = ("resnet18", "resnet34", "resnet50")  # those with a choice of stem
ARCHITECTURES = {"simple_cnn": SimpleCNN, "compact_cnn": CompactCNN}
ARCHITECTURES |= {name: functools.partial(torchvision_models.resnet, name) for name in RESNETS}


def build(name: str, /, **arguments: object) -> nn.Module:
    """A network by its name, with weights drawn from torch's generator.

    The names are those in ARCHITECTURES and torchvision's other classifiers. All take `in_channels`, `image_size` (H, W) and
    `num_classes`; compact_cnn takes `width` and `hidden` too, those in RESNETS `stem`. Raises UserError for an unknown name and
    for bad arguments.
    """
    new = _builder(name)
    wrong = f"architecture {name} cannot be built from {arguments}"
    with user_error(wrong, TypeError, ValueError, ArithmeticError, AssertionError, LookupError, RuntimeError):
        return new(**arguments)


def build_meta(name: str, /, **arguments: object) -> nn.Module:
    """As `build`, on the meta device: without memory, whatever the arguments."""
    with torch.device("meta"), torchvision_models.TablesOnCPU():
        network = build(name, **arguments)
    return network.to("meta")


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    names = sorted({*ARCHITECTURES, *torchvision_models.classifier_names()})
    if name not in names:
        nearest = difflib.get_close_matches(name[:100], names, n=1, cutoff=0)
        raise UserError(f"unknown architecture {name[:100]!r}: the nearest of the {len(names)} known is {nearest[0]}")
    return functools.partial(torchvision_models.classifier, name)


def check_architecture(name: str, arguments: dict[str, Any], image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raises UserError if the network cannot be trained on images of `image_shape` (H, W, C). Computes with shapes alone."""
    height, width, channels = image_shape
    problem = _misfit(name, arguments, (height, width), channels, num_classes)
    if problem is None:
        return
    smallest = next((side for side in SIDES if _misfit(name, arguments, (side, side), channels, num_classes) is None), None)
    advice = f"; the smallest it takes, of those tried, are {smallest}x{smallest}" if smallest else ""
    raise UserError(f"architecture {name} cannot take images of {height}x{width}{advice}: {problem}")


def _misfit(name: str, arguments: dict[str, Any], image_size: tuple[int, int], channels: int, num_classes: int) -> str | None:
    """Why a training step's forward pass on such images fails; None if it does not."""
    shape = {"in_channels": channels, "image_size": image_size, "num_classes": num_classes}
    try:
        with warnings.catch_warnings(action="ignore"):  # of layers without weights, which the forward pass refuses
            network = build_meta(name, **arguments, **shape).train()
        network(torch.empty(2, channels, *image_size, device="meta"))
    except (UserError, RuntimeError, ValueError, AssertionError, ArithmeticError) as error:
        return str(error)
    return None


@torch.no_grad()
def load_initial(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put pretrained tensors in place of the random ones; what `tensors` does not name stays random.

    A first convolution for grey images gets the sum of the colour filters, which is what it would compute from the same grey in
    all three channels. One of another kernel size (the "cifar" stem) stays random. Raises UserError for a tensor of no use.
    """
    weights = model.state_dict()
    first = f"{torchvision_models.first_convolution(model)}.weight"
    for key, tensor in tensors.items():
        if key == first:
            if weights[key].shape[2:] != tensor.shape[2:]:
                continue
            if weights[key].shape[1] == 1:
                tensor = torchvision_models.grey_filters(tensor)
        expected = tuple(weights[key].shape) if key in weights else "absent"
        if expected != tuple(tensor.shape):
            raise UserError(f"initial weights do not fit the model: {key} is of shape {tuple(tensor.shape)}, there {expected}")
        weights[key].copy_(tensor)
