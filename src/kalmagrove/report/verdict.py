"""One plain sentence that says what a comparison showed, and does not flatter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kalmagrove.report.results import Model, Results
from kalmagrove.report.statistics import FEWEST_SHOWN, Interval, median_spread
from kalmagrove.report.table import format_score, tokens_a_parameter

Tone = Literal["better", "mixed", "worse", "undecided"]
SMALL_CHANGE = 0.06
"""Change of perplexity that fewer than three seeds cannot tell from chance: small models' seeds differ so much."""
CONTROLS = ("slim", "llama-plus")
"""Dense models with kalmagrove's cheap tricks and its optimiser: what is left against them is Grove's and Arnold's."""

SAME_COST = 1.01
"""Ratio of a cost up to which it counts as no higher."""


@dataclass(frozen=True)
class Verdict:
    """The sentence and its tone: better, mixed (a price or a failure beside a gain), worse or undecided."""

    sentence: str
    tone: Tone


def verdict(results: Results) -> Verdict:
    """Judges the candidate by the baseline's test perplexity, and names what it costs."""
    candidate, baseline = results.model(results.candidate), results.model(results.baseline)
    ratio = candidate.ratio_to(baseline)
    if ratio is None:
        return _without_scores(candidate, baseline)
    claim, change = _claim(candidate.name, baseline.name, ratio)
    parts = [claim + _costs_text(results, candidate, baseline) + f" ({'; '.join(_caveats(results, ratio))})"]
    parts += [text for model in (candidate, baseline) if (text := _divergence(model))]
    parts += [text for text in (_better_other(results, candidate),) if text]
    tone = _tone(results, candidate, baseline, change)
    return Verdict("; ".join(parts) + ".", "undecided" if ratio.n < FEWEST_SHOWN and tone == "better" else tone)


def _without_scores(candidate: Model, baseline: Model) -> Verdict:
    """No seed has a test perplexity of both."""
    sides = (candidate, baseline)
    lost = [text for model in sides if (text := _divergence(model))]
    if any(_unfinished(model) for model in sides):
        done = " and ".join(f"{sum(r.finished for r in m.runs)} of {len(m.runs)} of {m.name}" for m in sides)
        sentence = "; ".join([f"Not finished, so there is no verdict yet: {done} runs are done", *lost])
        return Verdict(f"{sentence}.", "undecided")
    reason = " and ".join(lost) or "No seed has a test perplexity of both models"
    scores = [f"{model.name} reached {text}" for model in sides if (text := _mean_perplexity(model))]
    alone = _divergence(candidate) and not _divergence(baseline)
    sentence = "; ".join([f"{reason}, so there is nothing to compare", *scores])
    return Verdict(f"{sentence}.", "worse" if alone else "undecided")


def _unfinished(model: Model) -> bool:
    return any(not run.finished and not run.diverged for run in model.runs)


def _mean_perplexity(model: Model) -> str:
    values = list(model.by_seed("test", "perplexity").values())
    return f"a test perplexity of {format_score(sum(values) / len(values))}" if values else ""


def _claim(name: str, reference: str, ratio: Interval) -> tuple[str, Literal["lower", "same", "higher"]]:
    """The first clause, and which way it goes."""
    change = _percent(abs(ratio.mean - 1))
    direction: Literal["lower", "higher"] = "lower" if ratio.mean < 1 else "higher"
    if ratio.n >= FEWEST_SHOWN and ratio.includes(1.0):
        return f"{name} and {reference} are a tie within the interval of their test perplexity", "same"
    if ratio.n < FEWEST_SHOWN and abs(ratio.mean - 1) < SMALL_CHANGE:
        return f"{name} reached about the test perplexity of {reference}, {change} {direction},", "same"
    if direction == "lower":
        return f"{name} reached a test perplexity {change} lower than {reference}", direction
    return f"{name} did worse than {reference}: its test perplexity is {change} higher,", direction


def _percent(part: float) -> str:
    """Whole percents from 10 %, one decimal below."""
    return f"{part * 100:.0f} %" if part >= 0.0995 else f"{part * 100:.1f} %"


def _costs(results: Results, candidate: Model, baseline: Model) -> dict[str, float]:
    costs = {"parameters": candidate.parameters.total / max(1, baseline.parameters.total)}
    spread = median_spread(results.time_ratios(candidate.name))
    return costs if spread is None else costs | {"time a step": spread.median}


def _costs_text(results: Results, candidate: Model, baseline: Model) -> str:
    costs = [f"{ratio:.2f}x its {what}" for what, ratio in _costs(results, candidate, baseline).items()]
    return " with " + " and ".join(costs)


def _caveats(results: Results, ratio: Interval) -> list[str]:
    planned = len(results.seeds)
    count = f"{ratio.n} seed" if ratio.n == 1 else f"{ratio.n} seeds"
    if ratio.bounds is None:
        caveats = [f"{count}: no interval, so a small difference may be chance"]
    else:
        low, high = ratio.bounds
        caveats = [f"{count}: 95 % interval of the ratio {low:.3f} to {high:.3f}"]
    if any(_unfinished(results.model(name)) for name in (results.candidate, results.baseline)):
        caveats.append(f"not finished: {ratio.n} of {planned} seeds so far")
    if not results.is_tuned:
        caveats.append("learning rates not tuned")
    if results.screening:
        caveats.append(f"screening: {tokens_a_parameter(results)}")
    if results.model(results.candidate).preset.startswith("kalmagrove") and not any(
        model.preset.startswith(CONTROLS) for model in results.models
    ):
        caveats.append(f"optimiser and cheap tricks are in it: {' and '.join(CONTROLS)} tell them apart")
    return caveats


def _divergence(model: Model) -> str:
    lost = sum(run.diverged for run in model.runs)
    if lost == 0:
        return ""
    if lost == len(model.runs):
        return f"{model.name} diverged" if lost == 1 else f"{model.name} diverged in all {lost} runs"
    return f"{model.name} diverged in {lost} of {len(model.runs)} runs, which the numbers leave out"


def _better_other(results: Results, candidate: Model) -> str:
    """Names the best of the other models, if it did better than the candidate."""
    found = []
    for model in results.models:
        ratio = model.ratio_to(candidate) if model.name not in (candidate.name, results.baseline) else None
        if ratio is not None and _is_lower(ratio):
            found.append((ratio.mean, model.name))
    if not found:
        return ""
    mean, name = min(found)
    return f"{name} did better than {candidate.name}: {_percent(1 - mean)} lower"


def _is_lower(ratio: Interval) -> bool:
    return ratio.mean < 1 - SMALL_CHANGE if ratio.bounds is None else ratio.bounds[1] < 1


def _tone(results: Results, candidate: Model, baseline: Model, change: Literal["lower", "same", "higher"]) -> Tone:
    costs = _costs(results, candidate, baseline).values()
    flawed = any(run.diverged for run in candidate.runs)
    if change == "same":
        return "worse" if flawed else "undecided"
    if change == "lower":
        return "mixed" if flawed or any(cost > SAME_COST for cost in costs) else "better"
    cheaper = all(cost <= SAME_COST for cost in costs) and any(cost < 1 / SAME_COST for cost in costs)
    return "mixed" if cheaper and not flawed else "worse"
