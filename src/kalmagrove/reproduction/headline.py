"""The first paragraph of the page: our model against the better Transformer and both controls, with the targets."""

from __future__ import annotations

from kalmagrove.report.results import Model
from kalmagrove.reproduction.answers import shown
from kalmagrove.reproduction.pairs import Pair, described

PARAMETERS, TIME, PERPLEXITY = 0.50, 0.60, 0.90
"""Targets against the better plain Transformer with its usual optimiser: at most these ratios."""
AS_GOOD = 1.00
"""Target of perplexity: at most this against llama-plus, and below it against slim."""


def headline(pair: Pair) -> str:
    """One sentence about a pair, each ratio with its target and whether it was met, by its mean alone or surely."""
    ours, rival = pair.ours, pair.rival
    size = ours.parameters.total / rival.parameters.total
    parts = [f"{size:.2f}x of the parameters ({_met(round(size, 2) <= PARAMETERS, PARAMETERS)})"]
    if pair.time is not None:
        seconds = pair.time.median
        parts.append(f"{seconds:.2f}x of the time of a step ({_met(round(seconds, 2) <= TIME, TIME)})")
    parts += _perplexity(pair, rival, PERPLEXITY)
    for family, is_strict in (("llama-plus", False), ("slim", True)):
        control = pair.study.find(family)
        parts += [] if control is None else _perplexity(pair, control, AS_GOOD, is_strict=is_strict)
    same_optimizer = pair.study.find("llama", optim=ours.optim)
    if same_optimizer is not None and same_optimizer.name != rival.name:
        ratio = shown(pair.perplexity("test", same_optimizer))
        parts.append(f"{ratio} of that of {described(same_optimizer)}, the same Transformer with our optimiser")
    budget = pair.study.results.budget
    terms = f"context {budget.context_length:,}, {budget.tokens_per_step:,} tokens a step"
    return f"**{pair.name}**, {terms}: {ours.name} against {described(rival)} has {', '.join(parts)}."


def _perplexity(pair: Pair, rival: Model, target: float, *, is_strict: bool = False) -> list[str]:
    ratio = pair.perplexity("test", rival)
    if ratio is None:
        return []
    is_met = ratio.mean < target if is_strict else ratio.mean <= target
    is_sure = ratio.bounds is not None and ratio.bounds[1] <= target
    verdict = _met(is_met, target, is_strict=is_strict) + (" by its mean alone" if is_met and not is_sure else "")
    return [f"{shown(ratio)} of {rival.name}'s test perplexity ({verdict})"]


def _met(is_met: bool, target: float, *, is_strict: bool = False) -> str:
    wanted = f"target {'below ' if is_strict else ''}{target:.2f}x"
    return f"{wanted}, met" if is_met else f"{wanted}, **missed**"
