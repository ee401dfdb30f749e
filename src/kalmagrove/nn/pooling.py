"""Blocks of tokens as one key and one value each: Arnold's coarser scales.

Shapes: keys and values are (batch, heads, sequence, head_dim).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.nn.derivatives import first_derivative_only
from kalmagrove.nn.elementwise import is_by_hand
from kalmagrove.precision import without_autocast


class BlockPooling(nn.Module):
    """A key and a value for each finished block: means weighted by what the tokens' keys say, and by their place.

    Each head has a query of its own and a bias for each place in the block; a softmax over the block gives the weights.
    At the start all are zero, which is the plain mean.
    """

    def __init__(self, num_heads: int, head_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Three axes, as in a depthwise convolution: optimisers for matrices rightly leave them alone.
        self.query = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, 1, stride))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The plain mean."""
        self.query.zero_()
        self.bias.zero_()

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, heads, sequence, head_dim) each to (batch, heads, sequence // stride, head_dim)."""
        finished = key.shape[-2] // self.stride
        keys, values = (
            x[..., : finished * self.stride, :].unflatten(-2, (finished, self.stride)) for x in (key, value)
        )
        if is_by_hand(key):
            with without_autocast(key):
                means: tuple[Tensor, Tensor] = _BlockMeans.apply(keys, values, self.query, self.bias)
            return means
        scores = (keys * self.query.to(key.dtype).unsqueeze(1)).sum(-1) + self.bias.to(key.dtype)
        # Softmax and sum give float32 under autocast on a GPU; the cache holds what this gives.
        weights = scores.softmax(dim=-1).to(key.dtype).unsqueeze(-1)
        return (weights * keys).sum(-2).to(key.dtype), (weights * values).sum(-2).to(value.dtype)


class _BlockMeans(torch.autograd.Function):
    """By hand and in float32: on a CPU passes that broadcast in bfloat16 take five times as long."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(keys.dtype, torch.float32)
        wide_keys, wide_values, wide_query = keys.to(wide), values.to(wide), query.to(wide).unsqueeze(1)
        weights = ((wide_keys * wide_query).sum(-1) + bias.to(wide)).softmax(dim=-1)
        ctx.save_for_backward(keys, values, query, bias, weights)
        key_mean, value_mean = ((weights.unsqueeze(-1) * x).sum(-2) for x in (wide_keys, wide_values))
        return key_mean.to(keys.dtype), value_mean.to(values.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, key_slope: Tensor, value_slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keys, values, query, bias, weights = ctx.saved_tensors
        wide = weights.dtype
        wide_keys, spread = keys.to(wide), weights.unsqueeze(-1)
        of_keys, of_values = (slope.to(wide).unsqueeze(-2) for slope in (key_slope, value_slope))
        of_weights = (wide_keys * of_keys).sum(-1).add_((values.to(wide) * of_values).sum(-1))
        of_scores = (of_weights - (of_weights * weights).sum(-1, keepdim=True)).mul_(weights)
        own_slope = (spread * of_keys).addcmul_(of_scores.unsqueeze(-1), query.to(wide).unsqueeze(1))
        of_query = (of_scores.unsqueeze(-1) * wide_keys).sum((0, 2, 3)).unsqueeze(1)
        of_bias = of_scores.sum((0, 2)).unsqueeze(1)
        return own_slope.to(keys.dtype), (spread * of_values).to(values.dtype), of_query.to(query), of_bias.to(bias)
