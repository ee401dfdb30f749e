"""A table as a source of examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kalmagrove.data.examples import Example, ExampleSource
from kalmagrove.data.sources import content_fingerprint
from kalmagrove.data.tables.cells import Cell
from kalmagrove.data.tables.codec import TableCodec, make_codec
from kalmagrove.data.tables.column_kinds import columns_of
from kalmagrove.data.tables.columns import TextColumn
from kalmagrove.data.tables.reading import TABLE_SUFFIXES, split_rows
from kalmagrove.data.tokenizer import SMALLEST_VOCABULARY
from kalmagrove.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class TableSource:
    """The rows of a table, each with its columns in any order: an `ExampleSource`."""

    source: str
    seed: int
    codec: TableCodec
    tokenizer: Tokenizer
    modalities: dict[str, dict[str, Any]]
    schema: dict[str, Any]
    inputs: dict[str, Any]
    modality: str = "table"
    shuffles: bool = True
    predicts_end: bool = False

    def examples(self, split: str) -> Iterator[Example]:
        """The rows of a split.

        Raises:
            KalmaGroveError: A row has a cell that its column cannot read, or another column.
        """
        return (self.codec.example(row) for own, row in split_rows(self.source, seed=self.seed) if own == split)


def table_source(path: str, *, seed: int, bins: int = 64, text_vocab_size: int = 1024) -> ExampleSource:
    """The rows of a table, its columns told from the training rows alone.

    Args:
        path: A .csv, .jsonl or .parquet file, perhaps also .gz, .xz or .zst, or a folder of them; files named train.*,
            valid.* and test.* in it are the splits.
        seed: Divides the rows where there are no such files.
        bins: Most bins that a number is predicted as.
        text_vocab_size: Vocabulary of the byte-level BPE that is trained on the columns of text.

    Raises:
        KalmaGroveError: The table cannot be read, or a column's cells do not go together.
        UsageError: An option is out of its range.
    """
    if bins < 2 or text_vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"need at least 2 bins and a text vocabulary of at least {SMALLEST_VOCABULARY}, got {bins} and "
            f"{text_vocab_size}"
        )
    columns = columns_of((row for split, row in split_rows(path, seed=seed) if split == "train"), bins=bins)
    names = [column.name for column in columns if isinstance(column, TextColumn)]
    texts = _texts(path, seed, names) if names else iter(())
    codec = make_codec(columns, texts, text_vocab_size=text_vocab_size)
    content = content_fingerprint(path, TABLE_SUFFIXES)
    inputs = {"content": content, "seed": seed, "bins": bins, "text_vocab_size": text_vocab_size}
    return TableSource(path, seed, codec, codec.tokenizer, codec.modalities(), codec.schema(), inputs)


def _texts(path: str, seed: int, names: list[str]) -> Iterator[str]:
    for split, row in split_rows(path, seed=seed):
        if split == "train":
            cells: list[Cell] = [row.cells.get(name) for name in names]
            yield from (str(cell) for cell in cells if cell is not None)
