"""What a fit says about equation 6 and f(r) of the paper: supported, not supported or undecided, at the scale seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Verdict = Literal["supported", "not supported", "undecided"]
EQUAL_WITHIN = 0.05
"""Data exponents that differ by no more than this count as about equal."""


@dataclass(frozen=True)
class Claim:
    """An answered claim.

    Attributes:
        name: Such as C10.
        says: What the paper says.
        verdict: The answer.
        reason: The numbers that it rests on.
    """

    name: str
    says: str
    verdict: Verdict
    reason: str


def scaling_claims(summary: Mapping[str, Any]) -> dict[str, list[Claim]]:
    """The claims for each pair of families, and those of one family under its own name.

    Args:
        summary: As ``fit.json`` holds it.
    """
    found: dict[str, list[Claim]] = {}
    tuning = {family["family"]: family for family in summary.get("tuning", [])}
    warned = {
        name: [*_warnings(family["laws"]), *_doubts_about_rates(name, tuning.get(name))]
        for name, family in summary["families"].items()
    }
    left_out = [f"left out: {line}" for line in summary["left_out"]]
    for pair, laws in summary["differences"].items():
        both = next((one, other) for one in warned for other in warned if f"{one} - {other}" == pair)
        careful = [line for name in both for line in warned[name]] + left_out
        found[pair] = [_held_back(claim, careful) for claim in (_steeper(laws), _same_data_exponent(laws))]
    for name, family in summary["families"].items():
        if any("gamma" in law["constants"] for law in family["laws"].values()):
            found[name] = [_held_back(_rank(family["laws"]), warned[name] + left_out)]
    return found


def _warnings(laws: Mapping[str, Any]) -> list[str]:
    return [warning for law in laws.values() for warning in law["warnings"]]


def _doubts_about_rates(family: str, tuning: Mapping[str, Any] | None) -> list[str]:
    """What speaks against a family's learning rates; the record is of the sweep that its runs come from, if any."""
    if tuning is None:
        return [f"how the learning rates of {family} were found was not written down"]
    if not tuning["trials"]:
        return [f"learning rates of {family} not tuned"]
    doubts = []
    if tuning["at_the_edge"]:
        doubts.append(f"the best learning rate of {family} is at the edge of those that were tried")
    check = tuning["check"]
    if check is not None and check["best"] != 1:
        doubts.append(f"{family} at {check['size']} did better with x{check['best']:g} of the rate carried there")
    return doubts


def _held_back(claim: Claim, careful: Sequence[str]) -> Claim:
    """A claim that a fit supports which a reader is warned of is undecided."""
    if claim.verdict != "supported" or not careful:
        return claim
    return replace(claim, verdict="undecided", reason=f"{claim.reason}; {'; '.join(dict.fromkeys(careful))}")


def _steeper(laws: Mapping[str, Any]) -> Claim:
    verdicts = {law: found["alpha"]["verdict"] for law, found in laws.items()}
    verdict: Verdict = "undecided"
    if all(value == "larger" for value in verdicts.values()):
        verdict = "supported"
    elif all(value == "smaller" for value in verdicts.values()):
        verdict = "not supported"
    return Claim("C10", "perplexity falls more steeply with parameters", verdict, _numbers(laws, "alpha"))


def _same_data_exponent(laws: Mapping[str, Any]) -> Claim:
    intervals = [found["beta"]["interval"] for found in laws.values()]
    verdict: Verdict = "undecided"
    if all(low >= -EQUAL_WITHIN and high <= EQUAL_WITHIN for low, high in intervals):
        verdict = "supported"
    elif all(low > EQUAL_WITHIN or high < -EQUAL_WITHIN for low, high in intervals):
        verdict = "not supported"
    return Claim("C11", "the exponent of the data is about the same", verdict, _numbers(laws, "beta"))


def _rank(laws: Mapping[str, Any]) -> Claim:
    intervals = {name: law["intervals"]["gamma"] for name, law in laws.items() if "gamma" in law["constants"]}
    verdict: Verdict = "undecided"
    if all(low > 0 for low, _ in intervals.values()):
        verdict = "supported"
    elif all(high < 0 for _, high in intervals.values()):
        verdict = "not supported"
    numbers = "; ".join(
        f"{name}: gamma {laws[name]['constants']['gamma']:+.3f} ({low:+.3f} to {high:+.3f})"
        for name, (low, high) in intervals.items()
    )
    return Claim("C12", "a larger rank lowers the loss, f(r) = r^-gamma", verdict, numbers)


def _numbers(laws: Mapping[str, Any], exponent: str) -> str:
    return "; ".join(
        f"{law}: {found[exponent]['difference']:+.3f} "
        f"({found[exponent]['interval'][0]:+.3f} to {found[exponent]['interval'][1]:+.3f})"
        for law, found in laws.items()
    )
