"""Masked attention by plain matrix products, chunk by chunk of the queries: the fast way on a CPU.

On a CPU two batched products and a softmax take about half the time of torch's fused causal kernel up to a thousand
tokens, and less than that under a mask of any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove.precision import without_autocast

LONGEST_KEPT = 4096
"""Queries up to which the weights are kept for the backward; of longer texts they are made again, in linear memory."""


@dataclass(frozen=True)
class Chunk:
    """Queries ``start .. end - 1`` against keys ``0 .. keys - 1``.

    Attributes:
        start: First query.
        end: One past the last query.
        keys: Number of keys.
        visible: Which of them each query sees, broadcast to (..., end - start, keys); at least one.
    """

    start: int
    end: int
    keys: int
    visible: Tensor


def causal_chunks(length: int, stride: int, size: int, device: torch.device) -> list[Chunk]:
    """Chunks of ``size`` queries that see what is finished: every token up to their own, or at a stride every block.

    At a stride above 1 key 0 is the null key, which is always visible, and key j the j-th block.
    """
    extra = 1 if stride > 1 else 0
    chunks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        finished = torch.arange(start + 1, end + 1, device=device) // stride + extra
        keys = end // stride + extra
        visible = torch.arange(keys, device=device) < finished[:, None]
        chunks.append(Chunk(start, end, keys, visible))
    return chunks


def attention_in_chunks(query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk]) -> Tensor:
    """Softmax attention.

    Args:
        query: (..., queries, head_dim), with one batch axis or more.
        key: (..., keys, head_dim).
        value: (..., keys, head_dim).
        chunks: Cover the queries in order.

    Returns:
        (..., queries, head_dim).
    """
    keep = query.shape[-2] <= LONGEST_KEPT and torch.is_grad_enabled()
    with without_autocast(query):
        # Keys that were remembered may have another type.
        attended: Tensor = _AttentionInChunks.apply(query, key.to(query.dtype), value.to(query.dtype), chunks, keep)
    return attended


def _weights(scaled: Tensor, key: Tensor, chunk: Chunk, batch: torch.Size) -> Tensor:
    scores = torch.bmm(scaled[:, chunk.start : chunk.end], key[:, : chunk.keys].mT)
    # The mask may differ along the last of the batch axes.
    scores.view(*batch, *scores.shape[1:]).masked_fill_(~chunk.visible, float("-inf"))
    return scores.softmax(dim=-1)


class _AttentionInChunks(torch.autograd.Function):
    """By hand: autograd would keep scores beside weights, and copy at every chunk."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk], keep: bool) -> Tensor:
        batch = query.shape[:-2]
        # One batch axis, in row-major order: products of slices then need no copies.
        scaled = query.flatten(0, -3).contiguous() * query.shape[-1] ** -0.5
        key, value = key.flatten(0, -3).contiguous(), value.flatten(0, -3).contiguous()
        output = torch.empty_like(scaled)
        kept = []
        for chunk in chunks:
            weights = _weights(scaled, key, chunk, batch)
            output[:, chunk.start : chunk.end] = torch.bmm(weights, value[:, : chunk.keys])
            if keep:
                kept.append(weights)
        ctx.save_for_backward(scaled, key, value, output, *kept)
        ctx.chunks, ctx.batch = chunks, batch
        return output.unflatten(0, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        scaled, key, value, output, *kept = ctx.saved_tensors
        slope = slope.flatten(0, -3).contiguous()
        sum_type = torch.promote_types(key.dtype, torch.float32)
        query_slope = torch.empty_like(scaled)
        key_slope, value_slope = (torch.zeros_like(tensor, dtype=sum_type) for tensor in (key, value))
        carried = (slope * output).sum(-1, keepdim=True)
        for index, chunk in enumerate(ctx.chunks):
            here, seen = slice(chunk.start, chunk.end), slice(0, chunk.keys)
            weights = kept[index] if kept else _weights(scaled, key, chunk, ctx.batch)
            upstream = slope[:, here]
            value_slope[:, seen] += torch.bmm(weights.mT, upstream)
            score_slope = torch.bmm(upstream, value[:, seen].mT).sub_(carried[:, here]).mul_(weights)
            query_slope[:, here] = torch.bmm(score_slope, key[:, seen])
            key_slope[:, seen] += torch.bmm(score_slope.mT, scaled[:, here])
        query_slope.mul_(scaled.shape[-1] ** -0.5)
        slopes = query_slope, key_slope.to(key), value_slope.to(value)
        query_slope, key_slope, value_slope = (each.unflatten(0, ctx.batch) for each in slopes)
        return query_slope, key_slope, value_slope, None, None
