"""Cells become tokens and features; the schema brings the same codec back, and only a sound one."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kalmagrove.data.tables.cells import Cell, Row
from kalmagrove.data.tables.codec import TableCodec, make_codec, open_codec
from kalmagrove.data.tables.column_kinds import columns_of
from kalmagrove.data.tables.columns import CategoryColumn, DateColumn, NumberColumn
from kalmagrove.errors import KalmaGroveError

ROWS: list[dict[str, Cell]] = [
    {
        "size": f"{number / 4}",
        "colour": ["red", "green", "blue"][number % 3],
        "day": f"2024-01-{number + 1:02d}",
        "note": f"number {number} is <value 1.0> or <|endoftext|>\n",
        "gap": None if number % 2 else "7",
    }
    for number in range(24)
]


def row_of(cells: dict[str, Cell], *, typed: bool = False) -> Row:
    return Row(Path("new.csv"), 5, cells, typed)


@pytest.fixture(scope="module")
def codec() -> TableCodec:
    columns = columns_of(map(row_of, ROWS), bins=8)
    assert [column.kind for column in columns] == ["number", "category", "date", "text", "number"]
    return make_codec(columns, (str(row["note"]) for row in ROWS), text_vocab_size=300)


def test_a_cell_is_its_column_and_its_value(codec: TableCodec) -> None:
    values = codec.read(row_of(ROWS[5]))
    assert values == {0: 1.25, 1: 0, 2: values[2], 3: ROWS[5]["note"], 4: None}
    parts = [codec.part(place, value) for place, value in values.items()]
    assert [part.tokens[0] for part in parts] == codec.column_tokens
    assert all(part.weights.tolist() == [False] + [True] * (len(part.tokens) - 1) for part in parts)
    size, colour, day, note, gap = parts
    assert size.tokens[1] == day.tokens[1] == codec.number_token and len(size.tokens) == len(day.tokens) == 2
    assert colour.tokens[1:].tolist() == [codec.category_tokens[1][0]]
    assert note.tokens[-1] == codec.end_token and gap.tokens[1:].tolist() == [codec.missing_token]
    assert size.features["number"].shape == (1, 4) and not colour.features
    # The second column of numbers is that of the dates.
    assert [int(part.features["number"][0, 0]) for part in (size, day)] == [0, 1]


def test_a_text_that_looks_like_a_token_is_text(codec: TableCodec) -> None:
    whole = codec.part(3, "<value 1.0><missing><|endoftext|><number><end>")
    special = set(codec.tokenizer.get_added_tokens_decoder())
    assert special & set(whole.tokens.tolist()) == {codec.column_tokens[3], codec.end_token}
    assert codec.tokenizer.decode(whole.tokens[1:-1].tolist()) == "<value 1.0><missing><|endoftext|><number><end>"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
@settings(max_examples=50)
def test_any_text_comes_back(text: str) -> None:
    codec = make_codec(
        columns_of([row_of({"t": "a b"}), row_of({"t": "c"}), row_of({"t": "d"})], bins=2), [], text_vocab_size=258
    )
    assert codec.tokenizer.decode(codec.part(0, text).tokens[1:-1].tolist()) == text


def test_an_example_counts_its_cells_and_the_bytes_of_its_line(codec: TableCodec) -> None:
    example = codec.example(row_of({"size": "1.5", "colour": "red", "note": "\u00e9", "day": "2024-01-02"}))
    assert example.values == len(example.parts) == 5
    assert example.size == 4 + 4 + 3 + 11 + 1
    assert example.parts[4].tokens[1:].tolist() == [codec.missing_token]


def test_a_category_that_no_training_row_had_is_left_out(codec: TableCodec) -> None:
    assert 1 not in codec.read(row_of({"colour": "pink", "size": "1"}))
    assert len(codec.example(row_of({**ROWS[0], "colour": "pink"})).parts) == 4


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"size": "tall"}, r"column 'size', line 5 of new.csv: 'tall' is no number; mend or empty that cell"),
        ({"size": "inf"}, "'inf' is no number"),
        ({"size": "1e400"}, "not finite"),
        ({"day": "1.2.2024"}, "is no ISO date such as"),
        ({"day": "2024-01-01T10:00Z"}, "some of its dates have a time zone"),
        ({"colours": "red"}, r"has a column 'colours' that the training rows did not have; .*\(they had: size, colour"),
    ],
)
def test_a_row_that_does_not_fit_is_named(codec: TableCodec, cells: dict[str, Cell], message: str) -> None:
    with pytest.raises(KalmaGroveError, match=message):
        codec.read(row_of(cells))


@pytest.mark.parametrize("written", [("True", "False"), ("true", "false"), ("TRUE", "FALSE")])
def test_a_truth_value_is_one_however_it_is_written(written: tuple[str, str]) -> None:
    column = CategoryColumn("flag", False, written)
    for values in (("True", "False"), ("true", "false"), ("TRUE", "FALSE"), (True, False)):
        assert [column.read(value) for value in values] == [0, 1]
    assert CategoryColumn("size", False, ("true", "small")).read("TRUE") is None


def test_a_truth_value_is_no_number(codec: TableCodec) -> None:
    with pytest.raises(KalmaGroveError, match="True is no number"):
        codec.read(row_of({"size": True}, typed=True))
    assert codec.read(row_of({"size": 3, "colour": "red"}, typed=True)) == {0: 3.0, 1: 2}


def test_the_schema_brings_the_codec_back(codec: TableCodec) -> None:
    schema = json.loads(json.dumps(codec.schema()))
    opened = open_codec(schema, Tokenizer.from_str(codec.tokenizer.to_str()))
    assert opened.columns == codec.columns and opened.schema() == codec.schema()
    for row in map(row_of, ROWS):
        for ours, theirs in zip(codec.example(row).parts, opened.example(row).parts, strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            for name in ours.features:
                np.testing.assert_array_equal(ours.features[name], theirs.features[name])


CHANGES: dict[str, tuple[list[Any], Any, str]] = {
    "another modality": (["modality"], "image", "of modality 'image'"),
    "another version": (["version"], 2, "version 2"),
    "no columns": (["columns"], [], "lists no columns"),
    "a column that is no object": (["columns", 0], "size", "a column must be dict"),
    "an unknown kind": (["columns", 0, "kind"], "colour", "kind must be one of number, date, category, text"),
    "a kind that is a list": (["columns", 0, "kind"], [], "not one of a table"),
    "a separator of two signs": (["columns", 2, "format", "separator"], "ab", "not one of a table"),
    "a name that is no text": (["columns", 0, "name"], 3, "name must be str"),
    "missing values neither there nor not": (["columns", 0, "has_missing"], 1, "has_missing must be bool"),
    "too much": (["columns", 3, "values"], ["a"], "a column of kind text has name, has_missing; got"),
    "a scale that is none": (["columns", 0, "scale"], [], "column 'size': scale must be dict"),
    "a text in a scale": (["columns", 0, "scale", "knots", 0], "0", "a scale holds numbers, got '0'"),
    "no number in a scale": (["columns", 0, "scale", "centre"], float("nan"), "must be finite"),
    "knots that fall": (["columns", 0, "scale", "knots"], [2, 1], "knots must be 1 to 24 and increase"),
    "half a bin": (["columns", 0, "scale", "means"], [1.0], "bins must each have"),
    "a broken number of decimals": (["columns", 0, "decimals"], -1, "decimals must not be negative"),
    "a category twice": (["columns", 1, "values"], ["red", "red", "blue"], "values must be different"),
    "a format that is none": (["columns", 2, "format", "separator"], "x", "there is no format of dates"),
    "two columns of one name": (["columns", 1, "name"], "size", "two columns of one name"),
    "more categories than tokens": (["columns", 1, "values"], ["a", "b", "c", "d"], "no token <value 1.3>"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_unsound_schema_is_refused(codec: TableCodec, what: str) -> None:
    path, value, message = CHANGES[what]
    schema = copy.deepcopy(json.loads(json.dumps(codec.schema())))
    place: Any = schema
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(KalmaGroveError, match=message):
        open_codec(schema, codec.tokenizer)


NUMERALS = st.one_of(st.integers(-(10**6), 10**6).map(str), st.floats(-1e6, 1e6).map(lambda number: f"{number:.3f}"))
DAYS = st.dates().map(str)


@given(st.lists(st.tuples(NUMERALS, DAYS, st.sampled_from(["a", "b"])), min_size=4, max_size=30))
@settings(max_examples=40, deadline=None)
def test_what_columns_read_they_write_again(rows: list[tuple[str, str, str]]) -> None:
    columns = columns_of((row_of(dict(zip("nde", row, strict=True))) for row in rows), bins=6)
    number, day, letter = columns
    assert isinstance(number, NumberColumn) and isinstance(day, DateColumn) and isinstance(letter, CategoryColumn)
    for cells in rows:
        assert float(number.show(number.read(cells[0]))) == float(cells[0])
        assert day.show(day.read(cells[1])) == cells[1]
        place = letter.read(cells[2])
        assert place is not None and letter.show(place) == cells[2]
