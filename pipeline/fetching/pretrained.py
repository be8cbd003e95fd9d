"""Tensors that a training starts from instead of random ones."""

from torch import Tensor

from pipeline.fetching.download import Checksum, download
from pipeline.fetching.sources import locate


def imagenet_resnet18() -> dict[str, Tensor]:
    """torchvision's ImageNet weights of ResNet18 (IMAGENET1K_V1), without the last layer, float32.

    The file is located as a data set's (`hub/checkpoints/` in `DATA_MIRROR`, as in `TORCH_HOME`), verified against the start
    of its SHA-256, which torchvision puts into its name, and read without unpickling objects. Raises UserError as `locate`.
    """
    import torch
    from torchvision.models import ResNet18_Weights

    url = ResNet18_Weights.IMAGENET1K_V1.url
    name = url.rpartition("/")[2]
    checksum = Checksum("sha256", name.rpartition("-")[2].partition(".")[0])
    path = locate(f"hub/checkpoints/{name}", checksum, lambda path: download([url], path, checksum))
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
