"""Keys and values that one group of heads remembers in decoding, scale by scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kalmagrove.nn.decoding import Placement
from kalmagrove.nn.resolution import Resolution

Pool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values of tokens to those of blocks."""
Place = Callable[[Tensor, Tensor], Tensor]
"""Keys (batch, heads, keys, head_dim) turned to positions (keys,), (batch, keys) or (batch, keys, 2)."""


class GroupMemory:
    """Reads and brings up to date the part of a layer's state that belongs to one group of heads.

    All rows of a batch have seen as many tokens, padding included. Their texts may have begun at different times,
    so that their blocks are not finished together: blocks lie at the same index in every row, the place in its text,
    and rows that are not so far have room there that no query sees.

    Args:
        state: The layer's part of a cache.
        prefix: Of the group's names in it.
        resolution: Of the group.
        where: The tokens that are new.
    """

    def __init__(self, state: dict[str, Tensor], prefix: str, resolution: Resolution, where: Placement) -> None:
        self.state, self.prefix, self.resolution, self.where = state, prefix, resolution, where
        self.count = where.positions.shape[-1]

    def add_tokens(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds placed keys and values; returns all that are remembered, and the positions of their first tokens."""
        keys, values = self._join("0.keys", key), self._join("0.values", value)
        total = self.where.seen + self.count
        first = torch.arange(total - keys.shape[2], total, device=key.device)
        if self.where.padding is not None:
            first = first - self.where.padding[:, None]
        reach = self.resolution.scales[0][1]
        self._keep_last("0.keys", keys, None if reach is None else reach - 1)
        self._keep_last("0.values", values, None if reach is None else reach - 1)
        return keys, values, first

    def add_recent(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys without positions, and values; returns those of the blocks that are not finished, and these."""
        keys, values = self._join("open_keys", key), self._join("open_values", value)
        longest = self.resolution.scales[-1][0]
        self._keep_last("open_keys", keys, longest - 1)
        self._keep_last("open_values", values, longest - 1)
        return keys, values

    def add_blocks(
        self, scale: int, recent: tuple[Tensor, Tensor], pool: Pool, place: Place
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pools the blocks that the new tokens finish; returns as :meth:`add_tokens`."""
        stride = self.resolution.scales[scale][0]
        base = self._forgotten(scale, self.where.seen)
        if self.where.padding is None:
            keys, values = self._new_blocks(scale, recent, pool, place)
        else:
            keys, values = self._new_blocks_of_rows(scale, base, recent, pool, place)
        first = (base + torch.arange(keys.shape[2], device=keys.device)) * stride
        dropped = self._forgotten(scale, self.where.seen + self.count) - base
        for name, tensor in (("keys", keys), ("values", values)):
            self.state[f"{self.prefix}{scale}.{name}"] = tensor[:, :, dropped:].clone() if dropped else tensor
        return keys, values, first

    def _new_blocks(self, scale: int, recent: tuple[Tensor, Tensor], pool: Pool, place: Place) -> tuple[Tensor, Tensor]:
        stride = self.resolution.scales[scale][0]
        total = self.where.seen + self.count
        first, last = self.where.seen // stride, total // stride
        begin = first * stride - (total - recent[0].shape[2])
        part = slice(begin, begin + (last - first) * stride)
        key, value = pool(recent[0][:, :, part], recent[1][:, :, part])
        ends = (torch.arange(first, last, device=key.device) + 1) * stride - 1
        return self._join(f"{scale}.keys", place(key, self.where.turns(ends))), self._join(f"{scale}.values", value)

    def _new_blocks_of_rows(
        self, scale: int, base: int, recent: tuple[Tensor, Tensor], pool: Pool, place: Place
    ) -> tuple[Tensor, Tensor]:
        """The same where rows have begun at different times."""
        stride = self.resolution.scales[scale][0]
        padding, total = self.where.padding, self.where.seen + self.count
        assert padding is not None
        first = (self.where.seen - padding).clamp(min=0) // stride
        last = (total - padding).clamp(min=0) // stride
        index = first[:, None] + torch.arange(int((last - first).max()), device=padding.device)
        tokens = (index[..., None] * stride + torch.arange(stride, device=padding.device)).flatten(1)
        rows = (tokens + padding[:, None] - (total - recent[0].shape[2])).clamp(max=recent[0].shape[2] - 1)
        key, value = pool(*(_rows(tensor, rows) for tensor in recent))
        placed = place(key, index * stride + stride - 1)
        row, column = (index < last[:, None]).nonzero(as_tuple=True)
        size = int(last.max()) - base
        stored = []
        for name, new in ((f"{scale}.keys", placed), (f"{scale}.values", value)):
            old = self.state.get(self.prefix + name)
            room = new.new_zeros(*new.shape[:2], size, new.shape[3])
            if old is not None:
                room[:, :, : old.shape[2]] = old
            room[row, :, index[row, column] - base] = new[row, :, column]
            stored.append(room)
        return stored[0], stored[1]

    def _forgotten(self, scale: int, seen: int) -> int:
        """Blocks that no row sees any more once ``seen`` tokens are there."""
        if self.resolution.scales[scale][1] is None:
            return 0
        shortest = seen if self.where.padding is None else seen - int(self.where.padding.max())
        return int(self.resolution.remembered(scale, seen, shortest).start)

    def visible(self, scale: int, first: Tensor) -> Tensor:
        """Which keys, by the positions of their first tokens, each new token sees.

        Returns:
            bool, (queries, keys) or (batch, 1, queries, keys).
        """
        seen = self.resolution.visible(scale, self.where.positions, first)
        if self.where.starts is not None:
            seen = seen & (first[..., None, :] >= self.where.starts[:, :, None])
        return seen[:, None] if seen.ndim == 3 else seen

    def _join(self, name: str, new: Tensor) -> Tensor:
        old = self.state.get(self.prefix + name)
        # A copy of a part gives the whole back.
        size = new.numel() * new.element_size()
        alone = new if size == new.untyped_storage().nbytes() else new.clone()
        joined = alone if old is None else torch.cat((old, new), dim=2)
        self.state[self.prefix + name] = joined
        return joined

    def _keep_last(self, name: str, tensor: Tensor, count: int | None) -> None:
        if count is not None and tensor.shape[2] > count:
            # A copy, so that what is forgotten is given back.
            self.state[self.prefix + name] = tensor[:, :, tensor.shape[2] - count :].clone()


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens of (batch, heads, tokens, head_dim) at (batch, places)."""
    shape = (*tensor.shape[:2], index.shape[1], tensor.shape[3])
    return tensor.gather(2, index[:, None, :, None].expand(shape))
