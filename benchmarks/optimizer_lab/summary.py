"""What the runs of one scale say: losses at the best rate, the span of rates that works, and steps saved."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
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
        is_at_edge: Whether no worse one was tried on one of its sides.
        loss: Validation loss at that rate and full length over seeds, nats a token; None where it diverged.
        span: Largest over smallest rate, of those beside the best, with a loss within ``CLOSE`` of the best one.
        spikes: In a thousand steps, mean over its full-length runs at the best rate; None where they are too short.
        optimizer_share: Part of a step's time that the optimiser takes.
        step_seconds: Median of a step.
        state_bytes: Of the optimiser.
    """

    method: str
    lr: float
    is_at_edge: bool
    loss: Interval | None
    span: float
    spikes: float | None
    optimizer_share: float
    step_seconds: float
    state_bytes: int


def valid_loss(record: Record) -> float:
    """Validation loss; infinite where the run diverged, or where it is no number and null in its file."""
    return math.inf if record["diverged"] or record["valid"] is None else float(record["valid"])


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


def summarize(trials: list[Record], repeats: list[Record], method: str, is_at_edge: bool) -> MethodSummary:
    """Of the trials of all rates with one seed, and the repeats of the best rate with every seed."""
    own = [r for r in repeats if r["method"] == method]
    losses = [valid_loss(r) for r in own]
    step = statistics.median(r["step_seconds"] for r in own)
    spikes = [r["spikes"] for r in own if r["spikes"] is not None]
    return MethodSummary(
        method=method,
        lr=own[0]["lr"],
        is_at_edge=is_at_edge,
        loss=mean_interval(losses) if all(map(math.isfinite, losses)) else None,
        span=working_span(trials, method),
        spikes=statistics.fmean(spikes) if spikes else None,
        optimizer_share=statistics.median(r["optimizer_seconds"] for r in own) / step,
        step_seconds=step,
        state_bytes=own[0]["state_bytes"],
    )


@dataclass(frozen=True)
class Needed:
    """Steps as parts of the full run.

    Attributes:
        part: Over seeds.
        is_at_most: Whether the shortest run was good enough with some seed already.
    """

    part: Interval
    is_at_most: bool


def part_of_steps(lengths: dict[float, float], target: float) -> float | None:
    """The part of the full run after which a run *of that length* ends at ``target``.

    Args:
        lengths: Final loss by length, as parts of the full run; infinity where it diverged.
        target: A loss.

    Returns:
        Interpolated in the logarithm of the length; the smallest length where even that is good enough, and None
        where the longest is not.
    """
    rows = sorted((length, loss) for length, loss in lengths.items() if math.isfinite(loss))
    if rows and rows[0][1] <= target:
        return rows[0][0]
    for (short, high), (long, low) in itertools.pairwise(rows):
        if low <= target:
            weight = (high - target) / (high - low)
            return math.exp(math.log(short) * (1 - weight) + math.log(long) * weight)
    return None


def steps_needed(candidate: Sequence[Record], rival: Sequence[Record], part: float) -> Needed | None:
    """How many of a rival's steps the candidate needs for the rival's final loss, over seeds that did not diverge.

    Args:
        candidate: Its runs of all lengths and seeds.
        rival: The runs of full length.
        part: That length, as the records have it.

    Returns:
        None where the candidate does not reach the loss with some seed, or the rival always diverged.
    """
    parts, shortest = [], False
    for record in rival:
        if not math.isfinite(valid_loss(record)):
            continue
        lengths = {r["part"] / part: valid_loss(r) for r in candidate if r["seed"] == record["seed"]}
        reached = part_of_steps(lengths, valid_loss(record))
        if reached is None:
            return None
        parts.append(reached)
        shortest |= reached == min(lengths)
    return Needed(mean_interval(parts), shortest) if parts else None


def table(scale: str, summaries: Sequence[MethodSummary], needed: dict[str, Needed | None], candidate: str) -> str:
    """Markdown, a row a method."""
    columns = [
        "lr",
        "valid loss",
        "within 1 % over",
        f"steps of {candidate}",
        "spikes in 1,000",
        "ms a step",
        "own share",
        "state",
    ]
    lines = ["| " + " | ".join([scale, *columns]) + " |", "| :-- |" + " --: |" * len(columns)]
    for row in summaries:
        loss = "diverged" if row.loss is None else _interval(row.loss)
        reached = _steps(needed[row.method]) if row.method in needed else ""
        spikes = "-" if row.spikes is None else f"{row.spikes:.2g}"
        lr = f"{row.lr:g}{' (at the edge)' if row.is_at_edge else ''}"
        lines.append(
            f"| {row.method} | {lr} | {loss} | {row.span:g}x | {reached} | {spikes} | "
            f"{row.step_seconds * 1e3:.0f} | {row.optimizer_share:.1%} | {row.state_bytes / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def _steps(needed: Needed | None) -> str:
    if needed is None:
        return "loss not reached"
    return f"{'at most ' if needed.is_at_most else ''}{_interval(needed.part, digits=2)} x"


def _interval(interval: Interval, digits: int = 3) -> str:
    middle = f"{interval.mean:.{digits}f}"
    if interval.bounds is None:
        return middle
    low, high = interval.bounds
    return f"{middle} ({low:.{digits}f}-{high:.{digits}f})"
