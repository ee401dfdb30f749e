"""What the columns of a table hold, told from its training rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from kalmagrove.data.tables.cells import (
    Cell,
    CellKind,
    Row,
    cell_number,
    cell_text,
    decimals_of,
    kind_of_cell,
    shown,
)
from kalmagrove.data.tables.columns import CategoryColumn, Column, DateColumn, NumberColumn, TextColumn
from kalmagrove.data.tables.dates import DateFormat, parse_date
from kalmagrove.data.tables.number_scale import make_scale
from kalmagrove.errors import KalmaGroveError

MOST_CATEGORIES = 256
"""Different texts of a column of categories; each must also occur twice in the mean."""
DIRTY_FROM = 0.9
"""A column with so large a share of numbers, or of dates, is one that has wrong cells."""


def columns_of(rows: Iterable[Row], *, bins: int) -> tuple[Column, ...]:
    """The columns of a table, in the order in which they first come.

    Args:
        rows: The training rows.
        bins: Most bins of a column of numbers.

    Raises:
        KalmaGroveError: A column is empty, or holds cells that do not go together; one of them is named.
    """
    found: dict[str, _Collected] = {}
    count = 0
    for row in rows:
        count += 1
        for name, cell in row.cells.items():
            if name not in found:
                found[name] = _Collected(name)
            if cell is not None:
                found[name].add(cell, row)
    return tuple(collected.column(count, bins) for collected in found.values())


class _Collected:
    """What is seen of one column."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[CellKind] = Counter()
        self.examples: dict[CellKind, str] = {}
        self.has_typed_numbers = False
        self.numbers = array("d")
        self.decimals: int | None = 0
        self.dates = array("d")
        self.date_format: DateFormat | None = None
        self.words: set[str] | None = set()

    def add(self, cell: str | float | int | bool, row: Row) -> None:
        kind = kind_of_cell(cell, typed=row.typed)
        self.counts[kind] += 1
        if kind not in self.examples:
            self.examples[kind] = f"{shown(cell)} in {row.place}"
        try:
            self._add_value(kind, cell, row)
        except ValueError as error:
            raise KalmaGroveError(f"column {self.name!r}, {row.place}: {error}; mend or empty that cell") from error
        if self.words is not None:
            self.words.add(cell_text(cell).strip())
            if len(self.words) > MOST_CATEGORIES:
                self.words = None

    def _add_value(self, kind: CellKind, cell: Cell, row: Row) -> None:
        if kind == "number":
            self.has_typed_numbers |= row.typed
            self.numbers.append(cell_number(cell))
            own = decimals_of(cell)
            self.decimals = None if own is None or self.decimals is None else max(own, self.decimals)
        elif kind == "date":
            parsed = parse_date(cell_text(cell).strip())
            assert parsed is not None
            self.dates.append(parsed[0])
            self.date_format = parsed[1] if self.date_format is None else self.date_format.joined(parsed[1])

    def column(self, rows: int, bins: int) -> Column:
        """The column, decided.

        Raises:
            KalmaGroveError: It is empty, or its cells do not go together.
        """
        present = self.counts.total()
        if present == 0:
            raise KalmaGroveError(f"column {self.name!r} is empty in the training rows; leave it out")
        has_missing = present < rows
        self._check_clean(present)
        if self.counts["number"] == present:
            return NumberColumn(self.name, has_missing, make_scale(self.numbers, bins=bins), self.decimals)
        if self.counts["date"] == present:
            assert self.date_format is not None
            return DateColumn(self.name, has_missing, make_scale(self.dates, bins=bins), self.date_format)
        if self.words is not None and (len(self.words) <= 2 or 2 * len(self.words) <= present):
            return CategoryColumn(self.name, has_missing, tuple(sorted(self.words)))
        return TextColumn(self.name, has_missing)

    def _check_clean(self, present: int) -> None:
        """That a column of numbers or dates has no cell of another kind.

        A file with types says what is a number, so that numbers and texts in one column are a mistake there. In a CSV
        they are one where nearly all cells are numbers, unless the others are names: numerals that are no quantities.
        """
        others_of: dict[CellKind, tuple[CellKind, ...]] = {
            "number": ("word", "date"),
            "date": ("word", "number", "name"),
        }
        for kind, others in others_of.items():
            wrong = [other for other in others if self.counts[other]]
            share = self.counts[kind] / present
            if wrong and (share >= DIRTY_FROM or (kind == "number" and self.has_typed_numbers)):
                count = sum(self.counts[other] for other in wrong)
                raise KalmaGroveError(
                    f"column {self.name!r} holds {kind}s but for {count} of {present} cells, such as "
                    f"{self.examples[wrong[0]]}; mend or empty these cells, or save the table as JSONL or Parquet with "
                    "nothing but text in this column"
                )
