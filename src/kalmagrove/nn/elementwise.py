"""Elementwise parts of a layer with gradients by hand: on a CPU each pass over the activations costs, so there are few.

Each equals its textbook form under autograd (tests compare them in float64), which runs on other devices, where
compilers fuse it. Only first derivatives: a second one is refused with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.nn.derivatives import first_derivative_only
from kalmagrove.precision import autocast_type, without_autocast

SMALL_WEIGHT, SMALLEST_WEIGHT = 0.1, 1e-5
"""First weights of a sum below which their gradient needs double precision, and is zero: the sum does not tell it."""


def is_by_hand(x: Tensor) -> bool:
    """Whether ``x`` takes the functions with gradients by hand: on a CPU, outside compilers and torch.func."""
    if torch.compiler.is_compiling():
        return False
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


def squared_relu(x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """``max(x, 0)^2`` (Primer, arXiv:2109.08668), and a function that makes it again from what the backward keeps."""
    if not is_by_hand(x):
        positive = F.relu(x)
        return positive.square(), positive.square
    squared, positive = _SquaredReLU.apply(x)
    return squared, lambda: positive * positive


def weighted_sum(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """``weights[0] * x + weights[1] * y``; the backward keeps ``y`` and the sum, which others keep too, and not ``x``.

    Args:
        x: Any shape.
        y: The same.
        weights: (2,). The gradient of the first is that of autograd down to weights of 1e-4, and zero below 1e-5.
    """
    if not is_by_hand(x) or x.dtype.itemsize < 4:
        return weights[0] * x + weights[1] * y
    summed: Tensor = _WeightedSum.apply(x, y, weights)
    return summed


@contextmanager
def made_again(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Products in this context that would keep ``tensor`` for their backward call ``make`` there instead.

    For a tensor that is one pass over others that are kept anyway. On a CPU, where memory is dear and a pass is cheap.
    Where others decide what is kept, as activation checkpointing does, it stays out of their way; hooks that only look
    on say so by an attribute ``only_looks_on`` of the first one.
    """
    if not is_by_hand(tensor) or not torch.is_grad_enabled():
        yield
        return
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if outer is not None and not getattr(outer[0], "only_looks_on", False):
        yield
        return

    def place(of: Tensor) -> tuple[Any, ...]:
        return of.untyped_storage()._cdata, of.storage_offset(), of.numel(), of.dtype, of.is_contiguous()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        # What was changed in place since then is another tensor.
        if place(saved) == its_place and saved._version == its_version:
            return saved.shape
        return saved if outer is None else outer[0](saved)

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else make().view(packed)

    its_place, its_version = place(tensor), tensor._version
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the planes that channels i and i + channels / 2 make.

    Args:
        x: (..., channels).
        cos: Of the angles, broadcast to (..., channels / 2).
        sin: Likewise.
    """
    if not is_by_hand(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned: Tensor = _Rotation.apply(x, cos, sin)
    return turned


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
    @first_derivative_only
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide = slope.to(scale.dtype, copy=True)
        products = wide * x
        if weight is None:
            along, weight_slope = products.sum(-1, keepdim=True), None
        else:
            # Both sums over the products are matrix-vector products: one reading each.
            gain, rows = weight.to(scale.dtype), products.reshape(-1, x.shape[-1])
            along = torch.mv(rows, gain).view_as(scale)
            weight_slope = torch.mv(rows.T, scale.reshape(-1)).to(weight)
            wide.mul_(gain)
        along.mul_(scale.pow(3)).div_(x.shape[-1])
        return wide.mul_(scale).addcmul_(x, along, value=-1).to(x), weight_slope, None, None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        ctx.mark_non_differentiable(positive)
        return positive * positive, positive

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (slope * positive).mul_(2)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, forwards=True)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return _turned(slope, *ctx.saved_tensors, forwards=False), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, forwards: bool) -> Tensor:
    # Passes over whole rows in their order in memory: over halves of them they take several times as long.
    x = x.contiguous()
    first, second = x.chunk(2, dim=-1)
    signed = torch.cat((-sin, sin) if forwards else (sin, -sin), dim=-1)
    return (x * torch.cat((cos, cos), dim=-1)).addcmul_(torch.cat((second, first), dim=-1), signed)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        summed = (x * weights[0]).addcmul_(y, weights[1])
        ctx.save_for_backward(summed, y, weights)
        return summed

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        summed, y, weights = ctx.saved_tensors
        first, second = weights.unbind()
        # Beside a small weight the difference below is small too, and needs more digits.
        wide = torch.float64 if abs(float(first)) < SMALL_WEIGHT else slope.dtype
        # The sum tells what x was: its gradient's part of the first weight needs no copy of it.
        with_sum, with_y = (torch.dot(slope.reshape(-1).to(wide), each.reshape(-1).to(wide)) for each in (summed, y))
        difference = with_sum - second.to(wide) * with_y
        of_first = difference / first if abs(float(first)) > SMALLEST_WEIGHT else torch.zeros_like(difference)
        return slope * first, slope * second, torch.stack((of_first, with_y)).to(weights.dtype)


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(padded, taps)
        return _convolve(padded, taps)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        padded, taps = ctx.saved_tensors
        length = slope.shape[1]
        padded_slope = torch.zeros_like(padded)
        taps_slope = torch.empty_like(taps)
        for tap, weight in enumerate(taps):
            padded_slope[:, tap : tap + length].addcmul_(slope, weight)
            taps_slope[tap] = (slope * padded[:, tap : tap + length]).sum((0, 1))
        return padded_slope, taps_slope
