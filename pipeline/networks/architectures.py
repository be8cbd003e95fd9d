"""The networks, and the classifier that wraps one so that it takes images as they are stored.

A network takes float32 images of shape (N, C, H, W) and returns logits of shape (N, num_classes).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import UserError, user_error
from pipeline.networks import onednn


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


def resnet18(stem: str, in_channels: int, image_size: tuple[int, int], num_classes: int) -> nn.Module:
    """torchvision's ResNet18 for images of any size.

    `stem` "imagenet" is torchvision's (7x7, stride 2, then a pool); "cifar" is a 3x3 convolution of stride 1 and no pool, as
    in MedMNIST's benchmark (Yang et al. 2023), which keeps 28x28 images from shrinking to 1x1 before the last block.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    model = torchvision_resnet18(num_classes=num_classes)
    kernel = {"kernel_size": 7, "stride": 2, "padding": 3} if stem == "imagenet" else {"kernel_size": 3, "padding": 1}
    model.conv1 = nn.Conv2d(in_channels, 64, bias=False, **kernel)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    if stem == "cifar":
        model.maxpool = nn.Identity()
    return model


ARCHITECTURES = {"simple_cnn": SimpleCNN, "resnet18": resnet18, "compact_cnn": CompactCNN}


def build(name: str, /, **arguments: object) -> nn.Module:
    """A network by its name in ARCHITECTURES, with weights drawn from torch's generator. Raises UserError for bad arguments."""
    if name not in ARCHITECTURES:
        raise UserError(f"unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    wrong = f"architecture {name} cannot be built from {arguments}"
    with user_error(wrong, TypeError, ValueError, ArithmeticError, RuntimeError):
        return ARCHITECTURES[name](**arguments)


@torch.no_grad()
def load_initial(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put pretrained tensors in place of the random ones; what `tensors` does not name stays random.

    A first convolution for grey images gets the sum of the colour filters, which is what it would compute from the same grey in
    all three channels. One of another kernel size (the "cifar" stem) stays random. Raises UserError for a tensor of no use.
    """
    weights = model.state_dict()
    for key, tensor in tensors.items():
        if key == "conv1.weight" and key in weights:
            if weights[key].shape[2:] != tensor.shape[2:]:
                continue
            if weights[key].shape[1] == 1:
                tensor = tensor.sum(dim=1, keepdim=True)
        if key not in weights or weights[key].shape != tensor.shape:
            raise UserError(f"initial weights do not fit the model: {key} of shape {tuple(tensor.shape)}")
        weights[key].copy_(tensor)
