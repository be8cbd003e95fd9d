"""The small networks in oneDNN's tensors against the same networks in ordinary ones."""

import platform

import pytest
import torch
import torch.nn.functional as F

from pipeline.networks import onednn
from pipeline.networks.architectures import build
from pipeline.networks.inference import autocast

CPU = torch.device("cpu")
X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not X86, reason="not an x86 processor, or no oneDNN in torch")


def outcome(name: str, arguments: dict, images: torch.Tensor, precision: str) -> list[torch.Tensor]:
    """Logits and all gradients of one training step, that of the images among them."""
    torch.manual_seed(0)
    model = build(name, in_channels=images.shape[1], image_size=tuple(images.shape[2:]), num_classes=4, **arguments)
    images = images.clone().requires_grad_()
    with autocast(CPU, precision):
        logits = model(images).float()
    F.cross_entropy(logits, torch.arange(len(images)) % 4).backward()
    return [logits.detach(), images.grad, *(parameter.grad for parameter in model.parameters())]


def distance(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / (b.norm() + 1e-3)).item() for a, b in zip(actual, expected, strict=True))


@needs_onednn
@pytest.mark.parametrize("size", [(1, 1, 6, 6), (2, 3, 7, 9), (33, 1, 28, 28), (5, 4, 65, 64)], ids=str)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("simple_cnn", {}),
        ("compact_cnn", {"width": 1, "hidden": 3}),
        ("compact_cnn", {"width": 5, "hidden": 7}),
        ("compact_cnn", {"width": 16, "hidden": 8}),
    ],
)
def test_logits_and_gradients_are_those_of_ordinary_tensors(
    name: str, arguments: dict, size: tuple, monkeypatch: pytest.MonkeyPatch
):
    images = torch.randn(size, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(onednn, "BLOCK", 1)  # also where it would not be used
    assert onednn.enter(images, 3).is_mkldnn
    blocked = {precision: outcome(name, arguments, images, precision) for precision in ("fp32", "bf16")}
    again = outcome(name, arguments, images, "bf16")
    monkeypatch.setattr(onednn, "BLOCK", 1000)  # more channels than any of these layers has
    assert onednn.enter(images, 3) is images
    ordinary = {precision: outcome(name, arguments, images, precision) for precision in ("fp32", "bf16")}
    assert all(torch.equal(a, b) for a, b in zip(blocked["bf16"], again, strict=True))
    assert distance(blocked["fp32"], ordinary["fp32"]) < 1e-5
    rounding = distance(ordinary["bf16"], ordinary["fp32"])
    assert distance(blocked["bf16"], ordinary["fp32"]) < 1.5 * rounding + 1e-3


@needs_onednn
@pytest.mark.parametrize(("channels", "blocked"), [(2, False), (16, True), (24, False), (32, True)])
def test_channels_that_do_not_fill_a_block_stay_ordinary(channels: int, blocked: bool):
    assert onednn.enter(torch.randn(2, 1, 8, 8), channels).is_mkldnn == blocked


def test_without_support_tensors_stay_ordinary(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("could not create a primitive")

    onednn._supported.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(onednn._Convolution, "apply", refuse)
            assert not onednn._supported(torch.float32)
            images = torch.randn(2, 1, 8, 8)
            assert onednn.enter(images, 16) is images
    finally:
        onednn._supported.cache_clear()


def test_pytorch_still_has_the_undocumented_operations_and_detection_leaves_no_trace():
    """In the middle of a forward pass: whatever the modes of that pass, and without a draw from the random numbers."""
    before = torch.get_rng_state()
    for mode in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        onednn._supported.cache_clear()
        with mode:
            assert onednn._supported(torch.float32) == X86
    assert torch.equal(torch.get_rng_state(), before)
