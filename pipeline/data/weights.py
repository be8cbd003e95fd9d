"""Tensors that a training starts from instead of random ones."""

import hashlib
import io
from pathlib import Path

from torch import Tensor

from pipeline.data.sources import locate


def imagenet_resnet18() -> dict[str, Tensor]:
    """torchvision's ImageNet weights of ResNet18 (IMAGENET1K_V1), without the last layer, float32.

    The file is found like a data set's (`hub/checkpoints/` in `DATA_MIRROR`, as in `TORCH_HOME`), checked against the start
    of its SHA-256, which torchvision puts into its name, and read without unpickling objects. Raises UserError as `locate`.
    """
    import torch
    from torchvision.models import ResNet18_Weights

    url = ResNet18_Weights.IMAGENET1K_V1.url
    name = url.rpartition("/")[2]
    prefix = name.rpartition("-")[2].partition(".")[0]

    def wrong(path: Path) -> str | None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        return None if found.startswith(prefix) else f"wrong checksum: sha256 is {found}, not {prefix}..."

    def download(root: Path) -> None:
        target = root / "hub" / "checkpoints" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix)

    content = locate(f"hub/checkpoints/{name}", wrong, download).read_bytes()
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
