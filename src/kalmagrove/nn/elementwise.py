"""Elementwise parts of a layer with gradients by hand: on a CPU each pass over the activations costs, so there are few.

Each equals its textbook form under autograd (tests compare them in float64), which runs on other devices, where
compilers fuse it. Only first derivatives: a second one is refused by torch with an error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove.precision import autocast_type, without_autocast


def is_by_hand(x: Tensor) -> bool:
    """Whether ``x`` takes the functions with gradients by hand: on a CPU, and outside torch.func's transforms."""
    return x.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32 or better.

    Args:
        x: (..., channels).
        weight: A gain for each channel, or None.
        eps: Added to the mean square.

    Returns:
        Shape of ``x``. Under autocast its type is autocast's, so that the projections that follow share one cast.
    """
    dtype = autocast_type(x)
    with without_autocast(x):
        if not is_by_hand(x):
            return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps).to(dtype)
        normed: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return normed


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (Primer, arXiv:2109.08668)."""
    if not is_by_hand(x):
        return F.relu(x).square()
    squared: Tensor = _SquaredReLU.apply(x)
    return squared


def depthwise_convolution(padded: Tensor, taps: Tensor, visible: Tensor | None = None) -> Tensor:
    """Sums ``taps[k] * padded[:, t + k]`` over k.

    Args:
        padded: (batch, sequence + kernel_size - 1, channels).
        taps: (kernel_size, channels), the last for the present token.
        visible: How many tokens back each token may look, (batch, sequence); None is all.

    Returns:
        (batch, sequence, channels).
    """
    if not is_by_hand(padded) or visible is not None:
        return _convolve(padded, taps, visible)
    convolved: Tensor = _DepthwiseConvolution.apply(padded, taps)
    return convolved


def _convolve(padded: Tensor, taps: Tensor, visible: Tensor | None = None) -> Tensor:
    reach = len(taps) - 1
    length = padded.shape[1] - reach
    result = padded[:, reach:] * taps[reach]
    for tap in range(reach):
        earlier = padded[:, tap : tap + length]
        if visible is not None:
            earlier = torch.where(visible[..., None] >= reach - tap, earlier, 0)
        result = torch.addcmul(result, earlier, taps[tap])
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = x * scale if weight is None else (x * scale).mul_(weight.to(wide))
        return normed.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        weighted = slope.to(scale.dtype) if weight is None else slope * weight.to(scale.dtype)
        along = (weighted * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        weight_slope = None
        if weight is not None:
            weight_slope = (x * scale).mul_(slope).reshape(-1, x.shape[-1]).sum(0).to(weight)
        return (weighted * scale).addcmul_(x, along, value=-1).to(x), weight_slope, None, None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (slope * positive).mul_(2)


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(padded, taps)
        return _convolve(padded, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        padded, taps = ctx.saved_tensors
        length = slope.shape[1]
        padded_slope = torch.zeros_like(padded)
        taps_slope = torch.empty_like(taps)
        for tap, weight in enumerate(taps):
            padded_slope[:, tap : tap + length].addcmul_(slope, weight)
            taps_slope[tap] = (slope * padded[:, tap : tap + length]).sum((0, 1))
        return padded_slope, taps_slope
