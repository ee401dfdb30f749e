"""Arnold: causal attention at several resolutions (equation 4), and the cache it decodes with.

A model's heads are divided into groups; each group has its own resolution: how many heads of which size, the
stride at which it sees keys and values, and how far back it looks. The output projection sums the groups.

At stride s > 1 a key is a weighted mean of the s keys of a *finished* block: block j holds the tokens j s ..
(j + 1) s - 1 and is visible from its last token on, so no position sees a later token. Before the first block is
finished a query attends to nothing: every coarse group has a null key with score 0 and value 0.

Shapes: queries, keys and values are (batch, heads, sequence, head_dim).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.nn import flex
from kalmagrove.nn.chunked import Chunk, attention_in_chunks, causal_chunks
from kalmagrove.nn.elementwise import is_by_hand, rms_norm
from kalmagrove.nn.layers import MakeProjection, RotaryEmbedding, ShortConvolution

LONGEST_PLAIN = 1024
"""Tokens up to which full attention on a CPU is faster by plain products than by torch's fused kernel."""
CHUNK_OF_TOKENS, CHUNK_OF_BLOCKS = 64, 256
"""Queries that meet their keys at a time on a CPU: at stride 1, and at larger ones."""


@dataclass(frozen=True)
class Resolution:
    """One group of heads.

    Attributes:
        num_heads: Heads of the group.
        head_dim: Size of a head.
        stride: Tokens that one key stands for.
        window: Tokens back that a query sees, its own included; a coarse key is seen as long as its first token
            is. None is everything.

    Raises:
        ValueError: A number is not positive, or the window is shorter than the stride.
    """

    num_heads: int
    head_dim: int
    stride: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        if min(self.num_heads, self.head_dim, self.stride) < 1:
            raise ValueError(f"num_heads, head_dim and stride must be positive, got {self}")
        if self.window is not None and self.window < self.stride:
            raise ValueError(f"window {self.window} is shorter than stride {self.stride}")

    @property
    def width(self) -> int:
        """Channels of the group."""
        return self.num_heads * self.head_dim

    def visible(self, query_positions: Tensor, key_ends: Tensor) -> Tensor:
        """Which keys (by the position of their last token) each query may see: (queries, keys), bool."""
        ends, queries = key_ends[None, :], query_positions[:, None]
        seen = ends <= queries
        if self.window is not None:
            seen = seen & (ends - self.stride + 1 > queries - self.window)
        return seen


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
        scores = (keys * self.query.to(key.dtype).unsqueeze(1)).sum(-1) + self.bias.to(key.dtype)
        # Softmax and sum give float32 under autocast on a GPU; the cache holds what this gives.
        weights = scores.softmax(dim=-1).to(key.dtype).unsqueeze(-1)
        return (weights * keys).sum(-2).to(key.dtype), (weights * values).sum(-2).to(value.dtype)


def block_ends(count: int, stride: int, device: torch.device, start: int = 0) -> Tensor:
    """Position of the last token of the blocks ``start .. start + count - 1``."""
    return (torch.arange(start, start + count, device=device) + 1) * stride - 1


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention under a boolean mask that broadcasts to (queries, keys)."""
    if not is_by_hand(query):
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill(~visible, float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    whole = Chunk(0, query.shape[-2], key.shape[-2], visible)
    return attention_in_chunks(query, key, value, [whole])


def with_null_key(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Puts a key of score 0 and value 0 before the others."""
    return F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))


