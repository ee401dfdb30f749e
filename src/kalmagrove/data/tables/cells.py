"""Cells of tables as their files give them: what each can be, and how it is written."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kalmagrove.data.tables.dates import parse_date

Cell = str | float | int | bool | None
"""None is a missing value. Dates come as text."""
CellKind = Literal["number", "name", "date", "word"]

MISSING_WORDS = frozenset({"", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "?"})
"""Texts that mean a missing value, in any kind of file."""
LARGEST_NUMBER = 1e100
"""Beyond it squares and sums would not be finite."""
LARGEST_WHOLE = 2**53
"""Above it not every whole number is a float, so that a larger one is a name."""

_NUMERAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_WITH_LEADING_ZERO = re.compile(r"[+-]?0\d")


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        file: Where it stands.
        number: Its line in a file of text, else its place, from 1.
        cells: By column; a column that is not among them is missing.
        typed: Whether the file says what is a number and what is text, as a CSV does not.
    """

    file: Path
    number: int
    cells: dict[str, Cell]
    typed: bool

    @property
    def place(self) -> str:
        """For an error's text."""
        return f"{'row' if '.parquet' in self.file.suffixes else 'line'} {self.number} of {self.file}"

    def content(self) -> str:
        """The same text for equal rows: what divides them into splits."""
        return json.dumps(sorted((name, cell_text(cell)) for name, cell in self.cells.items() if cell is not None))


def kind_of_cell(cell: str | float | int | bool, *, typed: bool) -> CellKind:
    """What a cell can be.

    A plain numeral is a number; where the file has types only what it says is one. Whole numbers that begin with a zero
    or are too large for a float are names, as postcodes and identifiers are.
    """
    if isinstance(cell, bool):
        return "word"
    if isinstance(cell, int | float):
        return "name" if isinstance(cell, int) and abs(cell) > LARGEST_WHOLE else "number"
    text = cell.strip()
    if not typed and _NUMERAL.fullmatch(text):
        digits = text.lstrip("+-")
        too_large = digits.isdigit() and (len(digits) > 16 or int(digits) > LARGEST_WHOLE)
        return "name" if too_large or _WITH_LEADING_ZERO.match(text) else "number"
    return "date" if parse_date(text) is not None else "word"


def cell_number(cell: Cell) -> float:
    """A cell as a number.

    Raises:
        ValueError: It is no plain numeral, or not finite.
    """
    if isinstance(cell, str) and not _NUMERAL.fullmatch(cell.strip()):
        raise ValueError(f"{shown(cell)} is no number")
    if isinstance(cell, bool) or cell is None:
        raise ValueError(f"{shown(cell)} is no number")
    try:
        value = float(cell)
    except OverflowError:
        value = math.inf
    if not abs(value) <= LARGEST_NUMBER:
        raise ValueError(f"{shown(cell)} is not finite or beyond {LARGEST_NUMBER:g}")
    return value


def decimals_of(cell: Cell) -> int | None:
    """Digits behind a number's point; None where it is written with an exponent."""
    text = cell_text(cell).strip()
    if "e" in text.lower():
        return None
    return len(text.partition(".")[2].rstrip("0")) if isinstance(cell, float) else len(text.partition(".")[2])


def cell_text(cell: Cell) -> str:
    """A cell as a CSV has it."""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return "" if cell is None else str(cell)


def shown(cell: Cell) -> str:
    """A cell for an error's text, not too long."""
    text = repr(cell)
    return text if len(text) <= 60 else text[:57] + "..."
