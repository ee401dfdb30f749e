"""Arnold: causal attention at several resolutions (equation 4).

A model's heads are divided into groups, and each group has a resolution of its own. A head sees the near past token by
token and what lies further back in blocks, under one softmax; the output projection sums the groups.

At stride s > 1 a key is a weighted mean of the s keys of a *finished* block: block j holds the tokens j s ..
(j + 1) s - 1 and is visible from its last token on, so no position sees a later token.

Shapes: queries, keys and values are (batch, heads, sequence, head_dim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kalmagrove.nn.attend import attend, masked_attention
from kalmagrove.nn.decoding import Placement, placement
from kalmagrove.nn.elementwise import is_by_hand, rms_norm
from kalmagrove.nn.layers import MakeProjection, RotaryEmbedding, ShortConvolution
from kalmagrove.nn.memory import GroupMemory
from kalmagrove.nn.pooling import BlockPooling
from kalmagrove.nn.resolution import Resolution


class MultiResolutionAttention(nn.Module):
    """Causal self-attention over one or several resolutions; one that sees every token is ordinary attention.

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
                _pool_name(group, scale): BlockPooling(resolution.num_heads, resolution.head_dim, stride)
                for group, resolution in enumerate(self.resolutions)
                for scale, (stride, _) in resolution.coarse
            }
        )

    def forward(
        self,
        x: Tensor,
        first_values: Tensor | None = None,
        where: Placement | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attends.

        Args:
            x: (batch, sequence, hidden).
            first_values: The first layer's values for the same tokens, (batch, sequence, width).
            where: Where the tokens of ``x`` stand; None is the beginning of a text.
            state: This layer's part of a :class:`~kalmagrove.nn.decoding.DecodingCache`, read and brought up to date;
                None in training.

        Returns:
            The output, shape of ``x``, and this layer's own values, (batch, sequence, width).

        Raises:
            ValueError: ``where`` has tokens before these, and there is no ``state`` that remembers them.
        """
        where = placement(x.shape[1], x.device) if where is None else where
        if state is None and where.seen:
            raise ValueError(f"{where.seen} tokens stand before these: give the state that remembers them")
        if state is None and where.padding is not None:
            # What is cached is numbered from the beginning of each row's text, and what is attended as a whole is not.
            state = {}
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.short_conv:
            key = self._convolve(self.k_conv, "k_conv", key, where, state)
            value = self._convolve(self.v_conv, "v_conv", value, where, state)
        own_values = value
        if self.value_residual and first_values is not None:
            mix = self.value_mix.to(value.dtype)
            value = mix[0] * value + mix[1] * first_values
        attended = []
        head = 0
        groups = zip(self.resolutions, *(t.split(self.widths, dim=-1) for t in (query, key, value)), strict=True)
        for index, (resolution, group_query, group_key, group_value) in enumerate(groups):
            gain = self.query_gain[head : head + resolution.num_heads] if self.qk_norm else None
            head += resolution.num_heads
            q, k, v = (_to_heads(t, resolution.head_dim) for t in (group_query, group_key, group_value))
            q = self._place(q, where.turns(where.positions), gain)
            if state is None:
                output = self._attend_whole(index, q, k, v, where)
            else:
                output = self._attend_cached(index, q, k, v, where, state)
            attended.append(output.transpose(1, 2).flatten(2))
        return self.o_proj(torch.cat(attended, dim=-1) if len(attended) > 1 else attended[0]), own_values

    def _convolve(
        self, convolution: ShortConvolution, name: str, x: Tensor, where: Placement, state: dict[str, Tensor] | None
    ) -> Tensor:
        result, history = convolution(x, None if state is None else state.get(name), where.reach)
        if state is not None:
            # A copy: the history is the end of all that was convolved.
            state[name] = history.clone()
        return result

    def _place(self, x: Tensor, positions: Tensor, gain: Tensor | None = None) -> Tensor:
        """Normalises heads and turns them to their positions."""
        if self.qk_norm:
            x = rms_norm(x, None, eps=1e-6)
            if gain is not None:
                x = x * gain.to(x.dtype)[:, None, None]
        return self.rotary[str(x.shape[-1])](x, positions) if len(self.rotary) else x

    def _attend_whole(self, group: int, query: Tensor, key: Tensor, value: Tensor, where: Placement) -> Tensor:
        """The whole text at once."""
        resolution = self.resolutions[group].used(query.shape[2])
        keys, values = [self._place(key, where.turns(where.positions))], [value]
        for scale, (stride, _) in resolution.coarse:
            pooled_key, pooled_value = self.pools[_pool_name(group, scale)](key, value)
            ends = (torch.arange(pooled_key.shape[2], device=key.device) + 1) * stride - 1
            keys.append(self._place(pooled_key, where.turns(ends)))
            values.append(pooled_value)
        return attend(resolution, query, keys, values, where.starts)

    def _attend_cached(
        self, group: int, query: Tensor, key: Tensor, value: Tensor, where: Placement, state: dict[str, Tensor]
    ) -> Tensor:
        """New tokens against what the cache remembers; the cache then forgets what no later query can see."""
        resolution = self.resolutions[group]
        memory = GroupMemory(state, f"{group}.", resolution, where)
        seen = [memory.add_tokens(self._place(key, where.turns(where.positions)), value)]
        if resolution.coarse:
            recent = memory.add_recent(key, value)
            seen += [
                memory.add_blocks(scale, recent, self.pools[_pool_name(group, scale)], self._place)
                for scale, _ in resolution.coarse
            ]
        if where.seen == 0 and where.padding is None:
            return self._attend_whole(group, query, key, value, where)
        keys, values, firsts = zip(*seen, strict=True)
        visible = [memory.visible(scale, first) for scale, first in enumerate(firsts)]
        return masked_attention(query, torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(visible, dim=-1))


def _pool_name(group: int, scale: int) -> str:
    return f"{group}_{scale}"


def _to_heads(x: Tensor, head_dim: int) -> Tensor:
    heads = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    # Whatever follows passes over them several times.
    return heads.contiguous() if is_by_hand(heads) else heads