def local_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention to the last ``window`` tokens, in time linear in the sequence.

    Queries of block i meet the keys of blocks i - 1 and i, blocks of ``window`` tokens.
    """
    heads, length, head_dim = query.shape[1:]
    blocks = -(-length // window)
    padding = blocks * window - length

    def with_previous(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, window, padding)).unflatten(2, (blocks + 1, window))
        return torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3)

    block_query = F.pad(query, (0, 0, 0, padding)).unflatten(2, (blocks, window))
    positions = torch.arange(window, device=query.device)
    keys = torch.arange(2 * window, device=query.device) - window
    visible = Resolution(heads, head_dim, window=window).visible(positions, keys)
    # The first block has no predecessor: its padding keys are hidden.
    first = (torch.arange(blocks, device=query.device) > 0)[:, None, None] | (keys >= 0)
    # With four axes torch's fused kernels on a GPU can be used.
    block_query, block_key, block_value = (
        t.flatten(0, 1) for t in (block_query, with_previous(key), with_previous(value))
    )
    attended = masked_attention(block_query, block_key, block_value, visible & first)
    return attended.unflatten(0, (-1, heads)).flatten(2, 3)[:, :, :length]


def strided_attention(query: Tensor, key: Tensor, value: Tensor, stride: int) -> Tensor:
    """Attention to the finished blocks of ``stride`` tokens, by ordinary causal attention.

    With the null key first, the query at position i sees the keys 0 .. (i + 1) // stride. Queries of equal
    (i + 1) % stride, in their order, thus see one key more each: the pattern that fused kernels know, and no mask.

    Args:
        query: (batch, heads, sequence, head_dim).
        key: Of the blocks, (batch, heads, sequence // stride, head_dim).
        value: Likewise.
        stride: Tokens of a block.
    """
    length = query.shape[2]
    rows = length // stride + 1
    phases = F.pad(query, (0, 0, 1, rows * stride - length - 1)).unflatten(2, (rows, stride))
    phases = phases.permute(0, 3, 1, 2, 4)
    key, value = (t[:, None].expand(-1, stride, -1, -1, -1).flatten(0, 1) for t in with_null_key(key, value))
    attended = F.scaled_dot_product_attention(phases.flatten(0, 1), key, value, is_causal=True)
    return attended.unflatten(0, (-1, stride)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, 1 : length + 1]


def windowed_blocks(resolution: Resolution, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention to the finished blocks within a window, in linear time: chunks of queries meet what they can see."""
    length, stride, window = query.shape[2], resolution.stride, resolution.window
    assert window is not None
    chunks = []
    for start in range(0, length, CHUNK_OF_BLOCKS):
        end = min(start + CHUNK_OF_BLOCKS, length)
        oldest = max(0, (start - window + stride) // stride)
        seen = slice(oldest, max(oldest, end // stride))
        ends = block_ends(seen.stop - oldest, stride, query.device, start=oldest)
        positions = torch.arange(start, end, device=query.device)
        chunks.append(
            _attend_to_blocks(resolution, query[:, :, start:end], key[:, :, seen], value[:, :, seen], positions, ends)
        )
    return torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]


def attend(resolution: Resolution, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of a whole text at one resolution.

    Args:
        resolution: Its stride and window.
        query: (batch, heads, sequence, head_dim).
        key: Of the tokens, or of the finished blocks where the stride is above 1: (batch, heads, sequence // stride,
            head_dim).
        value: Likewise.
    """
    length, stride, window = query.shape[2], resolution.stride, resolution.window
    by_hand = is_by_hand(query)
    if window is not None and window < length:
        if stride > 1:
            return windowed_blocks(resolution, query, key, value)
        return (flex.windowed if flex.fits(query) else local_attention)(query, key, value, window)
    if stride > 1:
        if not by_hand:
            return strided_attention(query, key, value, stride)
        chunks = causal_chunks(length, stride, CHUNK_OF_BLOCKS, query.device)
        return attention_in_chunks(query, *with_null_key(key, value), chunks)
    if by_hand and length <= LONGEST_PLAIN:
        return attention_in_chunks(query, key, value, causal_chunks(length, 1, CHUNK_OF_TOKENS, query.device))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class DecodingCache:
    """What the layers of a model remember while text is decoded.

    Each layer keeps, in a dictionary of tensors whose first axis is the batch, only what its resolutions can still
    see: a window of fine keys, the pooled keys of finished blocks, the tokens of the block that is not finished,
    and the short convolution's last inputs.
    """

    # Read by transformers' generate(): no fixed size, no linear-attention layer.
    is_compileable = False
    is_linear = (False,)

    def __init__(self, num_layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
        self.length = 0

    def get_seq_length(self, layer_index: int = 0) -> int:
        """Tokens seen so far, the same for every layer."""
        return self.length

    def reorder_cache(self, beam_index: Tensor) -> None:
        """Selects rows of the batch, as beam search needs."""
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = tensor.index_select(0, beam_index.to(tensor.device))

    def num_bytes(self) -> int:
        """Bytes that the cache holds now."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())


class MultiResolutionAttention(nn.Module):
    """Causal self-attention over one or several resolutions; one resolution of stride 1 is ordinary attention.

    Args:
        hidden_size: Width of the residual stream.
        resolutions: The groups of heads.
        make_projection: Builds ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
        rotary_theta: Base of the rotary positions; None turns them off.
        qk_norm: Whether queries and keys are RMS-normalised a head (arXiv:2010.04245), with a learned gain on
            the query.
        short_conv: Taps of the causal convolution on keys and values; 0 turns it off.
        value_residual: Whether the first layer's values are mixed into this layer's (arXiv:2410.17897).
    """

    def __init__(
        self,
        hidden_size: int,
        resolutions: Sequence[Resolution],
        make_projection: MakeProjection,
        *,
        rotary_theta: float | None = 10000.0,
        qk_norm: bool = False,
        short_conv: int = 0,
        value_residual: bool = False,
    ) -> None:
        super().__init__()
        self.resolutions = tuple(resolutions)
        self.widths = [resolution.width for resolution in self.resolutions]
        width = sum(self.widths)
        self.q_proj = make_projection("q_proj", hidden_size, width)
        self.k_proj = make_projection("k_proj", hidden_size, width)
        self.v_proj = make_projection("v_proj", hidden_size, width)
        self.o_proj = make_projection("o_proj", width, hidden_size)
        head_dims = sorted({resolution.head_dim for resolution in self.resolutions})
        self.rotary = nn.ModuleDict(
            {} if rotary_theta is None else {str(size): RotaryEmbedding(size, rotary_theta) for size in head_dims}
        )
        self.qk_norm = qk_norm
        if qk_norm:
            self.query_gain = nn.Parameter(torch.ones(sum(r.num_heads for r in self.resolutions)))
        self.short_conv = short_conv
        if short_conv:
            self.k_conv = ShortConvolution(width, short_conv)
            self.v_conv = ShortConvolution(width, short_conv)
        if value_residual:
            self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.value_residual = value_residual
        self.pools = nn.ModuleDict(
            {
                str(index): BlockPooling(resolution.num_heads, resolution.head_dim, resolution.stride)
                for index, resolution in enumerate(self.resolutions)
                if resolution.stride > 1
            }
        )

    def forward(
        self, x: Tensor, first_values: Tensor | None = None, state: dict[str, Tensor] | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Attends.

        Args:
            x: (batch, sequence, hidden).
            first_values: The first layer's values for the same tokens, (batch, sequence, width).
            state: This layer's part of a :class:`DecodingCache`, read and brought up to date; None in training.
            offset: Tokens that were seen before ``x``.

        Returns:
            The output, shape of ``x``, and this layer's own values, (batch, sequence, width).
        """
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.short_conv:
            key = self._convolve(self.k_conv, "k_conv", key, state)
            value = self._convolve(self.v_conv, "v_conv", value, state)
        own_values = value
        if self.value_residual and first_values is not None:
            mix = self.value_mix.to(value.dtype)
            value = mix[0] * value + mix[1] * first_values
        positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        attended = []
        head = 0
        groups = zip(self.resolutions, *(t.split(self.widths, dim=-1) for t in (query, key, value)), strict=True)
        for index, (resolution, group_query, group_key, group_value) in enumerate(groups):
            gain = self.query_gain[head : head + resolution.num_heads] if self.qk_norm else None
            head += resolution.num_heads
            q, k, v = (_to_heads(t, resolution.head_dim) for t in (group_query, group_key, group_value))
            q = self._place(q, resolution, positions, gain)
            if state is None:
                output = self._attend_whole(index, q, k, v)
            else:
                output = self._attend_cached(index, q, k, v, positions, state)
            attended.append(output.transpose(1, 2).flatten(2))
        return self.o_proj(torch.cat(attended, dim=-1) if len(attended) > 1 else attended[0]), own_values

    def _convolve(self, convolution: ShortConvolution, name: str, x: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        result, history = convolution(x, None if state is None else state.get(name))
        if state is not None:
            state[name] = history
        return result

    def _place(self, x: Tensor, resolution: Resolution, positions: Tensor, gain: Tensor | None = None) -> Tensor:
        """Normalises heads and turns them to their positions."""
        if self.qk_norm:
            x = rms_norm(x, None, eps=1e-6)
            if gain is not None:
                x = x * gain.to(x.dtype)[:, None, None]
        return self.rotary[str(resolution.head_dim)](x, positions) if len(self.rotary) else x

    def _attend_whole(self, group: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The whole text at once."""
        resolution, stride = self.resolutions[group], self.resolutions[group].stride
        if stride > 1:
            key, value = self.pools[str(group)](key, value)
        ends = block_ends(key.shape[2], stride, key.device)
        return attend(resolution, query, self._place(key, resolution, ends), value)

    def _attend_cached(
        self, group: int, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, state: dict[str, Tensor]
    ) -> Tensor:
        """New tokens against what the cache remembers; the cache then forgets what no later query can see."""
        resolution, prefix = self.resolutions[group], f"{group}."
        stride, seen = resolution.stride, int(positions[0])
        total = seen + query.shape[2]
        if stride == 1:
            key = self._place(key, resolution, positions)
        else:
            key = _remember(state, prefix + "open_keys", key)
            value = _remember(state, prefix + "open_values", value)
            finished = key.shape[2] // stride
            ends = block_ends(finished, stride, key.device, start=seen // stride)
            for name, tensor in (("open_keys", key), ("open_values", value)):
                state[prefix + name] = tensor[:, :, finished * stride :]
            key, value = self.pools[str(group)](key, value)
            key = self._place(key, resolution, ends)
        key = _remember(state, prefix + "keys", key)
        value = _remember(state, prefix + "values", value)
        count = key.shape[2]
        ends = block_ends(count, stride, key.device, start=total // stride - count)
        if stride == 1:
            output = masked_attention(query, key, value, resolution.visible(positions, ends))
        else:
            output = _attend_to_blocks(resolution, query, key, value, positions, ends)
        if resolution.window is not None:
            keep = int(resolution.visible(torch.tensor([total], device=ends.device), ends).sum())
            state[prefix + "keys"] = key[:, :, count - keep :]
            state[prefix + "values"] = value[:, :, count - keep :]
        return output


def _to_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _remember(state: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
    if name in state:
        new = torch.cat((state[name], new), dim=2)
    state[name] = new
    return new


def _attend_to_blocks(
    resolution: Resolution, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, ends: Tensor
) -> Tensor:
    visible = F.pad(resolution.visible(positions, ends), (1, 0), value=True)
    return masked_attention(query, *with_null_key(key, value), visible)
