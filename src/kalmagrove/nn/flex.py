"""All scales at once by FlexAttention: one fused kernel on a GPU, and no mask in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kalmagrove.nn.resolution import Resolution

SHORTEST = 1024
"""Tokens of a text from which it pays: 0.5x the time of masked blocks at 1,024 and 8,192 tokens on an H200."""
BLOCK = 128
"""Queries and keys of a tile; texts are padded to its multiples, so that few lengths are compiled."""


def fits(query: Tensor) -> bool:
    """Whether queries (batch, heads, sequence, head_dim) are on a GPU and of sizes that the kernel is good for."""
    length, head_dim = query.shape[-2:]
    return query.is_cuda and length >= SHORTEST and head_dim >= 16


def attention_of_scales(query: Tensor, key: Tensor, value: Tensor, resolution: Resolution) -> Tensor:
    """Causal attention of a whole text.

    Args:
        query: (batch, heads, sequence, head_dim).
        key: Of all scales, one behind the other from fine to coarse: (batch, heads, keys, head_dim).
        value: Likewise.
        resolution: The scales.
    """
    length = query.shape[2]
    query, key, value = (F.pad(t, (0, 0, 0, -t.shape[2] % BLOCK)) for t in (query, key, value))
    mask = _mask(resolution, length, query.shape[2], key.shape[2], str(query.device))
    # Without a GPU the kernel's own reference runs, which holds all scores.
    kernel: Any = _compiled() if query.is_cuda else flex_attention
    attended = kernel(query, key, value, block_mask=mask)
    assert isinstance(attended, Tensor)
    return attended[:, :, :length]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


@lru_cache(maxsize=64)
def _mask(resolution: Resolution, length: int, padded_length: int, padded_keys: int, device: str) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen, offset = key < 0, 0
        for index, (stride, reach) in enumerate(resolution.scales):
            count = length // stride
            first = (key - offset) * stride
            own = (key >= offset) & (key < offset + count) & (first <= query - resolution.nearest(index))
            seen = seen | (own if reach is None else own & (first > query - reach))
            offset += count
        return seen

    with torch.inference_mode(False):
        return create_block_mask(visible, None, None, padded_length, padded_keys, device=device, BLOCK_SIZE=BLOCK)
