"""A table's file predicted or completed by a model."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalmagrove.data.tables.cells import Cell, Row, cell_text
from kalmagrove.data.tables.codec import TableCodec, Value
from kalmagrove.data.tables.columns import CategoryColumn, NumberColumn
from kalmagrove.data.tables.reading import iter_rows, table_files
from kalmagrove.errors import UsageError
from kalmagrove.evaluation.modality_model import Predictions
from kalmagrove.evaluation.table_imputation import impute
from kalmagrove.evaluation.table_predictions import PredictionTerms, describe, predict_column
from kalmagrove.evaluation.table_scores import score_predictions
from kalmagrove.models.decoder import KalmaGroveForCausalLM


def predict_table(
    model: KalmaGroveForCausalLM,
    codec: TableCodec,
    data: str,
    *,
    target: str,
    quantiles: Sequence[float],
    terms: PredictionTerms,
) -> Predictions:
    """Predicts a column of every row from the other cells that are there.

    Args:
        model: Of the table.
        codec: Of the table.
        data: A file or a folder of rows; a column that none of them has is not known, which is not the same as missing.
        target: The column; what rows hold of it is for the scores alone.
        quantiles: Levels that are given for numbers and dates.
        terms: How predictions are made.

    Raises:
        UsageError: There is no such column.
        KalmaGroveError: The data cannot be read.
    """
    place = _place_of(codec, target)
    rows = _read(data)
    values, notes = _values_of(codec, rows)
    predictions = predict_column(model, codec, values, place, terms)
    described = describe(codec, place, predictions, quantiles)
    known = [number for number, own in enumerate(values) if own.get(place) is not None]
    chosen = [predictions[number] for number in known] if isinstance(predictions, list) else predictions[known]
    scores = score_predictions(codec, place, chosen, [values[number] for number in known]) if known else {}
    return Predictions([{"row": number, **own} for number, own in enumerate(described, start=1)], scores, notes)


def complete_table(
    model: KalmaGroveForCausalLM, codec: TableCodec, data: str, *, terms: PredictionTerms, typed: bool = False
) -> Predictions:
    """Fills in every missing cell; the columns are the table's, and cells that are there stay as they are.

    Args:
        model: Of the table.
        codec: Of the table.
        data: A file or a folder of rows.
        terms: How predictions are made.
        typed: Whether numbers that are there as text are given as numbers, for a file that tells them apart.

    Raises:
        KalmaGroveError: The data cannot be read.
    """
    rows = _read(data)
    values, notes = _values_of(codec, rows)
    wanted = [{place for name, place in codec.places.items() if row.cells.get(name) is None} for row in rows]
    filled = impute(model, codec, values, wanted, terms)
    completed = [
        {
            name: _shown(codec, place, row.cells.get(name), own.get(place), typed=typed)
            for name, place in codec.places.items()
        }
        for row, own in zip(rows, filled, strict=True)
    ]
    count = sum(map(len, wanted))
    return Predictions(completed, notes=[*notes, f"{count:,} missing cells of {len(rows):,} rows were filled in"])


def write_rows(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """Rows as the text of a file.

    Args:
        rows: At least one; what a row lacks of the others' names is empty.
        kind: .csv, where what is inside a cell gets a column of its own such as ``probabilities:yes``, or .jsonl.
    """
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    flat = [_flat(row) for row in rows]
    text = io.StringIO()
    names = dict.fromkeys(name for row in flat for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}:{inner}": cell_text(own) for inner, own in value.items()}
        else:
            found[name] = cell_text(value)
    return found


def _place_of(codec: TableCodec, target: str) -> int:
    if target not in codec.places:
        nearest = difflib.get_close_matches(target, codec.places, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; its columns: {', '.join(codec.places)}"
        raise UsageError(f"--target: the table has no column {target!r}{hint}")
    return codec.places[target]


def _read(data: str) -> list[Row]:
    files: list[Path] = [path for paths in table_files(data).values() for path in paths]
    return [row for path in files for row in iter_rows(path)]


def _values_of(codec: TableCodec, rows: Sequence[Row]) -> tuple[list[dict[int, Value]], list[str]]:
    """The values of rows, and notes about cells that cannot be looked at."""
    seen = {name for row in rows for name in row.cells}
    unknown: Counter[str] = Counter()
    found = []
    for row in rows:
        # In a file that has a column, a row without it misses it, as in training.
        whole = Row(row.file, row.number, {**dict.fromkeys(seen), **row.cells}, row.typed)
        values = codec.read(whole)
        unknown.update(codec.columns[place].name for place in _left_out(codec, whole, values))
        found.append(values)
    return found, [
        f"{count:,} rows have a {name} that no training row had: they are read, and scored, without it"
        for name, count in unknown.items()
    ]


def _left_out(codec: TableCodec, row: Row, values: dict[int, Value]) -> list[int]:
    return [
        place
        for name, place in codec.places.items()
        if isinstance(codec.columns[place], CategoryColumn) and row.cells.get(name) is not None and place not in values
    ]


def _shown(codec: TableCodec, place: int, cell: Cell, value: Value, *, typed: bool) -> Cell:
    column: Any = codec.columns[place]
    if cell is not None:
        return _number(cell) if typed and isinstance(column, NumberColumn) and isinstance(cell, str) else cell
    shown: Cell = column.show(value)
    return shown


def _number(text: str) -> Cell:
    """A numeral as a number; what is none stays."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
