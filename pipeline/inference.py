"""Run a model forward, and on which device."""

import os

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

PREDICT_BATCH = 1000  # images per forward pass


def choose_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, mps) stands for, with the process set to reproducible arithmetic.

    Raises UserError if this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"device = {name!r}: this machine or this build of torch has none; use auto or cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs to be reproducible
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.device(name)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, float32 of shape (N, K), for images of shape (N, H, W, C) on the model's device. Sets the model to eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch).float() for batch in images.split(PREDICT_BATCH)])
