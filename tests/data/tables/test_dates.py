"""Dates become numbers and come back in their format."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalmagrove.data.tables.dates import DateFormat, parse_date


@pytest.mark.parametrize(
    "text",
    [
        "2024-02-29",
        "0001-01-01",
        "9999-12-31",
        "1969-12-31T23:59",
        "2024-01-31 08:05:09",
        "2024-01-31T08:05:09.5",
        "2024-01-31 08:05:09.123456",
        "2024-01-31T08:05:09Z",
        "2024-01-31T08:05+02:00",
        "2024-01-31 08:05:09.25-09:30",
    ],
)
def test_a_date_comes_back_as_it_was_written(text: str) -> None:
    found = parse_date(text)
    assert found is not None
    assert found[1].show(found[0]) == text


@pytest.mark.parametrize(
    "text",
    [
        "2024-02-30",
        "2024-13-01",
        "24-01-01",
        "2024-01-01 25:00",
        "2024-W01-1",
        "20240101",
        "08:05",
        "2024-01-01T08",
        "",
    ],
)
def test_what_is_no_iso_date(text: str) -> None:
    assert parse_date(text) is None


def test_seconds_are_those_since_1970() -> None:
    assert parse_date("1970-01-02") == (86400.0, DateFormat())
    assert parse_date("1970-01-01T01:00+02:00") == (-3600.0, DateFormat("T", -1, "+02:00"))


@given(
    st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)),
    st.sampled_from([" ", "T"]),
    st.sampled_from(["seconds", "microseconds"]),
    st.sampled_from(["", "Z"]),
)
def test_any_moment_comes_back(moment: datetime, separator: str, precision: str, zone: str) -> None:
    text = moment.isoformat(separator, precision) + zone
    found = parse_date(text)
    assert found is not None and found[1].show(found[0]) == text
    exact = moment.replace(microsecond=0 if precision == "seconds" else moment.microsecond, tzinfo=UTC).timestamp()
    assert abs(found[0] - exact) < 1e-6


def test_a_column_takes_the_finest_format_and_rounds_to_it() -> None:
    joined = DateFormat().joined(DateFormat("T", 0)).joined(DateFormat(" ", -1))
    assert joined == DateFormat("T", 0)
    assert joined.show(86399.6) == "1970-01-02T00:00:00"
    assert DateFormat().show(86400 * 1.6) == "1970-01-03"
    assert DateFormat("T", 2).show(0.126) == "1970-01-01T00:00:00.13"
    with pytest.raises(ValueError, match="some of its dates have a time zone"):
        DateFormat("T", 0, "Z").joined(DateFormat("T", 0))


def test_an_offset_is_added_again() -> None:
    moment = datetime(2024, 5, 1, tzinfo=UTC)
    found = parse_date((moment + timedelta(hours=2)).replace(tzinfo=None).isoformat() + "+02:00")
    assert found is not None and found[0] == moment.timestamp()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("9999-12-31 23:59:59.999999", "9999-12-31 23:59:59.999999"),
        ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59Z"),
        ("0001-01-01 00:00:00", "0001-01-01 00:00:00"),
    ],
)
def test_the_last_and_the_first_moment_can_be_written(text: str, shown: str) -> None:
    found = parse_date(text)
    assert found is not None and found[1].show(found[0]) == shown


def test_a_moment_that_no_zone_can_say_is_written_as_the_nearest() -> None:
    found = parse_date("9999-12-31T23:59:59Z")
    assert found is not None and DateFormat("T", 0, "+02:00").show(found[0]) == "9999-12-31T23:59:59+02:00"
