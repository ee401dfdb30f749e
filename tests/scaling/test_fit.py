"""Known laws are found again, with intervals that hold them as often as they say; and the published fit is met."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from kalmagrove.errors import KalmaGroveError
from kalmagrove.scaling.fit import bootstrap, fit_law, held_out_error, interval, search, warnings_of
from kalmagrove.scaling.laws import effective_tokens, make_design
from kalmagrove.scaling.points import Point, read_points
from kalmagrove.scaling.summary import describe_fit

CHINCHILLA = Path(__file__).parents[3] / "shared" / "data" / "scaling" / "chinchilla_points.csv"
HOFFMANN = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
POWER = {"c": 6000.0, "alpha": 0.11, "beta": 0.17}
SIZES, TOKENS = np.geomspace(1e5, 3e7, 6), np.geomspace(1e6, 1e9, 5)


def hoffmann(point: Point) -> float:
    law = HOFFMANN
    return float(law["E"] + law["A"] * point.parameters ** -law["alpha"] + law["B"] * point.tokens ** -law["beta"])


def power(point: Point) -> float:
    law = POWER
    return float(np.log(law["c"]) - law["alpha"] * np.log(point.parameters) - law["beta"] * np.log(point.tokens))


def points_of(law: Callable[[Point], float], noise: float = 0.0, seed: int = 0, seeds: int = 1) -> list[Point]:
    chance = np.random.default_rng(seed)
    bare = [Point(n, d, 1.0, seed=s) for n, d, s in product(SIZES, TOKENS, range(seeds))]
    return [replace(point, loss=law(point) * float(np.exp(noise * chance.normal()))) for point in bare]


def test_the_irreducible_law_is_found_from_exact_losses() -> None:
    fit = fit_law("hoffmann", points_of(hoffmann))
    assert fit.constants == pytest.approx(HOFFMANN, rel=1e-3)
    assert fit.agreeing > fit.finalists / 2


def test_the_power_law_is_found_from_exact_losses() -> None:
    assert fit_law("power", points_of(power)).constants == pytest.approx(POWER, rel=1e-3)


@pytest.mark.parametrize("law", ["power", "hoffmann"])
def test_the_exponent_of_the_rank_is_found(law: str) -> None:
    ranks = (0.25, 0.5, 1.0)
    exact = power if law == "power" else hoffmann
    points = []
    for point, rank in product(points_of(exact), ranks):
        if law == "power":
            loss = point.loss - 0.07 * float(np.log(rank))
        else:
            loss = point.loss + HOFFMANN["A"] * point.parameters ** -HOFFMANN["alpha"] * (rank**-0.2 - 1)
        points.append(replace(point, rank_ratio=rank, loss=float(loss)))
    fit = fit_law(law, points)  # type: ignore[arg-type]
    assert fit.constants["gamma"] == pytest.approx(0.07 if law == "power" else 0.2, rel=1e-2)
    assert fit.losses(points[:4]) == pytest.approx([point.loss for point in points[:4]], abs=1e-3)


def test_repeated_tokens_are_worth_what_they_were_made_worth() -> None:
    points = []
    for point in points_of(hoffmann):
        repeated = replace(point, unique_tokens=min(point.tokens, 1e7))
        points.append(replace(repeated, loss=hoffmann(replace(point, tokens=effective_tokens(repeated, 15.0)))))
    fit = fit_law("hoffmann", points, repeated=True)
    assert fit.constants["R*"] == pytest.approx(15.0, rel=0.15)
    assert fit.constants["alpha"] == pytest.approx(HOFFMANN["alpha"], rel=0.03)
    # Without it the same runs do not fit, and the largest of them are not told.
    assert fit_law("hoffmann", points).objective > 10 * fit.objective
    told, untold = held_out_error("hoffmann", points, repeated=True), held_out_error("hoffmann", points)
    assert told is not None and untold is not None and told["error"] < 0.2 * untold["error"]


def test_order_and_units_do_not_matter() -> None:
    points = points_of(hoffmann, noise=0.003)
    fit, turned = fit_law("hoffmann", points), fit_law("hoffmann", points[::-1])
    assert turned.constants == pytest.approx(fit.constants, rel=1e-3)
    in_millions = [replace(p, parameters=p.parameters / 1e6, tokens=p.tokens / 1e6) for p in points]
    scaled = fit_law("hoffmann", in_millions).constants
    for name in ("E", "alpha", "beta"):
        assert scaled[name] == pytest.approx(fit.constants[name], rel=1e-3)
    assert scaled["A"] * 1e6 ** scaled["alpha"] == pytest.approx(fit.constants["A"], rel=1e-2)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = []
    for seed in range(24):
        points = points_of(power, noise=0.004, seed=seed)
        fit = fit_law("power", points)
        drawn = bootstrap(fit, points, resamples=120, seed=seed)
        for name in ("alpha", "beta"):
            low, high = interval([values[name] for values in drawn])
            held.append(low <= POWER[name] <= high)
    assert 0.8 <= np.mean(held) <= 1.0


def test_the_gradient_is_that_of_the_prediction() -> None:
    points = [replace(p, rank_ratio=0.5 + (i % 2) / 2) for i, p in enumerate(points_of(hoffmann))]
    design = make_design("hoffmann", points)
    at = np.array([0.5, 0.2, 0.3, 0.1, 0.4, 0.2])
    _, gradient = design.predict_with_gradient(at)
    for place in range(len(at)):
        step = 1e-6 * np.eye(len(at))[place]
        slope = (design.predict(at + step) - design.predict(at - step)) / 2e-6
        np.testing.assert_allclose(gradient[:, place], slope, atol=1e-7)


def test_a_law_with_a_floor_tells_the_largest_runs_better_where_there_is_one() -> None:
    points = points_of(hoffmann, noise=0.002)
    ours, without_floor = held_out_error("hoffmann", points), held_out_error("power", points)
    assert ours is not None and without_floor is not None
    assert ours["error"] < 0.5 * without_floor["error"] and ours["runs"] == 8


def test_the_published_fit_is_met() -> None:
    if not CHINCHILLA.exists():
        pytest.skip(f"{CHINCHILLA.name} is not here")
    points = read_points(CHINCHILLA).points
    fit = fit_law("hoffmann", points)
    # Besiroglu et al., arXiv:2404.10102, table 1: estimates and standard errors, for 240 of 245 points.
    published = {"E": (1.8172, 0.03), "A": (482.01, 124.58), "B": (2085.43, 1293.23), "alpha": (0.3478, 0.02),
                 "beta": (0.3658, 0.02)}  # fmt: skip
    for name, (value, error) in published.items():
        assert abs(fit.constants[name] - value) < 1.96 * error, name
    assert fit.agreeing == fit.finalists
    assert warnings_of(fit, points) == []


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (points_of(hoffmann)[:5], "5 different runs are too few for the law hoffmann, which needs more than 5"),
        ([replace(p, parameters=1e6) for p in points_of(hoffmann)], "too few|same number of parameters"),
        ([Point(n, 1e6, 2.0 + 1 / n) for n in range(1, 9)], "all runs have the same number of tokens"),
    ],
)
def test_what_cannot_determine_a_law_is_refused(points: Sequence[Point], message: str) -> None:
    with pytest.raises(KalmaGroveError, match=message):
        fit_law("hoffmann", points)


def test_a_rank_asks_for_one_run_more() -> None:
    points = [*points_of(power)[:3], replace(points_of(power)[-1], rank_ratio=0.5)]
    with pytest.raises(KalmaGroveError, match=r"4 different runs are too few for the law power, .* more than 4"):
        fit_law("power", points)


def test_a_reader_is_warned() -> None:
    points = [replace(p, loss=hoffmann(p)) for p in (Point(n, d, 1.0) for n, d in product((1e5, 2e5, 3e5), (1e6, 2e6)))]
    found = " ".join(warnings_of(fit_law("hoffmann", points), points))
    assert "only 6 runs" in found and "span 3.0x in parameters" in found and "span 2.0x in tokens" in found


def test_a_search_only_goes_down() -> None:
    design = make_design("hoffmann", points_of(hoffmann, noise=0.01))
    start = fit_law("hoffmann", points_of(hoffmann)).unknowns
    steps = [start]
    for _ in range(3):
        steps.append(search(design, steps[-1])[0])
    objectives = [np.abs(design.predict(step) - design.target).sum() for step in steps]
    assert all(after <= before + 1e-3 for before, after in pairwise(objectives))


def test_a_resample_that_no_number_holds_is_not_kept_for_predictions() -> None:
    points = points_of(hoffmann)
    fit = fit_law("hoffmann", points)
    sound = dict(fit.constants)
    described = describe_fit(fit, points, [sound, sound | {"A": math.inf}, sound])
    assert described["draws"] == [sound, sound]
    assert described["intervals"]["alpha"] == pytest.approx((sound["alpha"], sound["alpha"]))
