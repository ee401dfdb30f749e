"""What the runs of one scale say: losses at the best rate, the span of rates that works, and steps saved."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from kalmagrove.report.statistics import Interval, mean_interval

Record = dict[str, Any]

CLOSE = 0.01
"""A learning rate works where its loss is within this part of the best one."""


@dataclass(frozen=True)
class MethodSummary:
    """One optimiser at one scale.

    Attributes:
        method: Its name.
        lr: The best rate, chosen with the first seed.
        loss: Validation loss at that rate and full length over seeds, nats a token; None where it diverged.
        span: Largest over smallest rate, of those beside the best, with a loss within ``CLOSE`` of the best one.
        spikes: Of all its full-length runs at the best rate.
        optimizer_share: Part of a step's time that the optimiser takes.
        step_seconds: Median of a step.
        state_bytes: Of the optimiser.
    """

    method: str
    lr: float
    loss: Interval | None
    span: float
    spikes: int
    optimizer_share: float
    step_seconds: float
    state_bytes: int


def valid_loss(record: Record) -> float:
    """Validation loss; infinite where the run diverged."""
    return math.inf if record["diverged"] else record["valid"]


def best_rate(records: list[Record], method: str) -> float:
    """The learning rate with the lowest validation loss."""
    return min((r for r in records if r["method"] == method), key=valid_loss)["lr"]


def working_span(records: list[Record], method: str) -> float:
    """Over the rates of the first seed: largest over smallest of an unbroken row that is close to the best."""
    losses = {r["lr"]: valid_loss(r) for r in records if r["method"] == method}
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    works = [losses[lr] <= losses[best] * (1 + CLOSE) for lr in rates]
    low = high = rates.index(best)
    while low > 0 and works[low - 1]:
        low -= 1
    while high + 1 < len(rates) and works[high + 1]:
        high += 1
    return rates[high] / rates[low]


def summarize(trials: list[Record], repeats: list[Record], method: str) -> MethodSummary:
    """Of the trials of all rates with one seed, and the repeats of the best rate with every seed."""
    own = [r for r in repeats if r["method"] == method]
    losses = [valid_loss(r) for r in own]
    step = statistics.median(r["step_seconds"] for r in own)
    return MethodSummary(
        method=method,
        lr=own[0]["lr"],
        loss=mean_interval(losses) if all(map(math.isfinite, losses)) else None,
        span=working_span(trials, method),
        spikes=sum(r["spikes"] for r in own),
        optimizer_share=statistics.median(r["optimizer_seconds"] for r in own) / step,
        step_seconds=step,
        state_bytes=own[0]["state_bytes"],
    )


def part_of_steps(lengths: dict[float, float], target: float) -> float | None:
    """The part of the full run after which a run *of that length* ends at ``target``.

    Args:
        lengths: Final loss by length, as parts of the full run.
        target: A loss.

    Returns:
        Interpolated in the logarithm of the length; the smallest length where even that is good enough, and None
        where the longest is not.
    """
    rows = sorted(lengths.items())
    if rows[0][1] <= target:
        return rows[0][0]
    for (short, high), (long, low) in zip(rows, rows[1:], strict=False):
        if low <= target:
            weight = (high - target) / (high - low)
            return math.exp(math.log(short) * (1 - weight) + math.log(long) * weight)
    return None
