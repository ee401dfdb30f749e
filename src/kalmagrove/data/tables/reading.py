"""Rows of CSV, JSONL and Parquet files, streamed, each with where it stands."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from kalmagrove.data.compressed import COMPRESSION_SUFFIXES, is_unicode, iter_lines, open_parquet
from kalmagrove.data.example_splits import split_examples
from kalmagrove.data.sources import kind_of_file, source_files
from kalmagrove.data.splits import by_split
from kalmagrove.data.tables.cells import MISSING_WORDS, Cell, Row
from kalmagrove.errors import KalmaGroveError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
DELIMITERS = (",", ";", "\t")


def table_files(source: str) -> dict[str | None, list[Path]]:
    """The files of a table: by split where their names say one for train and another, else all under None.

    Args:
        source: A file, or a folder; of a folder the tables in it and in its folders count, sorted by name.

    Raises:
        KalmaGroveError: There is no such file or folder, or it holds no table.
    """
    path = Path(source).expanduser()
    if path.is_file():
        _require_kind(path)
        return {None: [path]}
    if not source or not path.is_dir():
        raise KalmaGroveError(f"there is no file or folder {source!r}; check the path of the table")
    files = source_files(source, TABLE_SUFFIXES)
    found = by_split((file.name, file.path) for file in files)
    return dict(found.items()) if "train" in found and len(found) > 1 else {None: [file.path for file in files]}


def split_rows(source: str, *, seed: int) -> Iterator[tuple[str, Row]]:
    """Stream the rows of a table with the split that each belongs to, always in the same order.

    Files named train.*, valid.* and test.* keep their rows; see `split_examples`.

    Args:
        source: A file or a folder.
        seed: Chooses another division.

    Raises:
        KalmaGroveError: The table cannot be read, or holds fewer rows than splits.
    """
    rows = {split: chain.from_iterable(map(iter_rows, paths)) for split, paths in table_files(source).items()}
    return split_examples(source, rows, seed=seed)


def iter_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of one file.

    Args:
        path: A .csv, .jsonl or .parquet file, perhaps also .gz, .xz or .zst. A CSV has names in its first line, and
            commas, or semicolons or tabs where that line has no comma.

    Raises:
        KalmaGroveError: The file is damaged, of another type, or holds no row, or a row does not fit; the row is named.
    """
    kind = _require_kind(path)
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[kind](path)
    count = 0
    for row in rows:
        count += 1
        yield row
    if count == 0:
        raise KalmaGroveError(f"{path} holds no rows; give a table with rows in it")


def _require_kind(path: Path) -> str:
    kind = kind_of_file(path, TABLE_SUFFIXES)
    if kind is None:
        raise KalmaGroveError(
            f"{path} is no table of a supported type; use {', '.join(TABLE_SUFFIXES)}, each perhaps with "
            f"{', '.join(COMPRESSION_SUFFIXES)} after it"
        )
    return kind


def _csv_rows(path: Path) -> Iterator[Row]:
    lines = iter_lines(path, longest=None)
    first = next(lines, "")
    if not first.strip():
        raise KalmaGroveError(f"{path} is empty or begins with an empty line; its first line must hold the names")
    reader = csv.reader(chain([first], lines), delimiter=_delimiter(first), strict=True)
    try:
        names = [name.strip() for name in next(reader)]
        _check_names(path, names)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise KalmaGroveError(
                    f"line {reader.line_num} of {path} has {len(cells)} cells, its first line has {len(names)} names; "
                    "mend that line"
                )
            found: dict[str, Cell] = {name: _present(cell) for name, cell in zip(names, cells, strict=True)}
            yield Row(path, reader.line_num, found, typed=False)
    except csv.Error as error:
        place = f"line {reader.line_num} of {path}"
        raise KalmaGroveError(f"{place} is no sound CSV ({error}); mend its quotes or line ends") from error


