"""The scale of a column of numbers: where a value lies among the training values, and in which of their bins."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kalmagrove.modalities.number import KNOTS

FEWEST_A_BIN = 4
"""Training values of a bin, in the mean, where a column has more values than bins."""
_LARGEST_SCALED = 1e6


@dataclass(frozen=True)
class NumberScale:
    """What a column's training values say about a value; bins hold about as many of them each.

    Attributes:
        centre: Their median.
        spread: Their standard deviation, told from the quartiles where these differ.
        knots: Increasing values between which a value's place is interpolated: the smallest, quantiles and the largest.
        lows: The smallest training value of each bin.
        highs: The largest of each bin; a bin of one value has it as its smallest too.
        means: The mean of each bin.
    """

    centre: float
    spread: float
    knots: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    means: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.knots, self.lows, self.highs, self.means)
        flat = np.array([self.centre, self.spread, *(value for values in numbers for value in values)], dtype=float)
        if not np.isfinite(flat).all() or self.spread <= 0:
            raise ValueError("its centre, spread, knots and bins must be finite numbers and the spread positive")
        if not 0 < len(self.knots) <= KNOTS or (np.diff(self.knots) <= 0).any():
            raise ValueError(f"its knots must be 1 to {KNOTS} and increase")
        if not self.lows or not len(self.lows) == len(self.highs) == len(self.means):
            raise ValueError("its bins must each have a smallest, a largest and a mean value")
        bounds = np.stack((self.lows, self.means, self.highs), axis=1).reshape(-1)
        if (np.diff(bounds) < -1e-9 * self.spread).any() or (np.array(self.lows[1:]) <= self.highs[:-1]).any():
            raise ValueError("its bins must increase")

    @property
    def bins(self) -> int:
        """How many there are."""
        return len(self.means)

    @property
    def is_exact(self) -> bool:
        """Whether each bin is one value."""
        return self.lows == self.highs

    @cached_property
    def _edges(self) -> list[float]:
        return [_between(high, low) for high, low in zip(self.highs[:-1], self.lows[1:], strict=True)]

    def features(self, value: float) -> tuple[float, float, int]:
        """Place (0 to 1), scaled size and bin of a value; one beyond the training values is in the outermost bin."""
        scaled = min(max((value - self.centre) / self.spread, -_LARGEST_SCALED), _LARGEST_SCALED)
        # A knot of the column is one of the embedding's, so that few values have a vector each.
        return self._knots_below(value) / (KNOTS - 1), scaled, bisect_left(self._edges, value)

    def _knots_below(self, value: float) -> float:
        """How many knots lie below a value, with the part of the way to the next one; the first does not count."""
        knots = self.knots
        if value <= knots[0] or value >= knots[-1]:
            return 0.0 if value <= knots[0] else len(knots) - 1.0
        above = bisect_right(knots, value)
        return above - 1 + (value - knots[above - 1]) / (knots[above] - knots[above - 1])

    def mean(self, probabilities: np.ndarray) -> np.ndarray:
        """Means (rows,) of distributions over the bins (rows, bins)."""
        return np.asarray(probabilities @ np.array(self.means))

    def quantile(self, probabilities: np.ndarray, level: float) -> np.ndarray:
        """Quantiles (rows,) of distributions over the bins (rows, bins), spread evenly within a bin."""
        sums = probabilities.cumsum(axis=1)
        total = sums[:, -1]
        chosen = np.minimum((sums < level * total[:, None]).sum(axis=1), self.bins - 1)
        rows = np.arange(len(probabilities))
        own = probabilities[rows, chosen]
        inside = np.clip((level * total - sums[rows, chosen] + own) / np.maximum(own, 1e-300), 0, 1)
        lows, highs = np.array(self.lows)[chosen], np.array(self.highs)[chosen]
        # Over a wide bin the sum is rounded beyond its end.
        return np.minimum(lows + inside * (highs - lows), highs)


def _between(below: float, above: float) -> float:
    """The middle of two numbers, or the lower one of neighbours that have no number between them."""
    middle = (below + above) / 2
    return middle if middle < above else below


def make_scale(values: Sequence[float] | np.ndarray, *, bins: int) -> NumberScale:
    """The scale of a column's training values.

    Args:
        values: At least one, finite.
        bins: Most of them. Up to so many different values have a bin each; a value that fills a bin alone has one too.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    different, counts = np.unique(ordered, return_counts=True)
    if len(different) > bins:
        bins = max(2, min(bins, len(ordered) // FEWEST_A_BIN))
    groups = _bins_of(counts, bins) if len(different) > bins else np.arange(len(different))
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    ends = np.append(starts[1:], len(different)) - 1
    weight = np.add.reduceat(counts, starts)
    # Relative to the smallest, so that large values keep their digits.
    offsets = np.add.reduceat((different - different[0]) * counts, starts) / weight
    means = np.clip(different[0] + offsets, different[starts], different[ends])
    middle, spread = _middle_and_spread(ordered)
    return NumberScale(
        centre=middle,
        spread=spread,
        knots=tuple(_knots(ordered, different).tolist()),
        lows=tuple(different[starts].tolist()),
        highs=tuple(different[ends].tolist()),
        means=tuple(means.tolist()),
    )


def _bins_of(counts: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each different value, (values,): consecutive values whose counts come to an equal share."""
    groups = np.empty(len(counts), dtype=np.int64)
    group, inside, left, free, is_full = 0, 0, int(counts.sum()), bins, False
    for place, count in enumerate(counts.tolist()):
        share = left / max(1, free)
        # A bin is closed where the value would lead further beyond the share than its lack leads below it, and on both
        # sides of a value that fills one.
        if inside and free > 1 and (is_full or count >= share or inside + count / 2 > share):
            group, left, free, inside = group + 1, left - inside, free - 1, 0
        groups[place] = group
        is_full = count >= share
        inside += count
    return groups


def _knots(ordered: np.ndarray, different: np.ndarray) -> np.ndarray:
    if len(different) <= KNOTS:
        return different
    return np.unique(np.quantile(ordered, np.linspace(0, 1, KNOTS)))


def _middle_and_spread(ordered: np.ndarray) -> tuple[float, float]:
    lower, middle, upper = (float(value) for value in np.quantile(ordered, (0.25, 0.5, 0.75)))
    # 1.349 standard deviations of a normal distribution lie between its quartiles.
    spread = (upper - lower) / 1.349 or float(np.std(ordered)) or 1.0
    return middle, spread if np.isfinite(spread) else 1.0
