"""Sliding windows by FlexAttention, which is faster than blocks of masked attention on a GPU and needs less memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SHORTEST = 1024
"""Tokens of a text from which it pays: 0.5x the time of masked blocks at 1,024 and 8,192 tokens on an H200."""
BLOCK = 128
"""Queries and keys of a tile; texts of other multiples would be compiled anew for each length."""


def fits(query: Tensor) -> bool:
    """Whether queries (batch, heads, sequence, head_dim) are on a GPU and of sizes that the kernel is good for."""
    length, head_dim = query.shape[-2:]
    return query.is_cuda and length >= SHORTEST and length % BLOCK == 0 and head_dim >= 16


def windowed(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Causal attention to the last ``window`` tokens; all are (batch, heads, sequence, head_dim)."""
    # Without a GPU the kernel's own reference runs, which holds all scores.
    kernel: Any = _compiled() if query.is_cuda else flex_attention
    attended = kernel(query, key, value, block_mask=_mask(query.shape[2], window, str(query.device)))
    assert isinstance(attended, Tensor)
    return attended


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


@lru_cache(maxsize=64)
def _mask(length: int, window: int, device: str) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    with torch.inference_mode(False):
        return create_block_mask(visible, None, None, length, length, device=device, BLOCK_SIZE=BLOCK)
