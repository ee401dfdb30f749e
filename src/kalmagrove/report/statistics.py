"""Means with their uncertainty, ratios paired by seed, and the spread of many ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FEWEST_SHOWN = 3
"""Seeds below which an interval is too wide to tell anything, and is not shown."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        mean: Arithmetic mean; of ratios, the geometric one.
        low: Lower bound, or None with fewer than two values.
        high: Upper bound, or None with fewer than two values.
        n: Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both bounds where there are enough values to show them, else None."""
        if self.low is None or self.high is None or self.n < FEWEST_SHOWN:
            return None
        return self.low, self.high

    def includes(self, value: float) -> bool:
        """Whether there are bounds to show and the value is within them."""
        return self.bounds is not None and self.bounds[0] <= value <= self.bounds[1]


@dataclass(frozen=True)
class Spread:
    """The middle of many values: their median, the 10 % and 90 % quantiles, and how many they are."""

    median: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean with Student's 95 % interval.

    Raises:
        ValueError: There are no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("the mean of no values is not defined")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None, 1)
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half_width = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / count)
    return Interval(mean, mean - half_width, mean + half_width, count)


def ratio_interval(candidate: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The geometric mean of candidate over baseline, paired by seed, with its interval.

    Args:
        candidate: Positive values by seed.
        baseline: Positive values by seed.

    Returns:
        None where no seed has both.
    """
    seeds = sorted(candidate.keys() & baseline.keys())
    logs = [math.log(candidate[seed] / baseline[seed]) for seed in seeds if candidate[seed] > 0 < baseline[seed]]
    if not logs:
        return None
    interval = mean_interval(logs)
    low, high = (None if bound is None else math.exp(bound) for bound in (interval.low, interval.high))
    return Interval(math.exp(interval.mean), low, high, interval.n)


def median_spread(ratios: Sequence[float]) -> Spread | None:
    """The median and the 10 % and 90 % quantiles, interpolated linearly; None where there are no ratios."""
    if not ratios:
        return None
    ordered = sorted(ratios)
    return Spread(_quantile(ordered, 0.5), _quantile(ordered, 0.1), _quantile(ordered, 0.9), len(ordered))


def _quantile(ordered: Sequence[float], part: float) -> float:
    position = part * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
