"""What columns hold is told from their training rows, and dirty columns are an error or follow a rule."""

from pathlib import Path

import pytest

from kalmagrove.data.tables.cells import Cell, Row
from kalmagrove.data.tables.column_kinds import columns_of
from kalmagrove.data.tables.columns import CategoryColumn, Column, DateColumn, NumberColumn
from kalmagrove.errors import KalmaGroveError


def column_of(cells: list[Cell], *, typed: bool = False, bins: int = 8) -> Column:
    rows = [Row(Path("t.csv"), number, {"x": cell}, typed) for number, cell in enumerate(cells, start=2)]
    (found,) = columns_of(rows, bins=bins)
    return found


CASES: dict[str, tuple[list[Cell], bool, str]] = {
    "whole numbers": (["1", "2", "-3", "+4"], False, "number"),
    "every kind of numeral": (["1.5", ".5", "1.", "1e5", "-2E-3", "0", "0.25", " 7 "], False, "number"),
    "two different numbers": (["0", "1"] * 5, False, "number"),
    "one number": (["3", "3", None], False, "number"),
    "few different texts": (["a", "b", "a", "b", "c", "c"], False, "category"),
    "two different texts": (["a", "b"], False, "category"),
    "many different texts": (["a", "b", "c", "d"], False, "text"),
    "dates": (["2024-01-31", "2023-12-01"], False, "date"),
    "times of different precision": (["2024-01-31", "2023-12-01 10:00", "2023-12-01T10:00:01"], False, "date"),
    "postcodes": (["01234", "99999", "10115", "80331"], False, "text"),
    "few different postcodes": (["01234", "99999"] * 3, False, "category"),
    "identifiers too large for a float": (["12345678901234567890", "3", "4"], False, "text"),
    "numbers and a few words": (["1", "2", "3", "many"] * 5, False, "category"),
    "numbers and many words": (["1", "2", "3", "4", "five", "six", "seven", "eight"], False, "text"),
    "digits with underscores": (["1_000", "2_000"], False, "category"),
    "thousands with commas": (["1,000", "2,000", "3,000"], False, "text"),
    "truth values": ([True, False, True], True, "category"),
    "typed numbers": ([1, 2.5, 3], True, "number"),
    "typed text that looks like numbers": (["1", "2", "1", "2"], True, "category"),
    "typed whole numbers too large for a float": ([2**60, 5, 2**61], True, "text"),
    "typed dates": (["2024-01-31", "2024-02-01"], True, "date"),
}


@pytest.mark.parametrize("what", CASES)
def test_the_kind_of_a_column(what: str) -> None:
    cells, typed, kind = CASES[what]
    assert column_of(cells, typed=typed).kind == kind


DIRTY: dict[str, tuple[list[Cell], bool, str]] = {
    "one word among numbers": (
        [str(number) for number in range(99)] + ["12 apples"],
        False,
        "column 'x' holds numbers but for 1 of 100 cells, such as '12 apples' in line 101 of t.csv; mend or empty",
    ),
    "infinity among numbers": (
        [str(number) for number in range(99)] + ["inf"],
        False,
        "holds numbers but for 1 of 100",
    ),
    "one word among dates": (["2024-01-31"] * 30 + ["soon"], False, "column 'x' holds dates but for 1 of 31"),
    "numbers and texts in a typed file": (
        [1, 2, "x"],
        True,
        "holds numbers but for 1 of 3 cells, such as 'x' in line 4",
    ),
    "numbers and numerals in a typed file": ([1, 2, "3.5"], True, "holds numbers but for 1 of 3"),
    "numbers and truth values": ([1, True], True, "such as True in line 3"),
    "typed infinity": ([1.0, float("inf")], True, "line 3 of t.csv: inf is not finite"),
    "a number beyond all floats": (["1", "1e999"], False, "'1e999' is not finite or beyond 1e"),
    "dates with and without a time zone": (
        ["2024-01-31T10:00Z", "2024-01-31T10:00"],
        False,
        "column 'x', line 3 of t.csv: some of its dates have a time zone",
    ),
    "nothing": ([None, None], False, "column 'x' is empty in the training rows; leave it out"),
}


@pytest.mark.parametrize("what", DIRTY)
def test_a_dirty_column_is_named(what: str) -> None:
    cells, typed, message = DIRTY[what]
    with pytest.raises(KalmaGroveError, match=message):
        column_of(cells, typed=typed)


def test_a_column_remembers_missing_values_decimals_and_formats() -> None:
    number = column_of(["1.50", None, "2", "3.125"])
    assert isinstance(number, NumberColumn) and number.has_missing and number.decimals == 3
    assert number.show(2.00049) == 2.0
    whole = column_of(["1", "2", "30"])
    assert isinstance(whole, NumberColumn) and not whole.has_missing and whole.show(2.6) == 3
    assert isinstance(whole.show(2.6), int)
    exponent = column_of(["1e-7", "2.5"])
    assert isinstance(exponent, NumberColumn) and exponent.show(1.23456e-7) == 1.23456e-7
    date = column_of(["2024-01-31 10:00", "2024-02-01 10:00"])
    assert isinstance(date, DateColumn) and date.show(date.read("2024-02-29 10:00")) == "2024-02-29 10:00"


def test_categories_are_sorted_and_a_truth_value_is_read_in_any_spelling() -> None:
    column = column_of([True, False, True], typed=True)
    assert isinstance(column, CategoryColumn) and column.values == ("false", "true")
    assert [column.read(cell) for cell in (True, "true", "True", "False", "yes")] == [1, 1, 1, 0, None]


def test_a_column_that_begins_late_is_missing_before() -> None:
    rows = [Row(Path("t.jsonl"), 1, {"a": 1}, True), Row(Path("t.jsonl"), 2, {"a": 2, "b": "x"}, True)]
    first, second = columns_of(rows, bins=4)
    assert (first.has_missing, second.has_missing) == (False, True)
