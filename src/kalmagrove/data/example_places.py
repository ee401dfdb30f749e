"""Where the tokens of examples stand in a batch, all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placed:
    """Where the tokens of some examples stand.

    Attributes:
        sources: In the files, (tokens,).
        rows: In the batch, (tokens,).
        columns: In their row, (tokens,).
        clocks: Where the part of each begins on both axes, (tokens,).
        ends: The column behind the last token of each row, (rows,).
        last_clocks: What that column has on both axes, (rows,).
    """

    sources: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    clocks: np.ndarray
    ends: np.ndarray
    last_clocks: np.ndarray


def place_parts(orders: Sequence[np.ndarray], part_ends: np.ndarray, places: np.ndarray) -> Placed:
    """Places the tokens of examples in rows, behind a first token each.

    Args:
        orders: The parts of each example in their order; at least one example.
        part_ends: Behind which token each part of the files ends, (parts,).
        places: Row and column of the files' tokens within their parts, (tokens, 2).
    """
    parts = np.concatenate(orders)
    row_of_part = np.repeat(np.arange(len(orders)), [len(order) for order in orders])
    firsts = np.where(parts > 0, part_ends[np.maximum(parts, 1) - 1], 0).astype(np.int64)
    sizes = part_ends[parts].astype(np.int64) - firsts
    before = np.cumsum(sizes) - sizes
    part_of_token = np.repeat(np.arange(len(parts)), sizes)
    inside = np.arange(len(part_of_token)) - before[part_of_token]
    sources = firsts[part_of_token] + inside
    lengths = np.zeros(len(parts), dtype=np.int64)
    np.maximum.at(lengths, part_of_token, places[sources].max(axis=1, initial=0).astype(np.int64))
    columns, ends = _summed_in_rows(sizes, row_of_part, len(orders))
    clocks, last_clocks = _summed_in_rows(lengths + 1, row_of_part, len(orders))
    return Placed(
        sources, row_of_part[part_of_token], columns[part_of_token] + inside, clocks[part_of_token], ends, last_clocks
    )


def _summed_in_rows(sizes: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One more than the sum of the sizes before each in its row, (sizes,), and than that of each whole row, (rows,)."""
    totals = np.zeros(count, dtype=np.int64)
    np.add.at(totals, rows, sizes)
    before = np.cumsum(sizes) - sizes - (np.cumsum(totals) - totals)[rows]
    return before + 1, totals + 1
