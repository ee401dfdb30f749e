"""Intervals and spreads agree with numbers worked out by hand."""

import math

import pytest

from kalmagrove.report.statistics import mean_interval, median_spread, ratio_interval


def test_the_interval_of_one_two_three_is_students() -> None:
    # Deviation 1, so 4.3027 (t, two degrees of freedom) over the root of 3.
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.n == 3
    assert interval.mean == pytest.approx(2.0)
    assert interval.bounds == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_two_values_have_bounds_that_are_not_shown() -> None:
    interval = mean_interval([1.0, 3.0])
    assert interval.low == pytest.approx(2 - 12.706205)
    assert interval.bounds is None
    assert not interval.includes(2.0)


def test_one_value_has_no_bounds() -> None:
    interval = mean_interval([4.0])
    assert (interval.mean, interval.low, interval.high, interval.n) == (4.0, None, None, 1)


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="the mean of no values is not defined"):
        mean_interval([])


def test_ratios_are_paired_by_seed_and_averaged_as_logarithms() -> None:
    interval = ratio_interval({0: 1.0, 1: 8.0, 7: 99.0}, {1: 2.0, 0: 1.0, 8: 1.0})
    assert interval is not None
    assert (interval.mean, interval.n) == (pytest.approx(2.0), 2)


def test_the_interval_of_ratios_is_symmetric_in_logarithms() -> None:
    interval = ratio_interval({0: 1.0, 1: 2.0, 2: 4.0}, dict.fromkeys(range(3), 1.0))
    assert interval is not None and interval.bounds is not None
    factor = math.exp(4.302653 * math.log(2) / math.sqrt(3))
    assert interval.bounds == pytest.approx((2 / factor, 2 * factor), rel=1e-5)
    assert interval.includes(1.0)


def test_equal_differences_between_seeds_cancel_in_paired_ratios() -> None:
    interval = ratio_interval({0: 9.0, 1: 18.0, 2: 27.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert interval is not None
    assert interval.bounds == pytest.approx((0.9, 0.9))


def test_seeds_that_do_not_meet_have_no_ratio() -> None:
    assert ratio_interval({0: 1.0}, {1: 1.0}) is None


def test_the_spread_interpolates_between_values() -> None:
    spread = median_spread([4.0, 1.0, 3.0, 2.0])
    assert spread is not None
    assert spread.median == 2.5
    assert (spread.low, spread.high) == (pytest.approx(1.3), pytest.approx(3.7))


def test_no_ratios_have_no_spread() -> None:
    assert median_spread([]) is None
