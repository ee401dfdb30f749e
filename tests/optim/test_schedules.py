"""Learning-rate schedules at their corners."""

import pytest

from kalmagrove.optim.schedules import learning_rate_factor


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    factors = [learning_rate_factor(schedule, step, 100, 4) for step in range(5)]  # type: ignore[arg-type]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("wsd", 1.0), ("constant", 1.0)])
def test_the_middle_of_a_run_without_warm_up(schedule: str, middle: float) -> None:
    assert learning_rate_factor(schedule, 50, 100, 0) == pytest.approx(middle)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_end_falls_to_nearly_zero_without_a_rise(schedule: str) -> None:
    factors = [learning_rate_factor(schedule, step, 100, 0) for step in range(100)]  # type: ignore[arg-type]
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] <= 0.06


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="got 'step'"):
        learning_rate_factor("step", 1, 2, 0)  # type: ignore[arg-type]
