"""The claims about Kalma by itself: fewer steps, and stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kalmagrove.comparison.spikes import WARMUP
from kalmagrove.report.results import Model
from kalmagrove.report.statistics import CONFIDENCE, FEWEST_SHOWN
from kalmagrove.reproduction.answers import Answer, Verdict, judge_below, shown
from kalmagrove.reproduction.evidence import Evidence, Study, mean_of, part_to_reach
from kalmagrove.reproduction.pairs import doubts_about, held_back, with_doubts
from kalmagrove.reproduction.table_claims import in_seconds, scaled

CLOSE = 0.1
"""Nats above the best within which a learning rate counts as one that trains."""
GRID_STEP = 2.0
"""How far apart rates are tried, with one seed: widths that differ by no more are a tie."""


def _of_kalma(study: Study) -> Model | None:
    return study.find("llama", optim="kalma")


def _of_adamw(study: Study) -> Model | None:
    return study.find("llama", optim="adamw")


def _rates_tried(study: Study) -> int:
    return sum(len(model.lr_trials) for model in (_of_kalma(study), _of_adamw(study)) if model is not None)


def _kalma_and_adamw(
    evidence: Evidence, most: Callable[[Study], float] = lambda _: 0
) -> tuple[Study, Model, Model] | None:
    study = evidence.study_of(_of_kalma, _of_adamw, most=most)
    kalma, adamw = (find(study) if study else None for find in (_of_kalma, _of_adamw))
    return None if study is None or kalma is None or adamw is None else (study, kalma, adamw)


def fewer_steps(evidence: Evidence) -> Answer:
    """C5."""
    claim, reason = "fewer iterations", "llama with Kalma against llama with AdamW: steps to AdamW's last loss"
    found = _kalma_and_adamw(evidence)
    parts = {} if found is None else part_to_reach(found[1], found[2])
    if found is None or not parts:
        return Answer("C5", claim, "", "-", "not measured", reason)
    study, kalma, adamw = found
    doubts = doubts_about(study, kalma, adamw)
    reached = {seed: part for seed, part in parts.items() if part is not None}
    if len(reached) < len(parts):
        ours = f"AdamW's last loss was reached with {len(reached)} of {len(parts)} seeds"
        # Each seed without it needs more steps than AdamW; how many, nobody saw.
        fails = not reached and len(parts) >= FEWEST_SHOWN
        return Answer("C5", claim, "", ours, "not supported" if fails else "undecided", with_doubts(reason, doubts))
    steps, spread = scaled(reached, 1.0), study.time_of(kalma, adamw)
    seconds = None if spread is None else in_seconds(reached, spread)
    reason = (
        f"{reason}, in {study.name}; an upper bound, as it is read in mid-schedule, from losses on a part of the "
        "validation split; the verdict is of the steps"
    )
    ours = f"{shown(steps)} of the steps, {shown(seconds)} of the seconds"
    return Answer("C5", claim, "", ours, held_back(judge_below([steps]), doubts), with_doubts(reason, doubts))


@dataclass(frozen=True)
class TrainedRates:
    """The learning rates around the best that end near it.

    Attributes:
        factor: The largest over the smallest.
        is_whole: Whether worse ones were tried on both sides; else there may be more of them.
    """

    factor: float
    is_whole: bool


def trained_rates(model: Model, within: float) -> TrainedRates | None:
    """The rates of a model's trials that end within so many nats of the best; None where fewer than two did end."""
    losses = {trial.lr_scale: math.inf if trial.valid_loss is None else trial.valid_loss for trial in model.lr_trials}
    scales = sorted(losses)
    if sum(map(math.isfinite, losses.values())) < 2:
        return None
    is_good = [losses[scale] <= min(losses.values()) + within for scale in scales]
    first = last = scales.index(min(scales, key=losses.__getitem__))
    while first > 0 and is_good[first - 1]:
        first -= 1
    while last < len(scales) - 1 and is_good[last + 1]:
        last += 1
    return TrainedRates(scales[last] / scales[first], is_whole=first > 0 and last < len(scales) - 1)


