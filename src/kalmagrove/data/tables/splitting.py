"""The rows of a table in train, valid and test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

from kalmagrove.data.splits import SPLITS, Division, filled_splits
from kalmagrove.data.tables.cells import Row
from kalmagrove.data.tables.reading import iter_rows, table_files
from kalmagrove.errors import KalmaGroveError

HELD_OUT = {"valid": 0.1, "test": 0.1}
"""Expected shares of the rows; tables are shorter than texts."""


def split_rows(source: str, *, seed: int) -> Iterator[tuple[str, Row]]:
    """Stream the rows of a table with the split that each belongs to, always in the same order.

    Files named train.*, valid.* and test.* keep their rows; a split that is missing there is taken out of train. Other
    rows are divided by a seeded hash of their content, so that equal rows are in one split. They are all kept: how
    often a row occurs is part of what a table says.

    Args:
        source: A file or a folder.
        seed: Chooses another division.

    Raises:
        KalmaGroveError: The table cannot be read, or holds fewer rows than splits.
    """
    files = table_files(source)
    if None in files:
        yield from divided(source, _rows(files[None]), Division(HELD_OUT, seed))
        return
    missing = {split: share for split, share in HELD_OUT.items() if split not in files}
    train = _rows(files["train"])
    yield from divided(source, train, Division(missing, seed)) if missing else (("train", row) for row in train)
    for split in SPLITS[1:]:
        yield from ((split, row) for row in _rows(files.get(split, [])))


def _rows(paths: Iterable[Path]) -> Iterator[Row]:
    return chain.from_iterable(iter_rows(path) for path in paths)


class HasContent(Protocol):
    """What can be divided into splits by what it holds."""

    def content(self) -> str:
        """The same text for what is equal."""
        ...


Divisible = TypeVar("Divisible", bound=HasContent)


def divided(source: str, rows: Iterator[Divisible], division: Division) -> Iterator[tuple[str, Divisible]]:
    """Rows with the split that each belongs to.

    They wait until each split has one; where that never comes, the fullest split gives one away.

    Raises:
        KalmaGroveError: There are fewer rows than splits.
    """
    waiting: list[Divisible] = []
    filled: set[str] = set()
    for row in rows:
        waiting.append(row)
        filled.add(division.split(row.content()))
        if len(filled) == len(division.splits):
            yield from ((division.split(kept.content()), kept) for kept in waiting)
            break
    else:
        if len(waiting) < len(division.splits):
            raise KalmaGroveError(
                f"{source} holds {len(waiting)} rows, too few for {', '.join(division.splits)}; give more"
            )
        yield from zip(filled_splits([row.content() for row in waiting], division), waiting, strict=True)
    yield from ((division.split(row.content()), row) for row in rows)
