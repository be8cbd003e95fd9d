"""Convolutions and pools in oneDNN's own tensors, on a processor.

oneDNN lays these tensors out in blocks of channels, for which its convolutions and above all its max pool are faster than what
PyTorch runs on ordinary ones: a training step of the small networks takes a tenth to a fifth less time. What goes in and comes
out are ordinary tensors, and the values differ by rounding alone. On other devices and processors than x86, for which it was not
measured, in a graph that torch.export traces and where oneDNN is missing or not able, everything stays ordinary.
"""

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16  # channels


def enter(x: Tensor, channels: int) -> Tensor:
    """`x`, float32 of shape (N, C, H, W), as oneDNN's tensor of the type that autocast asks for; `x` itself if it cannot be.

    `channels` is how many the first convolution makes of it. If they do not fill the blocks, `x` stays as it is: blocks padded
    with zeros were slower than ordinary tensors, the more so the fewer the channels.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or channels % BLOCK or torch.compiler.is_compiling():
        return x
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.to(kind).to_mkldnn() if _able(kind) else x


def leave(x: Tensor) -> Tensor:
    """`x` as an ordinary tensor."""
    return x.to_dense() if x.is_mkldnn else x


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d with a bias and padded with zeros, for oneDNN's tensors too (PyTorch knows their ReLU and max pool)."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `x` (N, C, H, W): ordinary in, ordinary out; oneDNN's in, oneDNN's out."""
        if not x.is_mkldnn:
            return super().forward(x)
        how = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype), *how)


class _Convolution(torch.autograd.Function):
    """nn.functional.conv2d refuses oneDNN's bfloat16 images with ordinary bfloat16 weights; the operations behind it do not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        stride, padding, dilation, groups = how
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        transposed, output_padding = False, (0, 0)
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [len(weight)],
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
            ctx.needs_input_grad[:3],
        )
        if of_weight is not None:
            # With the strides of the weights, as autograd wants it.
            of_weight = torch.empty_like(weight).copy_(of_weight)
        return of_x, of_weight, of_bias, None, None, None, None


@functools.cache
def _able(kind: torch.dtype) -> bool:
    """Whether this build and this processor do all of it in that type, forward and backward: found by trying."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    images, weight = torch.ones(1, 1, 4, 4, dtype=kind), torch.ones(2, 1, 3, 3, dtype=kind, requires_grad=True)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            seen = _Convolution.apply(images.to_mkldnn(), weight, weight.new_zeros(2), (1, 1), (0, 0), (1, 1), 1)
            F.max_pool2d(F.relu(seen), 2, 2).to_dense().sum().backward()
    except RuntimeError:
        return False
    return True
