"""Rows of a table as parts of a sequence, in the terms of its columns and their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmagrove.data.examples import Example, Part
from kalmagrove.data.tables.cells import Row, cell_text
from kalmagrove.data.tables.columns import (
    CategoryColumn,
    Column,
    DateColumn,
    NumberColumn,
    column_from_json,
    column_to_json,
    is_numeric,
)
from kalmagrove.data.tokenizer import train_tokenizer
from kalmagrove.errors import KalmaGroveError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Value = float | int | str | None
"""What a cell is to its column: a number, which of the categories, or text; None is missing."""

NUMBER, MISSING, END = "<number>", "<missing>", "<end>"
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class TableCodec:
    """The columns of a table with their tokens.

    A cell is its column's token and what it holds: the number placeholder with its features, the token of a category,
    the tokens of a text and one that ends it, or the token of a missing value.

    Attributes:
        columns: In their natural order.
        tokenizer: Has their tokens; a text that looks like one of them is encoded as any other text.
    """

    columns: tuple[Column, ...]
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.tokenizer.encode_special_tokens = True

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each column by its name."""
        return {column.name: place for place, column in enumerate(self.columns)}

    @cached_property
    def column_tokens(self) -> list[int]:
        """The token before a value, for each column."""
        return [self._token(_column_name(place)) for place in range(len(self.columns))]

    @cached_property
    def category_tokens(self) -> list[list[int]]:
        """The tokens of the values, for each column; none where it is not of categories."""
        return [
            [self._token(_value_name(place, value)) for value in range(len(column.values))]
            if isinstance(column, CategoryColumn)
            else []
            for place, column in enumerate(self.columns)
        ]

    @cached_property
    def number_places(self) -> dict[int, int]:
        """Which column of numbers a column is, by its place among all."""
        numeric = [place for place, column in enumerate(self.columns) if is_numeric(column)]
        return {place: number for number, place in enumerate(numeric)}

    @cached_property
    def number_token(self) -> int:
        """The placeholder of a number."""
        return self._token(NUMBER)

    @cached_property
    def missing_token(self) -> int:
        """The token of a missing value."""
        return self._token(MISSING)

    @cached_property
    def end_token(self) -> int:
        """The token after a text."""
        return self._token(END)

    def _token(self, name: str) -> int:
        found: int | None = self.tokenizer.token_to_id(name)
        if found is None:
            raise KalmaGroveError(f"the tokenizer has no token {name}; it does not belong to this table")
        return found

    def modalities(self) -> dict[str, dict[str, Any]]:
        """The options of the modalities that a model of these rows has."""
        bins = [column.scale.bins for column in self.columns if isinstance(column, NumberColumn | DateColumn)]
        return {"number": {"placeholder": self.number_token, "bins": bins}} if bins else {}

    def schema(self) -> dict[str, Any]:
        """The columns as JSON, for `open_codec`."""
        columns = [column_to_json(column) for column in self.columns]
        return {"modality": "table", "version": SCHEMA_VERSION, "columns": columns}

    def read(self, row: Row) -> dict[int, Value]:
        """The values of a row by the place of their column.

        A category that no training row had is left out, as is a cell that the row does not have.

        Raises:
            KalmaGroveError: The row has a column that is not the table's, or a cell that its column cannot read.
        """
        values: dict[int, Value] = {}
        for name, cell in row.cells.items():
            place = self.places.get(name)
            if place is None:
                known = ", ".join(self.places)
                raise KalmaGroveError(
                    f"{row.place} has a column {name!r} that the training rows did not have; rename or remove it (they "
                    f"had: {known})"
                )
            try:
                value = None if cell is None else self.columns[place].read(cell)
            except ValueError as error:
                raise KalmaGroveError(f"column {name!r}, {row.place}: {error}; mend or empty that cell") from error
            if cell is None or value is not None:
                values[place] = value
        return values

    def part(self, place: int, value: Value) -> Part:
        """A cell: the token of its column, which is only read, and its value, which is to be predicted."""
        features: dict[str, np.ndarray] = {}
        column = self.columns[place]
        if value is None:
            tokens = [self.missing_token]
        elif isinstance(column, NumberColumn | DateColumn):
            tokens = [self.number_token]
            features = {"number": np.array([[self.number_places[place], *column.scale.features(float(value))]])}
        elif isinstance(column, CategoryColumn):
            tokens = [self.category_tokens[place][int(value)]]
        else:
            tokens = [*self.tokenizer.encode(str(value), add_special_tokens=False).ids, self.end_token]
        whole = np.array([self.column_tokens[place], *tokens])
        return Part(whole, np.arange(len(whole)) > 0, features)

    def example(self, row: Row) -> Example:
        """A row to learn from: all of its cells, those that are missing too.

        Its bytes are those of a line of a CSV without quotes.

        Raises:
            KalmaGroveError: As for `read`.
        """
        values = self.read(row)
        values |= {place: None for name, place in self.places.items() if name not in row.cells}
        parts = tuple(self.part(place, values[place]) for place in sorted(values))
        texts = [cell_text(row.cells.get(self.columns[place].name)) for place in values]
        return Example(parts, values=len(parts), size=sum(len(text.encode()) + 1 for text in texts))


def make_codec(columns: tuple[Column, ...], texts: Iterable[str], *, text_vocab_size: int) -> TableCodec:
    """The codec of new columns, with a tokeniser that is trained on their texts."""
    from tokenizers import AddedToken

    tokenizer = train_tokenizer(texts, text_vocab_size)
    names = [NUMBER, MISSING, END, *(_column_name(place) for place in range(len(columns)))]
    for place, column in enumerate(columns):
        if isinstance(column, CategoryColumn):
            names += [_value_name(place, value) for value in range(len(column.values))]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return TableCodec(columns, tokenizer)


def open_codec(schema: dict[str, Any], tokenizer: Tokenizer) -> TableCodec:
    """The codec of a model.

    Args:
        schema: As `TableCodec.schema` gave it.
        tokenizer: The model's.

    Raises:
        KalmaGroveError: They are damaged, or do not belong together.
    """
    try:
        if schema.get("modality") != "table" or schema.get("version") != SCHEMA_VERSION:
            raise ValueError(f"it is of modality {schema.get('modality')!r} and version {schema.get('version')!r}")
        if not isinstance(schema.get("columns"), list) or not schema["columns"]:
            raise ValueError("it lists no columns")
        columns = tuple(column_from_json(column) for column in schema["columns"])
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise KalmaGroveError(f"the schema is not one of a table ({error}); train the model again") from error
    codec = TableCodec(columns, tokenizer)
    if len(codec.places) < len(columns):
        raise KalmaGroveError("the schema has two columns of one name; train the model again")
    # All tokens are looked up, so that a wrong tokeniser is an error here.
    _ = codec.column_tokens, codec.category_tokens, codec.number_token, codec.missing_token, codec.end_token
    return codec


def _column_name(place: int) -> str:
    return f"<column {place}>"


def _value_name(place: int, value: int) -> str:
    return f"<value {place}.{value}>"
