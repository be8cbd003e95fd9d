"""Convolutions and pools in oneDNN's own tensors, on x86 processors.

oneDNN lays these tensors out in blocks of channels, for which its convolutions and above all its max pool are faster than what
PyTorch runs on ordinary ones. What is used of PyTorch here is undocumented. What that buys: the student's training step is 1.3 to
1.5 times as fast at one thread; the teacher's is as fast on a quiet machine and 1.8 times as fast beside other work (2.9 against
5.1 s of CPU for 12,800 images, five interleaved runs). tests/networks/test_onednn.py fails when these operations go.

Input and output are ordinary tensors, and the values differ by rounding alone. Tensors stay ordinary on other devices and
processors, in a graph that torch.export traces, and where oneDNN is missing or does not support the type.
"""

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16  # channels


def enter(x: Tensor, channels: int) -> Tensor:
    """`x`, float32 of shape (N, C, H, W), as oneDNN's tensor of the type that autocast asks for, or `x` itself if unsupported.

    `channels` is how many the first convolution makes of it. If they do not fill the blocks, `x` stays as it is: blocks padded
    with zeros were slower than ordinary tensors, the more so the fewer the channels.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or channels % BLOCK or torch.compiler.is_compiling():
        return x
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.to(dtype).to_mkldnn() if _supported(dtype) else x


def leave(x: Tensor) -> Tensor:
    """`x` as an ordinary tensor."""
    return x.to_dense() if x.is_mkldnn else x


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d with a bias and zero padding, for oneDNN's tensors too (PyTorch knows their ReLU and max pool)."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `x` (N, C, H, W), in the kind of tensor that `x` is."""
        if not x.is_mkldnn:
            return super().forward(x)
        options = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype), *options)


class _Convolution(torch.autograd.Function):
    """nn.functional.conv2d refuses oneDNN's bfloat16 images with ordinary bfloat16 weights; the operations behind it do not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, dilation, groups = options
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        layout = (stride, padding, dilation, False, (0, 0), groups)  # neither transposed nor with padding of the output
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_output, x, weight, [len(weight)], *layout, ctx.needs_input_grad[:3]
        )
        if grad_weight is not None:
            # With the strides of the weights, as autograd wants it.
            grad_weight = torch.empty_like(weight).copy_(grad_weight)
        return grad_input, grad_weight, grad_bias, None, None, None, None


@functools.cache
def _supported(dtype: torch.dtype) -> bool:
    """Whether this build and this processor do all of it in that type, forward and backward: feature-detected."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    images, weight = torch.ones(1, 1, 4, 4, dtype=dtype), torch.ones(2, 1, 3, 3, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            x = _Convolution.apply(images.to_mkldnn(), weight, weight.new_zeros(2), (1, 1), (0, 0), (1, 1), 1)
            F.max_pool2d(F.relu(x), 2, 2).to_dense().sum().backward()
    except (RuntimeError, AttributeError):
        return False
    return True
