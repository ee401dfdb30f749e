"""Bins, means, places and quantiles of a column's numbers."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kalmagrove.data.tables.number_scale import NumberScale, make_scale
from kalmagrove.modalities.number import KNOTS

NUMBERS = st.lists(
    st.one_of(
        st.integers(-5, 5).map(float),
        # The middle between two of the smallest numbers of all is one of them.
        st.floats(-1e100, 1e100, allow_nan=False, allow_subnormal=False),
        st.floats(-1, 1, allow_nan=False, allow_subnormal=False),
    ),
    min_size=1,
    max_size=80,
)


@example([1.0, 0.9999999999999999], 2)
@given(NUMBERS, st.integers(2, 16))
def test_every_training_value_is_in_the_bin_that_holds_it(values: list[float], bins: int) -> None:
    scale = make_scale(values, bins=bins)
    assert 1 <= scale.bins <= bins
    for value in values:
        place, scaled, own = scale.features(value)
        assert 0 <= place <= 1 and np.isfinite(scaled)
        assert scale.lows[own] <= value <= scale.highs[own]


@given(NUMBERS, st.integers(2, 16))
def test_places_and_bins_never_fall(values: list[float], bins: int) -> None:
    scale = make_scale(values, bins=bins)
    features = np.array([scale.features(value) for value in sorted(values)])
    assert (np.diff(features, axis=0) >= -1e-12).all()


@given(NUMBERS, st.lists(st.floats(0.001, 1), min_size=16, max_size=16), st.integers(2, 16))
@example([-1.0, -2.0, -1.801439850948199e16], [1.0] * 16, 2)
def test_quantiles_are_ordered_and_within_the_values(values: list[float], weights: list[float], bins: int) -> None:
    scale = make_scale(values, bins=bins)
    chances = np.array([weights[: scale.bins]])
    chances /= chances.sum()
    found = [float(scale.quantile(chances, level)[0]) for level in (0.01, 0.1, 0.5, 0.9, 0.99)]
    assert found == sorted(found)
    assert min(values) <= found[0] and found[-1] <= max(values)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= scale.mean(chances)[0] <= max(values) + slack


def test_bins_hold_about_as_many_values_and_a_frequent_value_has_its_own() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    values = np.concatenate((np.zeros(500), generator.normal(3, 1, 1500)))
    scale = make_scale(values, bins=20)
    counts = np.bincount([scale.features(value)[2] for value in values], minlength=scale.bins)
    own = scale.features(0.0)[2]
    assert scale.lows[own] == scale.highs[own] == 0 and counts[own] == 500
    others = np.delete(counts, own)
    assert scale.bins >= 15 and others.max() < 1.5 * others.mean()


def test_few_different_values_have_a_bin_and_a_knot_each() -> None:
    scale = make_scale([0, 1, 1, 2.5] * 9, bins=8)
    assert scale.is_exact and scale.means == (0, 1, 2.5)
    assert [round(scale.features(value)[0] * (KNOTS - 1), 9) for value in (0, 1, 2.5)] == [0, 1, 2]


def test_few_values_have_few_bins() -> None:
    assert make_scale(np.arange(100.0), bins=64).bins == 25
    assert make_scale(np.arange(1000.0), bins=64).bins == 64


def test_quantiles_of_an_even_column_are_its_own() -> None:
    values = np.arange(1001.0)
    scale = make_scale(values, bins=50)
    counts = np.bincount([scale.features(value)[2] for value in values], minlength=scale.bins)
    chances = np.tile(counts / counts.sum(), (2, 1))
    for level in (0.1, 0.5, 0.9):
        assert scale.quantile(chances, level) == pytest.approx(1000 * level, abs=2)
    assert scale.mean(chances) == pytest.approx(500)


def test_values_beyond_the_training_ones_are_in_the_outermost_bins() -> None:
    scale = make_scale(np.arange(100.0), bins=10)
    assert scale.features(-1e9)[2] == 0 and scale.features(1e9)[2] == scale.bins - 1
    assert scale.features(-1e9)[0] == 0 and scale.features(1e100)[1] == 1e6


def test_an_outlier_does_not_stretch_the_scale() -> None:
    values = [*np.linspace(-1, 1, 101), 1e6]
    scale = make_scale(values, bins=10)
    assert 0.5 < scale.spread < 1 and abs(scale.centre) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spread": 0.0}, "spread positive"),
        ({"centre": float("nan")}, "finite"),
        ({"knots": (1.0, 1.0)}, "increase"),
        ({"knots": ()}, "knots"),
        ({"lows": ()}, "smallest, a largest"),
        ({"means": (5.0, 1.5)}, "bins must increase"),
        ({"lows": (0.0, 0.5)}, "bins must increase"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    sound = {
        "centre": 1.0,
        "spread": 1.0,
        "knots": (0.0, 2.0),
        "lows": (0.0, 1.2),
        "highs": (1.0, 2.0),
        "means": (0.5, 1.5),
    }
    NumberScale(**sound)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        NumberScale(**{**sound, **change})  # type: ignore[arg-type]


def test_a_frequent_value_is_not_put_together_with_a_rare_one() -> None:
    scale = make_scale([-999.0, *[0.0] * 25, *np.linspace(1, 100, 974)], bins=64)
    own = scale.lows.index(0.0)
    assert scale.highs[own] == scale.means[own] == 0.0 and scale.lows[own - 1] == scale.highs[own - 1] == -999.0
