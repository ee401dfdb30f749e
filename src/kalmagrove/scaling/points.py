"""Finished runs as the points of a scaling law, read from a table; what cannot be used is named."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalmagrove.errors import KalmaGroveError, UsageError

_NAMES = {"N": "parameters", "D": "tokens", "C": "flops", "n": "parameters", "d": "tokens"}
TABLE = "runs.jsonl"
"""Of a sweep: a row for each run of its ladder."""
_NUMBERS = ("parameters", "tokens", "loss")


@dataclass(frozen=True)
class Point:
    """The end of one run whose schedule was as long as the run.

    Attributes:
        parameters: Different ones; a shared one counts once.
        tokens: That the run read, repeated ones counted again.
        loss: Nats a token on text that was not trained on.
        family: Models of one family share a law.
        rank_ratio: Rank of Grove's factors over the full rank; 1 for a dense model.
        unique_tokens: Different tokens of the training text; the same as ``tokens`` where none was read twice.
        flops: Of the whole training; None where it was not counted.
        seconds: Of the training steps on one worker; None where they were not timed.
        seed: Runs that differ in nothing else are repetitions of one point.
        vocabulary: A name of the tokeniser; losses of different ones cannot be compared.
        size: A name of the shape, which models of different ranks share; empty where there is none.
    """

    parameters: float
    tokens: float
    loss: float
    family: str = "all"
    rank_ratio: float = 1.0
    unique_tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    seed: int = 0
    vocabulary: str = ""
    size: str = ""


@dataclass(frozen=True)
class PointTable:
    """Points of a fit, and what was left out.

    Attributes:
        points: In the order of the file.
        left_out: A line for each row that is not among them, with the reason.
    """

    points: tuple[Point, ...]
    left_out: tuple[str, ...]


def read_points(*paths: Path) -> PointTable:
    """Points from .csv, .json (a list) or .jsonl files with a row for each run, or from the folders of sweeps.

    Columns are named as the fields of :class:`Point`; N, D and C stand for parameters, tokens and flops. Others are
    ignored.

    Raises:
        UsageError: A file is of another type, or lacks a column.
        KalmaGroveError: It cannot be read, a cell is no number, or the runs have several tokenisers.
    """
    points: list[Point] = []
    left_out: list[str] = []
    tables = [table_path(path) for path in paths]
    for table in tables:
        for number, point in enumerate(_points(table), start=1):
            reason = _reason_against(point)
            if reason is None:
                points.append(point)
            else:
                left_out.append(f"row {number}{f' of {table}' if len(tables) > 1 else ''}: {reason}")
    names = " and ".join(map(str, tables))
    vocabularies = sorted({point.vocabulary for point in points})
    if len(vocabularies) > 1:
        raise KalmaGroveError(
            f"{names} mixes the vocabularies {', '.join(map(repr, vocabularies))}, whose losses cannot be compared; "
            "fit each alone"
        )
    if not points:
        raise KalmaGroveError(f"{names} holds no run that can be used" + (f": {left_out[0]}" if left_out else ""))
    return PointTable(tuple(points), tuple(left_out))


def _points(table: Path) -> Iterator[Point]:
    for number, row in enumerate(_rows(table), start=1):
        named = {_NAMES.get(key, key): value for key, value in row.items() if key is not None}
        missing = [name for name in _NUMBERS if name not in named]
        if missing:
            raise UsageError(f"{table} has no column {missing[0]}; it needs {', '.join(_NUMBERS)} (or N, D, loss)")
        yield _point(table, number, named)


def table_path(path: Path) -> Path:
    """The table of a sweep where its folder is given.

    Raises:
        KalmaGroveError: The folder has none.
    """
    if not path.is_dir():
        return path
    if not (path / TABLE).is_file():
        raise KalmaGroveError(f"{path} holds no {TABLE}; give the folder of a finished scale sweep, or a table")
    return path / TABLE


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if path.suffix == ".jsonl":
            rows: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            rows = json.loads(text)
        else:
            raise UsageError(f"{path} must be a .csv, .json or .jsonl file with a row for each run")
    except OSError as error:
        raise KalmaGroveError(f"{path} cannot be read ({error.strerror}); give a table of runs") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise KalmaGroveError(f"{path} is not a sound table: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise KalmaGroveError(f"{path} must hold a list of objects, one for each run")
    return rows


def _point(path: Path, number: int, row: Mapping[str, Any]) -> Point:
    values: dict[str, Any] = {}
    for name in Point.__dataclass_fields__:
        value = row.get(name)
        if value is None or value == "":
            continue
        if name in ("family", "vocabulary", "size"):
            values[name] = str(value)
            continue
        try:
            values[name] = int(value) if name == "seed" else float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise KalmaGroveError(f"row {number} of {path} has the {name} {value!r}, which is no number") from error
    return Point(**{"parameters": math.nan, "tokens": math.nan, "loss": math.nan} | values)


def _reason_against(point: Point) -> str | None:
    if math.isnan(point.loss):
        return "it has no loss (it did not finish, or diverged)"
    for name in (*_NUMBERS, "rank_ratio"):
        value = getattr(point, name)
        if not math.isfinite(value):
            return f"its {name} is {value} (a run that did not finish, or diverged)"
        if value <= 0:
            return f"its {name} is {value:g}, and must be positive"
    if point.unique_tokens is not None and not 0 < point.unique_tokens < math.inf:
        return f"its unique_tokens is {point.unique_tokens:g}, and must be positive"
    return None
