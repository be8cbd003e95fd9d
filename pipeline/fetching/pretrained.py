"""Tensors that a training starts from instead of random ones."""

import re

from torch import Tensor

from pipeline.core.errors import UserError, user_error
from pipeline.fetching.download import Checksum, download
from pipeline.fetching.sources import locate
from pipeline.networks.architectures import build_meta
from pipeline.networks.names import WITHOUT_PRETRAINED, architecture_arguments

# What DenseNet's files call norm1 and conv1; torchvision's densenet.py renames it likewise.
OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)")


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """torchvision's default weights of the architecture `name`, of ImageNet, without the layer whose size is that of the classes.

    The file is located as a data set's (`hub/checkpoints/` in `DATA_MIRROR`, as in `TORCH_HOME`), verified against the start
    of its SHA-256, which torchvision puts into its name, and read without unpickling objects. Raises UserError as `locate`, and
    for an architecture without such weights.
    """
    import torch
    from torchvision.models import get_model_weights

    if name in WITHOUT_PRETRAINED:
        raise UserError(
            f"there are no pretrained weights of {name}: set pretrained: false, or take one of torchvision's networks"
        )
    with user_error("there are no pretrained weights", ValueError):
        weights = get_model_weights(name).DEFAULT
    options = {"in_channels": 3, "image_size": weights.meta["min_size"]} | architecture_arguments(name, {"stem": "imagenet"})
    network, other = (build_meta(name, **options, num_classes=classes) for classes in (1000, 1001))
    filename = weights.url.rpartition("/")[2]
    checksum = Checksum("sha256", filename.rpartition("-")[2].partition(".")[0])
    path = locate(f"hub/checkpoints/{filename}", checksum, lambda path: download([weights.url], path, checksum))
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in list(state):
        if old := OLD_DENSENET.fullmatch(key):
            state[old[1] + old[2]] = state.pop(key)
    # The networks' own loading renames what else older versions of torchvision named otherwise.
    missing, _ = network.load_state_dict(state, strict=False, assign=True)
    if missing:
        raise UserError(f"{path}: lacks {missing[0]}")
    shapes = {key: tensor.shape for key, tensor in other.state_dict().items()}
    return {key: tensor for key, tensor in network.state_dict().items() if tensor.shape == shapes[key]}
