"""The fit of one law to one family: robust, from many starts, with bootstrapped intervals and a held-out error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from kalmagrove.errors import KalmaGroveError
from kalmagrove.scaling.laws import Array, Design, LawName, make_design
from kalmagrove.scaling.points import Point

LARGEST = 1e300
HUBER_DELTA = 1e-3
"""Residuals beyond it count by their size, not their square; of log loss, as in arXiv:2203.15556."""

FEWEST_POINTS = 8
LARGEST_EXPONENT = 2.0
INTERVAL = 0.95
"""The part of bootstrapped values that an interval holds, the middle one."""
HELD_OUT = 0.25
"""The part of the runs, the largest, whose losses a law of the others is to tell."""
AGREE = 1e-6
SHORT_SEARCH, FINALISTS = 60, 16
"""Steps of the searches from all starts, and how many of them go on."""
LEAST_E = 1e-3
"""Of the lowest loss: an E below it cannot be told from none, and the search would follow it for ever."""


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: Its name.
        design: The law at the points.
        unknowns: The solution, in the order of ``design.names``.
        objective: Sum of Huber losses there.
        starts: Searches that were begun.
        finalists: The best of them, which went on to their end.
        agreeing: Finalists that ended at this objective.
        worth_of_repetition: R*, where it was fitted.
    """

    law: LawName
    design: Design
    unknowns: Array
    objective: float
    starts: int
    finalists: int
    agreeing: int
    worth_of_repetition: float | None = None

    @property
    def constants(self) -> dict[str, float]:
        """In the points' own units."""
        repeated = {} if self.worth_of_repetition is None else {"R*": self.worth_of_repetition}
        return self.design.constants(self.unknowns) | repeated

    def losses(self, points: Sequence[Point]) -> Array:
        """Nats a token that the law expects of other points."""
        design = make_design(
            self.law,
            points,
            worth_of_repetition=self.worth_of_repetition,
            centre=self.design.centre,
            rank="gamma" in self.constants,
        )
        return design.losses(design.predict(self.unknowns))


# Threads on arrays of a law's size only wait for one another.
_on_one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


@_on_one_thread
def fit_law(law: LawName, points: Sequence[Point], *, repeated: bool = False) -> Fit:
    """The best fit over all starts.

    Args:
        law: Which.
        points: Of one family.
        repeated: Whether to fit what repeated tokens are worth too.

    Raises:
        KalmaGroveError: There are fewer different points than unknowns, or one size or one number of tokens alone.
    """
    _check_points(law, points)
    fit = _best(law, make_design(law, points))
    return _with_repetition(fit, points) if repeated else fit


def _with_repetition(fit: Fit, points: Sequence[Point]) -> Fit:
    """The best R*, each value's search beginning at the solution of the one before."""
    best, unknowns = fit, fit.unknowns
    for worth in np.geomspace(100.0, 1.0, 41):
        design = make_design(fit.law, points, worth_of_repetition=worth)
        unknowns, objective = search(design, unknowns)
        if objective < best.objective or best is fit:
            best = replace(fit, design=design, unknowns=unknowns, objective=objective, worth_of_repetition=float(worth))
    return best


def _check_points(law: LawName, points: Sequence[Point]) -> None:
    # A resample needs more different runs than the law has unknowns; ranks bring one more.
    needed = (3 if law == "power" else 5) + (len({point.rank_ratio for point in points}) > 1)
    different = {(point.parameters, point.tokens, point.rank_ratio) for point in points}
    if len(different) <= needed:
        raise KalmaGroveError(
            f"{len(different)} different runs are too few for the law {law}, which needs more than {needed}; add sizes"
        )
    for name in ("parameters", "tokens"):
        if len({getattr(point, name) for point in points}) < 2:
            raise KalmaGroveError(f"all runs have the same number of {name}; a law needs several")


def _best(law: LawName, design: Design) -> Fit:
    begun = [search(design, start, longest=SHORT_SEARCH) for start in _starts(design)]
    begun.sort(key=lambda result: result[1])
    found = [search(design, unknowns) for unknowns, _ in begun[:FINALISTS]]
    objectives = np.array([objective for _, objective in found])
    best = int(np.argmin(objectives))
    agreeing = int((objectives <= objectives[best] * (1 + AGREE) + 1e-15).sum())
    return Fit(law, design, found[best][0], float(objectives[best]), len(begun), len(found), agreeing)


def search(design: Design, start: Array, *, longest: int = 5000) -> tuple[Array, float]:
    """The unknowns that a search from ``start`` ends at, after ``longest`` steps at most, and the objective there."""
    # The objective is scaled up: it is small, and the search stops at absolute changes.
    scale = 1e3 / (HUBER_DELTA * len(design.target))

    def objective(unknowns: Array) -> tuple[float, Array]:
        predicted, derivative = design.predict_with_gradient(unknowns)
        residual = predicted - design.target
        inside = np.abs(residual) <= HUBER_DELTA
        value = np.where(inside, residual**2 / 2, HUBER_DELTA * (np.abs(residual) - HUBER_DELTA / 2)).sum()
        slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        return scale * float(value), scale * (slope @ derivative)

    least = float(np.log(LEAST_E) + np.log(design.losses(design.target)).min())
    result = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(least if name == "log_E" else None, None) for name in design.names],
        options={"maxiter": longest, "maxfun": 2 * longest, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20},
    )
    return result.x, float(result.fun) / scale


