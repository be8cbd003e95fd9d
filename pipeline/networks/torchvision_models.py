"""torchvision's image classifiers, for grey images too and for any number of classes.

torchvision is imported where it is used: the project's own networks do without it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STEMS = {"imagenet": {"kernel_size": 7, "stride": 2, "padding": 3}, "cifar": {"kernel_size": 3, "padding": 1}}


def classifier_names() -> list[str]:
    """The classifiers in torchvision's registry: those directly in torchvision.models, where detection, video, ... are not."""
    from torchvision import models

    return models.list_models(module=models)


def classifier(name: str, /, in_channels: int, image_size: tuple[int, int], num_classes: int) -> nn.Module:
    """The classifier `name` of torchvision's registry with random weights. Raises ValueError unless `in_channels` is 1 or 3."""
    from torchvision.models import get_model

    options = {}
    if name.startswith("vit_"):
        options["image_size"] = image_size[0]  # its position embedding depends on it
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}  # without the second loss; torchvision's own first weights
    model = get_model(name, num_classes=num_classes, **options)
    if in_channels == 1:
        conv = model.get_submodule(first_convolution(model))
        conv.in_channels, conv.weight = 1, nn.Parameter(grey_filters(conv.weight.detach()))
    elif in_channels != 3:
        raise ValueError(f"it takes images of 1 or 3 channels, not {in_channels}")
    return model


def resnet(name: str, /, stem: str, in_channels: int, image_size: tuple[int, int], num_classes: int) -> nn.Module:
    """torchvision's ResNet `name` (resnet18, resnet34, ...) for images of any size and number of channels.

    `stem` "imagenet" is torchvision's (7x7, stride 2, then a pool); "cifar" is a 3x3 convolution of stride 1 and no pool, as
    in MedMNIST's benchmark (Yang et al. 2023), which keeps 28x28 images from shrinking to 1x1 before the last block.
    """
    from torchvision.models import get_model

    model = get_model(name, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, bias=False, **STEMS[stem])
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    if stem == "cifar":
        model.maxpool = nn.Identity()
    for module in [*model.modules()]:
        for key, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and child.bias is None:
                setattr(module, key, _Conv3x3(child))
    return model


class _Conv3x3(nn.Conv2d):
    """`conv`, 3x3, padded by one and without bias, but where it makes a single pixel it trains as a linear layer.

    The taps that then meet padding alone are left out: their gradient is zero. That is so in the last block, on 28x28 images
    with the imagenet stem: a training step of ResNet18 takes two thirds of the time (bfloat16, one thread).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False, device="meta")
        self.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `x` (N, C, H, W)."""
        height, width = x.shape[2:]
        if not self.training or height > self.stride[0] or width > self.stride[1]:
            return super().forward(x)
        taps = self.weight.permute(0, 2, 3, 1)[:, 1 : 1 + height, 1 : 1 + width]
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), taps.flatten(1))[:, :, None, None]


def first_convolution(model: nn.Module) -> str | None:
    """The name of the convolution that sees the images; None in a model without convolutions."""
    return next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def grey_filters(weight: Tensor) -> Tensor:
    """Filters (out, 1, H, W) that compute of a grey image what `weight` (out, 3, H, W) does of it in all three channels."""
    return weight.sum(dim=1, keepdim=True)


class TablesOnCPU(TorchFunctionMode):
    """The context in which ranges and literals stay on the CPU: RegNet computes its widths with them, and reads the result."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        options = {"device": "cpu"} if function in (torch.arange, torch.tensor) else {}
        return function(*args, **(kwargs or {}) | options)
