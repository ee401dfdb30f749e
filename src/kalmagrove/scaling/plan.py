"""What a fitted law says about runs that were not done: the best one for a budget, and what a loss costs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.scaling.fit import interval
from kalmagrove.scaling.laws import predicted_loss, tokens_for_loss, worth_of_tokens
from kalmagrove.scaling.pages import FIT, LAW_FOLDER

WORTH_OF_REPETITION = 15.4
"""R* where it was not fitted: that of arXiv:2305.16264."""
SEARCHED_SIZES = 60


@dataclass(frozen=True)
class FittedFamily:
    """A family with Hoffmann's law.

    Attributes:
        name: Of the family.
        constants: Of Hoffmann's law.
        draws: Bootstrapped constants.
        range: Smallest and largest ``parameters`` and ``tokens`` of the fitted runs.
        rank_ratios: Of the fitted runs.
        flops_per_second: Of one worker, measured; None where runs were not timed.
        warnings: Of the fit.
    """

    name: str
    constants: Mapping[str, float]
    draws: Sequence[Mapping[str, float]]
    range: Mapping[str, Sequence[float]]
    rank_ratios: tuple[float, ...]
    flops_per_second: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A model that could be trained.

    Attributes:
        size: Width x layers; empty where only the number of parameters is known.
        parameters: Different ones.
        flops_per_token: Of forward and backward.
        rank_ratio: Of Grove's factors.
    """

    size: str
    parameters: float
    flops_per_token: float
    rank_ratio: float = 1.0


@dataclass(frozen=True)
class Answer:
    """A run that a law recommends.

    Attributes:
        family: Its family.
        model: Its model.
        tokens: That it reads.
        loss: Expected nats a token.
        loss_interval: 95 %, from the bootstrapped laws.
        flops: Of the whole training.
        flops_interval: 95 %; None where the FLOPs were given.
        outside: What lies beyond the fitted runs, and how far; empty for an interpolation.
    """

    family: FittedFamily
    model: Candidate
    tokens: float
    loss: float
    loss_interval: tuple[float, float]
    flops: float
    flops_interval: tuple[float, float] | None
    outside: tuple[str, ...]


