"""An answered claim, and how intervals become a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kalmagrove.report.statistics import Interval, Spread

Verdict = Literal["supported", "not supported", "undecided", "not measured"]
FEWEST_TIMES = 5
"""Paired ratios of times below which their quantiles tell nothing."""


@dataclass(frozen=True)
class Answer:
    """One claim of the paper.

    Attributes:
        name: C1 to C14.
        claim: What the paper says, in a few words.
        paper: Its numbers, where it has some.
        ours: Ours.
        verdict: The answer.
        reason: Why that is the answer, and what it does not cover.
    """

    name: str
    claim: str
    paper: str
    ours: str
    verdict: Verdict
    reason: str


def judge_below(values: Sequence[Interval | None], level: float = 1.0) -> Verdict:
    """Whether values are below a level: all of them with their whole intervals, or one of them surely not.

    A value without an interval, of fewer than three seeds, decides nothing.
    """
    known = [value for value in values if value is not None]
    if not known:
        return "not measured"
    bounds = [value.bounds for value in known]
    if any(bound is not None and bound[0] > level for bound in bounds):
        return "not supported"
    if len(known) == len(values) and all(bound is not None and bound[1] < level for bound in bounds):
        return "supported"
    return "undecided"


def judge_times(spreads: Sequence[Spread | None]) -> Verdict:
    """Whether paired ratios of times are below one, from their 10 % to their 90 % quantile; a few decide nothing."""
    verdicts: list[Verdict] = []
    for spread in spreads:
        if spread is None:
            verdicts.append("not measured")
        elif spread.n < FEWEST_TIMES:
            verdicts.append("undecided")
        elif spread.high < 1:
            verdicts.append("supported")
        else:
            verdicts.append("not supported" if spread.low > 1 else "undecided")
    return all_of(verdicts)


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of a claim that has several parts, all of which it needs."""
    if "not supported" in verdicts:
        return "not supported"
    if set(verdicts) <= {"not measured"}:
        return "not measured"
    return "supported" if set(verdicts) == {"supported"} else "undecided"


def shown(ratio: Interval | None) -> str:
    """A ratio with its interval, or without one and the number of its seeds."""
    if ratio is None:
        return "-"
    if ratio.bounds is None:
        return f"{ratio.mean:.3f}x ({ratio.n} seed{'' if ratio.n == 1 else 's'})"
    return f"{ratio.mean:.3f}x ({ratio.bounds[0]:.3f}-{ratio.bounds[1]:.3f})"


def shown_time(spread: Spread | None) -> str:
    """The middle of paired ratios of times with its spread."""
    return "-" if spread is None else f"{spread.median:.2f}x (10-90 %: {spread.low:.2f}-{spread.high:.2f})"
