"""Attention of a whole text over the scales of a resolution, by the fastest way that the device has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.nn import flex
from kalmagrove.nn.chunked import Chunk, attention_in_chunks, causal_chunks, hidden_bias
from kalmagrove.nn.elementwise import is_by_hand
from kalmagrove.nn.resolution import Resolution

LONGEST_PLAIN = 1024
"""Tokens up to which full attention on a CPU is faster by plain products than by torch's fused kernel."""
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 128, 1024
"""Queries that meet their keys at a time, at most."""
SMALLEST_CHUNK_ON_CPU = 64
"""Where a query sees few tokens one by one, since all keys that any query of a chunk sees are multiplied."""


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention under a boolean mask that broadcasts to (batch, heads, queries, keys)."""
    if is_by_hand(query):
        whole = Chunk(0, query.shape[-2], (slice(0, key.shape[-2]),), visible)
        return attention_in_chunks(query, key, value, [whole])
    key, value = key.to(query.dtype), value.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=hidden_bias(visible, query.dtype))


def _chunk_on_cpu(reach: int | None) -> int:
    return CHUNK_ON_CPU if reach is None else min(CHUNK_ON_CPU, max(SMALLEST_CHUNK_ON_CPU, reach))


def attend(
    resolution: Resolution,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    starts: Tensor | None = None,
) -> Tensor:
    """Causal attention of a whole text.

    Args:
        resolution: The scales; those that the text is too short for may be left out by ``resolution.used``.
        query: (batch, heads, sequence, head_dim).
        keys: Of each scale, (batch, heads, sequence // stride, head_dim).
        values: Likewise.
        starts: First position that each token may see, (batch, sequence); None is 0.

    Returns:
        (batch, heads, sequence, head_dim).
    """
    length = query.shape[2]
    everything = resolution.scales == ((1, None),) and starts is None
    by_hand = is_by_hand(query)
    if everything and not (by_hand and length <= LONGEST_PLAIN):
        return F.scaled_dot_product_attention(query, keys[0], values[0], is_causal=True)
    key, value = (each[0] if len(each) == 1 else torch.cat(list(each), dim=2) for each in (keys, values))
    if starts is None and flex.fits(query):
        return flex.attention_of_scales(query, key, value, resolution)
    size = _chunk_on_cpu(resolution.scales[0][1]) if by_hand else CHUNK_ELSEWHERE
    chunks = causal_chunks(resolution, length, size, query.device, starts)
    if by_hand:
        return attention_in_chunks(query, key, value, chunks)
    attended = [
        masked_attention(query[:, :, chunk.start : chunk.end], chunk.gather(key), chunk.gather(value), chunk.visible)
        for chunk in chunks
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)