@dataclass(frozen=True)
class Stability:
    """How one optimiser trained in a study.

    Attributes:
        spikes: In a thousand steps, by seed.
        ended: Seeds of the runs that came to an end, and of those that diverged.
        diverged: The latter alone.
        rates: Those that train; None where fewer than two did.
    """

    spikes: Mapping[int, float]
    ended: frozenset[int]
    diverged: frozenset[int]
    rates: TrainedRates | None

    def __str__(self) -> str:
        spikes = mean_of(self.spikes)
        return (
            f"{'-' if spikes is None else f'{spikes:.2f}'} spikes in 1,000 steps, rates over a factor of "
            f"{_factor(self.rates)}, {len(self.diverged)} diverged"
        )


def stability_of(study: Study, model: Model) -> Stability:
    """What a study says about a model's optimiser."""
    lost = frozenset(run.seed for run in model.runs if run.diverged)
    ended = lost | {run.seed for run in model.runs if run.finished}
    return Stability(study.spikes(model), ended, lost, trained_rates(model, CLOSE))


def stable(evidence: Evidence) -> Answer:
    """C6."""
    about = (
        f"llama; a spike is a step far above the running mean; rates are those around the best within {CLOSE} nats of "
        "it, in trials with one seed; supported means no worse in all three and better in one, with three seeds or "
        "more: spikes and runs that diverged by exact tests of their numbers at 5 %, rates by more than one step of "
        f"x{GRID_STEP:g} where those of the other side were seen to end"
    )
    found = _kalma_and_adamw(evidence, most=_rates_tried)
    if found is None:
        return Answer("C6", "stable", "", "-", "not measured", about)
    study, kalma, adamw = found
    ours, theirs = stability_of(study, kalma), stability_of(study, adamw)
    verdict = judge_stability(ours, theirs, counted_steps=max(0, study.results.budget.steps - WARMUP))
    doubts = [] if verdict == "not measured" else doubts_about(study, kalma, adamw)
    text = f"{kalma.optim}: {ours}; {adamw.optim}: {theirs}"
    reason = with_doubts(f"{about}; in {study.name}", doubts)
    return Answer("C6", "stable", "", text, held_back(verdict, doubts), reason)


def judge_stability(ours: Stability, theirs: Stability, *, counted_steps: int) -> Verdict:
    """Whether one optimiser is no worse in spikes, rates and runs that diverged, and better in one of them.

    Args:
        counted_steps: Of a whole run, in which spikes were counted.
    """
    if not ours.spikes.keys() & theirs.spikes.keys() or ours.rates is None or theirs.rates is None:
        return "not measured"
    both = ours.ended & theirs.ended
    whole = (both & ours.spikes.keys() & theirs.spikes.keys()) - ours.diverged - theirs.diverged
    spikes = [round(sum(side.spikes[seed] for seed in whole) * counted_steps / 1000) for side in (ours, theirs)]
    lost = [len(side.diverged & both) for side in (ours, theirs)]
    # Each positive where ours is the better one.
    leads = [_fewer_spikes(*spikes), _wider_rates(ours.rates, theirs.rates), _fewer_diverged(*lost, of=len(both))]
    if len(both) < FEWEST_SHOWN:
        return "undecided"
    if min(leads) >= 0 and max(leads) > 0 and lost[0] <= lost[1]:
        return "supported"
    return "not supported" if max(leads) <= 0 and min(leads) < 0 else "undecided"


def _fewer_spikes(ours: int, theirs: int) -> int:
    """1 or -1 where one side has fewer spikes than chance would have it, in as many steps of both; else 0."""
    from scipy.stats import binomtest

    if ours == theirs or binomtest(ours, ours + theirs).pvalue >= 1 - CONFIDENCE:
        return 0
    return 1 if ours < theirs else -1


def _fewer_diverged(ours: int, theirs: int, *, of: int) -> int:
    """1 or -1 where fewer runs of one side diverged than chance would have it, of as many on both; else 0."""
    from scipy.stats import fisher_exact

    if ours == theirs or fisher_exact([[ours, of - ours], [theirs, of - theirs]]).pvalue >= 1 - CONFIDENCE:
        return 0
    return 1 if ours < theirs else -1


def _wider_rates(ours: TrainedRates, theirs: TrainedRates) -> int:
    """1 or -1 where one side's rates are wider by more than a step, and the other's were seen to end; else 0."""
    if theirs.is_whole and ours.factor > GRID_STEP * theirs.factor:
        return 1
    return -1 if ours.is_whole and theirs.factor > GRID_STEP * ours.factor else 0


def _factor(rates: TrainedRates | None) -> str:
    return "-" if rates is None else f"{'' if rates.is_whole else 'at least '}{rates.factor:g}"
