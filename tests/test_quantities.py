"""What people write as numbers and durations, and what is refused."""

import pytest

from kalmagrove.errors import UsageError
from kalmagrove.quantities import parse_count, parse_duration


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("500k", 500_000),
        ("2.5m", 2_500_000),
        ("1b", 10**9),
        ("12_000", 12000),
        ("4.02k", 4020),
        ("8.12m", 8_120_000),
        ("1e6", 10**6),
        # As YAML reads 1e6 and 1e16.
        (1e6, 10**6),
        (1e16, 10**16),
    ],
)
def test_counts(text: str | float, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["1e400", "1e999999m", "1e9999999999999999999"])
def test_more_tokens_than_can_be_counted_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"'{text}' is more than"):
        parse_count(text)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("0.5h", 1800)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "ten", "10", "5 m", "3d", "m5", "9" * 400 + "h", "9" * 308 + "h"])
def test_what_is_not_a_duration_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_duration(text)