def _delimiter(header: str) -> str:
    """The first of the usual ones that stands outside the quotes of the names."""
    outside = "".join(header.split('"')[::2])
    return next((delimiter for delimiter in DELIMITERS if delimiter in outside), ",")


def _check_names(path: Path, names: Sequence[str]) -> None:
    for place, name in enumerate(names, start=1):
        if not name:
            raise KalmaGroveError(f"column {place} of {path} has no name; name it, or leave it out if it counts rows")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise KalmaGroveError(f"{path} has two columns named {twice[0]!r}; rename one of them")


def _present(cell: Any) -> Any:
    """None for what means a missing value."""
    if isinstance(cell, str):
        return None if cell.strip() in MISSING_WORDS else cell
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(iter_lines(path, longest=None), start=1):
        if line.isspace():
            continue
        place = f"line {number} of {path}"
        try:
            row = json.loads(line, object_pairs_hook=_without_repeats)
        except _RepeatedName as error:
            raise KalmaGroveError(f"{place} has two cells named {error.name!r}; rename one of them") from None
        except (ValueError, RecursionError) as error:
            raise KalmaGroveError(f"{place} is no sound JSON; mend or remove that line") from error
        if not isinstance(row, dict):
            raise KalmaGroveError(f"{place} is no JSON object; write each row as {{name: value, ...}}")
        yield json_row(row, path, number)


def json_row(row: dict[str, Any], path: Path, number: int) -> Row:
    """A row from the object in a line.

    Raises:
        KalmaGroveError: A cell or a name cannot be used; the line is named.
    """
    place = f"line {number} of {path}"
    cells = {name.strip(): _json_cell(cell, name, place) for name, cell in row.items()}
    _check_json_names(place, list(row), cells)
    return Row(path, number, cells, typed=True)


class _RepeatedName(Exception):
    """A JSON object that has a name twice."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _RepeatedName(name)
        found[name] = value
    return found


def _check_json_names(place: str, names: Sequence[str], cells: dict[str, Cell]) -> None:
    if not all(map(is_unicode, cells)):
        raise KalmaGroveError(f"{place} holds half a surrogate pair in the name of a column; mend or remove that line")
    if len(cells) < len(names) or "" in cells:
        raise KalmaGroveError(f"{place} has a cell without a name, or two whose names differ in white space alone")


def _json_cell(cell: Any, name: str, place: str) -> Cell:
    if isinstance(cell, dict | list):
        raise KalmaGroveError(f"{place} has {_kind_name(cell)} in column {name!r}; give text, a number or true/false")
    if isinstance(cell, str) and not is_unicode(cell):
        raise KalmaGroveError(f"{place} holds half a surrogate pair in column {name!r}; mend or remove that line")
    found: Cell = _present(cell)
    return found


def _kind_name(value: Any) -> str:
    """What a value is, for an error's text."""
    return {"dict": "an object", "list": "a list", "bytes": "bytes"}.get(type(value).__name__, type(value).__name__)


def _parquet_rows(path: Path) -> Iterator[Row]:
    with open_parquet(path) as (table, _):
        names = [name.strip() for name in table.schema_arrow.names]
        _check_names(path, names)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            columns = [column.to_pylist() for column in batch.columns]
            for cells in zip(*columns, strict=True):
                number += 1
                found = {name: _parquet_cell(cell, name, path) for name, cell in zip(names, cells, strict=True)}
                yield Row(path, number, found, typed=True)


def _parquet_cell(cell: Any, name: str, path: Path) -> Cell:
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(sep=" ")
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    if isinstance(cell, decimal.Decimal):
        # A float would make several large whole numbers one.
        cell = int(cell) if cell.is_finite() and cell == cell.to_integral_value() else float(cell)
    if cell is not None and not isinstance(cell, str | int | float | bool):
        raise KalmaGroveError(
            f"column {name!r} of {path} holds {_kind_name(cell)}; leave it out, or give text, numbers, dates or "
            "true/false"
        )
    found: Cell = _present(cell)
    return found
