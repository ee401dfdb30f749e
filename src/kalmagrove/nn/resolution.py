"""What a group of heads sees: the near past token by token, and what lies further back in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Scale(NamedTuple):
    """Keys of one size.

    Attributes:
        stride: Tokens that one key stands for.
        reach: Tokens back that keys of this size cover, the query's own token included; None is everything.
    """

    stride: int = 1
    reach: int | None = None


@dataclass(frozen=True)
class Resolution:
    """One group of heads and the scales that each of its heads attends to under one softmax.

    Each scale covers what lies beyond the reach of the one before it: ``[(1, 256), (16, None)]`` sees the last 256
    tokens one by one and everything before them in blocks of 16. A block is seen as long as its first token is within
    reach, and is left to the finer scale as long as that sees all of it.

    Attributes:
        num_heads: Heads of the group.
        head_dim: Size of a head.
        scales: Pairs (stride, reach), from fine to coarse.

    Raises:
        ValueError: A number is not positive, the first stride is not 1, a stride is no multiple of the one before, a
            reach does not grow or is shorter than the next stride, or a scale comes after one that covers everything.
    """

    num_heads: int
    head_dim: int
    scales: Sequence[tuple[int, int | None]] = (Scale(),)

    def __post_init__(self) -> None:
        try:
            scales = tuple(Scale(*scale) for scale in self.scales)
        except TypeError as error:
            raise ValueError(f"scales is a list of pairs (stride, reach), got {self.scales!r}") from error
        object.__setattr__(self, "scales", scales)
        numbers = [self.num_heads, self.head_dim, *(x for scale in scales for x in scale if x is not None)]
        if not scales or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in numbers):
            raise ValueError(f"num_heads, head_dim, strides and reaches must be positive integers, got {self}")
        if scales[0].stride != 1:
            raise ValueError(f"the first scale has stride 1, the tokens themselves; got {scales[0].stride}")
        for finer, coarser in pairwise(scales):
            if finer.reach is None:
                raise ValueError(
                    f"scale {tuple(finer)} covers everything; {tuple(coarser)} after it has nothing to see"
                )
            if coarser.stride <= finer.stride or coarser.stride % finer.stride:
                raise ValueError(f"stride {coarser.stride} is no multiple of the finer one, {finer.stride}")
            if finer.reach < coarser.stride:
                raise ValueError(f"reach {finer.reach} is shorter than the next stride, {coarser.stride}")
            if coarser.reach is not None and coarser.reach <= finer.reach:
                raise ValueError(f"reach {coarser.reach} is not above the finer one, {finer.reach}")

    @property
    def width(self) -> int:
        """Channels of the group."""
        return self.num_heads * self.head_dim

    @property
    def coarse(self) -> tuple[tuple[int, tuple[int, int | None]], ...]:
        """The scales above the tokens, with their numbers."""
        return tuple(enumerate(self.scales))[1:]

    def nearest(self, scale: int) -> int:
        """Tokens back that are left to the finer scales."""
        return 0 if scale == 0 else self.scales[scale - 1][1] or 0

    def used(self, length: int) -> Resolution:
        """The same without the scales that a text of this length never meets."""
        scales = [scale for index, scale in enumerate(self.scales) if index == 0 or self.nearest(index) < length]
        last = scales[-1]
        if last[1] is not None and last[1] >= length:
            scales[-1] = (last[0], None)
        return Resolution(self.num_heads, self.head_dim, scales)

    def visible(self, scale: int, queries: Tensor, firsts: Tensor) -> Tensor:
        """Which keys of a scale each query may see.

        A block whose first token lies beyond the finer scale's reach is finished, since that is not below the stride.

        Args:
            scale: Number of the scale.
            queries: Positions, (..., queries).
            firsts: Positions of the keys' first tokens, (..., keys).

        Returns:
            bool, (..., queries, keys).
        """
        first, query = firsts[..., None, :], queries[..., :, None]
        seen = first <= query - self.nearest(scale)
        reach = self.scales[scale][1]
        return seen if reach is None else seen & (first > query - reach)

    def seen_by(self, scale: int, start: int, end: int) -> slice:
        """The keys of a scale that any of the queries ``start .. end - 1`` sees."""
        stride, reach = self.scales[scale]
        stop = max(0, (end - 1 - self.nearest(scale)) // stride + 1)
        oldest = 0 if reach is None else max(0, (start - reach) // stride + 1)
        return slice(min(oldest, stop), stop)

    def remembered(self, scale: int, length: int, shortest: int | None = None) -> slice:
        """The finished keys of a scale that the queries after ``length`` tokens can still see.

        Args:
            scale: Number of the scale.
            length: Tokens of the longest text.
            shortest: Tokens of the shortest text that shares the memory; None is the same.
        """
        stride, reach = self.scales[scale]
        shortest = length if shortest is None else max(0, shortest)
        oldest = 0 if reach is None else max(0, (shortest - reach) // stride + 1)
        return slice(min(oldest, shortest // stride), length // stride)


def first_tokens(keys: slice, stride: int, device: torch.device) -> Tensor:
    """Positions of the first tokens of keys, (keys,)."""
    return torch.arange(keys.start, keys.stop, device=device) * stride