def find_fit(path: Path) -> Path:
    """The file of a fit that ``kalmagrove scale fit`` wrote.

    Args:
        path: Its folder, the folder of its sweep, or ``fit.json``.

    Raises:
        KalmaGroveError: There is none.
    """
    places = [path / FIT, path / LAW_FOLDER / FIT] if path.is_dir() else [path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise KalmaGroveError(f"{path} holds no {FIT}; make one with kalmagrove scale fit {path}")
    return found


def read_fit(path: Path) -> dict[str, Any]:
    """A fit, see `find_fit`.

    Raises:
        KalmaGroveError: There is none, or it is damaged.
    """
    found = find_fit(path)
    try:
        summary = json.loads(found.read_bytes())
        families_of(summary)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise KalmaGroveError(f"{found} is no fit that can be read; make it again with kalmagrove scale fit") from error
    assert isinstance(summary, dict)
    return summary


def families_of(summary: Mapping[str, Any]) -> list[FittedFamily]:
    """The families of a fit, with Hoffmann's law.

    The power law divides no budget: where its exponents differ, it would spend all on size or all on tokens.

    Args:
        summary: As ``fit.json`` holds it.
    """
    return [_family(name, found) for name, found in summary["families"].items()]


def _family(name: str, found: Mapping[str, Any]) -> FittedFamily:
    fit = found["laws"]["hoffmann"]
    return FittedFamily(
        name=name,
        constants={key: float(value) for key, value in fit["constants"].items()},
        draws=[{key: float(value) for key, value in draw.items()} for draw in fit["draws"]],
        range=fit["range"],
        rank_ratios=tuple(sorted({float(point["rank_ratio"]) for point in found["points"]}, reverse=True)),
        flops_per_second=found["flops_per_second"],
        warnings=tuple(fit["warnings"]),
    )


def _require_draws(family: FittedFamily) -> None:
    if not family.draws:
        raise KalmaGroveError(
            f"the fit of {family.name} keeps no resamples, of which intervals are made; make it again with kalmagrove "
            "scale fit"
        )


def candidates(family: FittedFamily, models: Mapping[str, Any] | None, largest: float) -> list[Candidate]:
    """Models from the smallest to one of ``largest`` parameters.

    Args:
        family: Their family.
        models: How the sweep built its models; None knows parameters alone, with 6 FLOPs for each and a token.
        largest: Parameters at which to stop.
    """
    if models is None:
        sizes = np.geomspace(family.range["parameters"][0] / 10, max(largest, 10.0), SEARCHED_SIZES)
        ratios = family.rank_ratios if "gamma" in family.constants else (1.0,)
        return [Candidate("", float(size), 6 * float(size), ratio) for size in sizes for ratio in ratios]
    return list(_built_candidates(family, models, largest))


def _built_candidates(family: FittedFamily, models: Mapping[str, Any], largest: float) -> Iterator[Candidate]:
    from kalmagrove.scaling.costs import model_cost
    from kalmagrove.scaling.ladder import Rung, SweepConfig, is_grove, width_and_layers

    config = SweepConfig(
        families=f"{models['families'][family.name]['preset']}+{models['families'][family.name]['optim']}",
        sizes=list(models["sizes"]),
        head_dim=int(models["head_dim"]),
    )
    member, head_dim = config.family_list()[0], config.head_dim
    known = sorted(width_and_layers(size) for size in config.sizes)
    ratios = family.rank_ratios if "gamma" in family.constants and is_grove(member) else family.rank_ratios[:1]
    widths = sorted({head_dim * max(2, round(w / head_dim)) for w in np.geomspace(known[0][0], 16384, SEARCHED_SIZES)})
    for width in widths:
        size = f"{width}x{_layers(width, known)}"
        for ratio in ratios:
            model = config.model(Rung(member, size, 0, ratio, 0, 1.0))
            cost = model_cost(model, int(models["vocab_size"]), int(models["context_length"]))
            yield Candidate(size, cost.parameters, cost.flops_per_token, ratio)
        if cost.parameters > largest:
            return


def _layers(width: int, known: Sequence[tuple[int, int]]) -> int:
    """Layers at a width, on the line through the ladder's sizes and beyond its ends."""
    if len(known) == 1 or known[0][0] == known[-1][0]:
        return known[-1][1]
    logs = np.log2([w for w, _ in known])
    slope, offset = np.polyfit(logs, [layers for _, layers in known], 1)
    if known[0][0] <= width <= known[-1][0]:
        return max(1, round(float(np.interp(math.log2(width), logs, [layers for _, layers in known]))))
    return max(1, round(float(slope * math.log2(width) + offset)))


def best_for_flops(
    family: FittedFamily,
    flops: float,
    models: Mapping[str, Any] | None = None,
    *,
    unique_tokens: float | None = None,
) -> Answer:
    """The model and tokens with the lowest expected loss at so many FLOPs.

    Args:
        family: The family.
        flops: Of the whole training.
        models: How the sweep built its models.
        unique_tokens: Of the text; more are read again, and are worth less.
    """
    _require_draws(family)
    # Compute-optimal models read about as many tokens as they have parameters, times less than a thousand.
    possible = candidates(family, models, largest=math.sqrt(flops / 6) * 4)

    def loss_of(model: Candidate, constants: Mapping[str, float]) -> float:
        tokens = _worth(flops / model.flops_per_token, unique_tokens, family)
        return predicted_loss(constants, model.parameters, tokens, rank_ratio=model.rank_ratio)

    best = min(possible, key=lambda model: loss_of(model, family.constants))
    tokens = flops / best.flops_per_token
    drawn = [loss_of(best, constants) for constants in family.draws]
    return Answer(
        family=family,
        model=best,
        tokens=tokens,
        loss=loss_of(best, family.constants),
        loss_interval=interval(drawn),
        flops=flops,
        flops_interval=None,
        outside=_outside(family, best.parameters, tokens),
    )


def cheapest_for_loss(family: FittedFamily, loss: float, models: Mapping[str, Any] | None = None) -> Answer | None:
    """The run with the fewest FLOPs that has an expected loss; None where the law says that none has.

    Args:
        family: The family.
        loss: Nats a token.
        models: How the sweep built its models.
    """
    _require_draws(family)
    possible = candidates(family, models, largest=1e4 * family.range["parameters"][1])

    def flops_of(model: Candidate, constants: Mapping[str, float]) -> float:
        ratio = model.rank_ratio
        return model.flops_per_token * tokens_for_loss(constants, model.parameters, loss, rank_ratio=ratio)

    best = min(possible, key=lambda model: flops_of(model, family.constants))
    flops = flops_of(best, family.constants)
    if not math.isfinite(flops):
        return None
    drawn = [min(flops_of(model, constants) for model in possible) for constants in family.draws]
    tokens = flops / best.flops_per_token
    losses = [predicted_loss(c, best.parameters, tokens, rank_ratio=best.rank_ratio) for c in family.draws]
    return Answer(
        family=family,
        model=best,
        tokens=tokens,
        loss=loss,
        loss_interval=interval(losses),
        flops=flops,
        flops_interval=interval(drawn),
        outside=_outside(family, best.parameters, tokens),
    )


def _worth(tokens: float, unique_tokens: float | None, family: FittedFamily) -> float:
    if unique_tokens is None:
        return tokens
    return worth_of_tokens(tokens, unique_tokens, family.constants.get("R*", WORTH_OF_REPETITION))


def _outside(family: FittedFamily, parameters: float, tokens: float) -> tuple[str, ...]:
    found = []
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        low, high = family.range[name]
        # A tenth beyond is a neighbour, not another range.
        if value > 1.1 * high:
            found.append(f"{value / high:.3g}x more {name} than the largest fitted run")
        elif value < low / 1.1:
            found.append(f"{low / value:.3g}x fewer {name} than the smallest fitted run")
    return tuple(found)


def budget_flops(family: FittedFamily, hours: float, devices: float, flops_per_second: float | None) -> float:
    """FLOPs of a family's training in so many hours.

    Args:
        family: The family.
        hours: Of the training.
        devices: That train together.
        flops_per_second: Of a device; None takes that of a worker of the sweep.

    Raises:
        UsageError: No speed is known.
    """
    speed = flops_per_second or family.flops_per_second
    if speed is None:
        raise UsageError(f"the runs of {family.name} were not timed; give --flops_per_second of one device")
    return 3600 * hours * devices * speed
