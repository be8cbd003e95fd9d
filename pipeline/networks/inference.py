"""Run a model forward, and on which device."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError

PREDICT_PIXELS = 250 * 28 * 28  # per forward pass: 250 images of 28x28


def choose_device(name: str, number: int = 0) -> torch.device:
    """The device that `name` (auto, cpu, cuda, mps) stands for, with the process set up to compute on it reproducibly.

    `number` says which GPU, modulo how many there are. Raises UserError if this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available[name]:
        raise UserError(f"device = {name!r}: this machine or this build of torch has none; use auto or cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs to be reproducible
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True) without importing the compiler
    torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.device("cuda", number % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Where what this thread computes on a GPU waits for no other thread; at the end it is finished."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(stream := torch.cuda.Stream(device)):
        yield
    stream.synchronize()


def choose_precision(name: str, device: torch.device) -> str:
    """The arithmetic that `name` stands for on `device`: "auto" is bf16 where the hardware multiplies it natively, else fp32."""
    if name != "auto":
        return name
    native = {
        "cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
    }
    return "bf16" if native.get(device.type) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs at `precision`, "fp32" or "bf16"; weights stay float32."""
    # Each weight is used once per pass: nothing to cache, and a cache would not survive a captured CUDA graph.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def predict(
    model: nn.Module, images: Tensor, precision: str = "fp32", transform: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Logits, float32 of shape (N, K), on the model's device, for images (N, H, W, C) in any memory. Sets eval mode.

    `transform` is applied to each batch of images, on that device.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = (batch.to(device) for batch in images.split(max(16, PREDICT_PIXELS // (images.shape[1] * images.shape[2]))))
    with torch.no_grad(), autocast(device, precision):
        return torch.cat([model(transform(batch) if transform else batch).float() for batch in batches])


def ensemble(of_models: Sequence[Tensor]) -> Tensor:
    """Logits of several models, (..., K) each, as one's: the logarithm of the mean of their probabilities; of one, its own."""
    if len(of_models) == 1:
        return of_models[0]
    return torch.stack([logits.log_softmax(-1) for logits in of_models]).logsumexp(0) - math.log(len(of_models))
