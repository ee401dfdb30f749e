"""Everything that is said about a table of runs: each law for each family, and how the families' exponents differ."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.scaling.fit import HUBER_DELTA, Fit, bootstrap, fit_law, grid, held_out_error, interval, warnings_of
from kalmagrove.scaling.laws import FORMULAS, LawName
from kalmagrove.scaling.points import Point, PointTable
from kalmagrove.training.watching import SWEEP_FACTS

LAWS: tuple[LawName, ...] = get_args(LawName)
EXPONENTS = ("alpha", "beta", "gamma")
KEPT_DRAWS = 400
"""Bootstrapped constants that are kept, for the intervals of predictions."""


Points = tuple[Point, ...]


class Drawn(NamedTuple):
    """A fit and its constants in resamples of its points."""

    fit: Fit
    draws: list[dict[str, float]]


def summarise(
    table: PointTable,
    *,
    resamples: int = 1000,
    seed: int = 0,
    repeated: bool = False,
    baselines: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What ``fit.json`` holds.

    Args:
        table: Of the runs.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        repeated: Whether to fit what repeated tokens are worth.
        baselines: The families that the others are compared with; empty is the first of the table.
        say: Told what is being fitted.

    Raises:
        UsageError: There is no such family.
        KalmaGroveError: A family has too few runs.
    """
    names = dict.fromkeys(point.family for point in table.points)
    families = {name: tuple(point for point in table.points if point.family == name) for name in names}
    unknown = next((name for name in baselines if name not in families), None)
    if unknown is not None:
        raise UsageError(f"there is no family {unknown!r}; the table has {', '.join(families)}")
    summary: dict[str, Any] = {
        "runs": len(table.points),
        "left_out": list(table.left_out),
        "method": {"huber_delta": HUBER_DELTA, "resamples": resamples, "seed": seed, "interval": 0.95},
        "families": {},
    }

    @cache
    def fitted(law: LawName, points: Points, seed: int) -> Drawn:
        fit = fit_law(law, points, repeated=repeated)
        return Drawn(fit, bootstrap(fit, points, resamples=resamples, seed=seed))

    for name, points in families.items():
        summary["families"][name] = {
            "points": [asdict(point) for point in points],
            "flops_per_second": speed_of(points),
            "laws": {},
        }
        for law in LAWS:
            say(f"fitting {law} to {len(points)} runs of {name}")
            try:
                fit, drawn = fitted(law, points, seed)
            except KalmaGroveError as error:
                raise KalmaGroveError(f"family {name}: {error}") from error
            summary["families"][name]["laws"][law] = describe_fit(fit, points, drawn)
    references = list(baselines) or [next(iter(families))]
    return summary | compare_families(families, references, fitted, seed=seed, say=say)


def compare_families(
    families: Mapping[str, Points],
    references: Sequence[str],
    fitted: Callable[[LawName, Points, int], Drawn],
    *,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """How the exponents of each family differ from those of each reference, and whether their draws are paired.

    Args:
        families: The points of each.
        references: Families that the others, and the references behind them, are compared with.
        fitted: A law fitted to points, and drawn with a seed.
        seed: Of the bootstrap.
        say: Told what is being compared.
    """
    found: dict[str, Any] = {"differences": {}, "paired": {}}
    for place, reference in enumerate(references):
        for name in (name for name in families if name not in references[: place + 1]):
            pair = f"{name} - {reference}"
            say(f"comparing {name} with {reference}")
            both = at_common_ranks(families[name], families[reference])
            found["paired"][pair] = is_paired = grid(both[0]) == grid(both[1])
            # Where the grids differ, a seed of its own keeps one family's draws from following the other's.
            seeds = (seed, seed if is_paired else seed + 1)
            found["differences"][pair] = {
                law: differences(*(fitted(law, points, own) for points, own in zip(both, seeds, strict=True)))
                for law in LAWS
            }
    return found


def at_common_ranks(ours: Sequence[Point], theirs: Sequence[Point]) -> tuple[Points, Points]:
    """The points of two families at the ranks that both have: a dense family has the full rank alone.

    All of them where there is no such rank.
    """
    every = {point.rank_ratio for point in (*ours, *theirs)}
    ranks = {point.rank_ratio for point in ours} & {point.rank_ratio for point in theirs} or every
    mine, others = (tuple(p for p in points if p.rank_ratio in ranks) for points in (ours, theirs))
    return mine, others


def facts_of_sweep(runs: Path) -> dict[str, Any]:
    """How a sweep's models were built, on which text and at which learning rates; nothing for a table alone.

    Args:
        runs: The folder of a sweep, or a table.

    Raises:
        KalmaGroveError: The folder's facts are not JSON.
    """
    path = runs / SWEEP_FACTS
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_bytes())
        return {name: facts[name] for name in ("models", "data", "tuning", "environment")}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise KalmaGroveError(f"{path} is damaged; start the sweep's command again to write it anew") from error


def speed_of(points: Sequence[Point]) -> float | None:
    """FLOPs a second of one worker: the median of the quarter of the timed runs with the most FLOPs."""
    timed = sorted((p.flops, p.flops / p.seconds) for p in points if p.flops and p.seconds)
    return statistics.median(speed for _, speed in timed[-max(1, len(timed) // 4) :]) if timed else None


def describe_fit(fit: Fit, points: Sequence[Point], drawn: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """One law of one family."""
    constants = fit.constants
    predicted = fit.losses(points)
    return {
        "formula": FORMULAS[fit.law].replace("N^-alpha", "N^-alpha r^-gamma" if "gamma" in constants else "N^-alpha"),
        "constants": constants,
        "intervals": {name: interval([values[name] for values in drawn]) for name in drawn[0]},
        "objective": fit.objective,
        "starts": fit.starts,
        "finalists": fit.finalists,
        "agreeing_starts": fit.agreeing,
        "residuals": [float(point.loss - loss) for point, loss in zip(points, predicted, strict=True)],
        "held_out": held_out_error(fit.law, points, repeated=fit.worth_of_repetition is not None),
        # A resample without some sizes may fit a cliff whose constants no number holds; it predicts nothing.
        "draws": [dict(draw) for draw in drawn if all(map(math.isfinite, draw.values()))][:KEPT_DRAWS],
        "warnings": warnings_of(fit, points),
        "range": {
            name: [min(values), max(values)]
            for name in ("parameters", "tokens", "loss")
            if (values := [getattr(point, name) for point in points])
        },
    }


def differences(one: Drawn, other: Drawn) -> dict[str, Any]:
    """Exponents of one family less those of another, with intervals; undecided where the interval holds 0."""
    ours, theirs = one.fit.constants, other.fit.constants
    found: dict[str, Any] = {}
    for exponent in EXPONENTS:
        if exponent not in ours or exponent not in theirs:
            continue
        low, high = interval([o[exponent] - t[exponent] for o, t in zip(one.draws, other.draws, strict=True)])
        verdict = "larger" if low > 0 else "smaller" if high < 0 else "undecided"
        difference = ours[exponent] - theirs[exponent]
        found[exponent] = {"difference": difference, "interval": [low, high], "verdict": verdict}
    return found