def _starts(design: Design) -> Iterator[Array]:
    exponents = (0.05, 0.2, 0.5, 1.0)
    if design.law == "power":
        # Nearly linear: the least squares are a start like any other.
        yield np.linalg.lstsq(design.terms[0], design.target, rcond=None)[0]
        return
    least = float(np.exp(design.target.min()))
    for floor, part, alpha, beta in itertools.product((0.1, 0.5, 0.9), (0.2, 0.5, 0.8), exponents, exponents):
        rest = float(np.exp(design.target.mean())) - floor * least
        values = {
            "log_E": np.log(floor * least),
            "log_A": np.log(part * rest),
            "log_B": np.log((1 - part) * rest),
            "alpha": alpha,
            "beta": beta,
            "gamma": 0.1,
        }
        yield np.array([values[name] for name in design.names])


@_on_one_thread
def bootstrap(fit: Fit, points: Sequence[Point], *, resamples: int, seed: int) -> list[dict[str, float]]:
    """The law's constants in resamples of the runs: points with replacement, and seeds within a point.

    A resample that has too few different points for the law is drawn again. Families on the same grid get the same
    resamples by the same seed, so that the draws of one can be compared with those of the other one by one.

    Args:
        fit: Of these points.
        points: Of one family.
        resamples: How many.
        seed: Of the draws.
    """
    cells: dict[tuple[float, ...], list[int]] = {}
    for index, point in sorted(enumerate(points), key=lambda numbered: _cell(numbered[1])):
        cells.setdefault(_cell(point), []).append(index)
    groups = list(cells.values())
    # What one law draws besides must not move the cells and seeds that the next resample takes.
    runs_chance, chance = (np.random.default_rng((seed, stream)) for stream in range(2))
    found: list[dict[str, float]] = []
    while len(found) < resamples:
        drawn = runs_chance.integers(0, len(groups), len(groups))
        if len(set(drawn.tolist())) <= len(fit.unknowns):
            continue
        rows = np.concatenate([runs_chance.choice(groups[cell], len(groups[cell])) for cell in drawn])
        design = fit.design.take(rows)
        # A resample may have another best basin; the power law has one.
        others = 0 if fit.law == "power" else 1
        starts = [fit.unknowns, *(fit.unknowns + chance.normal(0, 0.3, len(fit.unknowns)) for _ in range(others))]
        unknowns = min((search(design, start) for start in starts), key=lambda result: result[1])[0]
        found.append(design.constants(unknowns))
    return found


def _cell(point: Point) -> tuple[float, ...]:
    return (point.parameters, point.tokens, point.rank_ratio)


def grid(points: Sequence[Point]) -> list[tuple[float, ...]]:
    """The cells of a family's points by the order of their sizes, which other families have too; one for each run."""
    place = {size: order for order, size in enumerate(sorted({point.parameters for point in points}))}
    return sorted((place[point.parameters], point.tokens, point.rank_ratio) for point in points)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle part of bootstrapped values."""
    # Between two infinities there is nothing to interpolate.
    finite = np.clip(np.asarray(values), -LARGEST, LARGEST)
    low, high = np.quantile(finite, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return float(low), float(high)


def held_out_error(law: LawName, points: Sequence[Point], *, repeated: bool = False) -> dict[str, Any] | None:
    """How well a law that is fitted to the smaller runs tells the losses of the largest by parameters x tokens.

    Args:
        law: Which.
        points: Of one family.
        repeated: As for `fit_law`.

    Returns:
        ``error``, the mean absolute error in nats, and ``runs``; None where too few runs are left for the fit.
    """
    ordered = sorted(points, key=lambda point: point.parameters * point.tokens)
    count = max(1, round(HELD_OUT * len(ordered)))
    try:
        fit = fit_law(law, ordered[:-count], repeated=repeated)
    except KalmaGroveError:
        return None
    errors = np.abs(fit.losses(ordered[-count:]) - [point.loss for point in ordered[-count:]])
    return {"error": float(errors.mean()), "runs": count}


def warnings_of(fit: Fit, points: Sequence[Point]) -> list[str]:
    """What a reader must know before trusting the fit."""
    found = []
    if len(points) < FEWEST_POINTS:
        found.append(f"only {len(points)} runs: intervals are too narrow, or mean nothing")
    for name in ("parameters", "tokens"):
        values = [getattr(point, name) for point in points]
        if max(values) < 10 * min(values):
            found.append(f"the runs span {max(values) / min(values):.1f}x in {name}, less than a factor of ten")
    for name in ("alpha", "beta"):
        value = fit.constants[name]
        if not 0 < value < LARGEST_EXPONENT:
            found.append(f"{name} is {value:.3g}, outside 0 to {LARGEST_EXPONENT:g}: the runs do not determine it")
    if fit.law == "hoffmann" and fit.constants["E"] < 0.02 * min(point.loss for point in points):
        found.append("E is almost 0: the runs do not determine it")
    return found
