"""An answered claim, and how an interval becomes a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kalmagrove.report.statistics import Interval

Verdict = Literal["supported", "not supported", "undecided", "not measured"]


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


def judge_below_one(ratios: Sequence[Interval | None]) -> Verdict:
    """Whether ratios are below one: all of them with their whole intervals, or one of them surely not.

    A ratio without an interval, of fewer than three seeds, decides nothing.
    """
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "not measured"
    bounds = [ratio.bounds for ratio in known]
    if any(bound is not None and bound[0] > 1 for bound in bounds):
        return "not supported"
    if len(known) == len(ratios) and all(bound is not None and bound[1] < 1 for bound in bounds):
        return "supported"
    return "undecided"


def shown(ratio: Interval | None) -> str:
    """A ratio with its interval, or without one and the number of its seeds."""
    if ratio is None:
        return "-"
    if ratio.bounds is None:
        return f"{ratio.mean:.3f}x ({ratio.n} seed{'' if ratio.n == 1 else 's'})"
    return f"{ratio.mean:.3f}x ({ratio.bounds[0]:.3f}-{ratio.bounds[1]:.3f})"
