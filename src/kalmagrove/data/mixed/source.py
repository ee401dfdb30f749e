"""Mixed lines as a source of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kalmagrove.data.examples import Example, ExampleSource
from kalmagrove.data.images.choices import Scan
from kalmagrove.data.images.fitting import parse_size
from kalmagrove.data.images.patches import choose_patch_size
from kalmagrove.data.images.pictures import Picture, Pictures
from kalmagrove.data.images.reading import FILE_LEVELS, read_image
from kalmagrove.data.images.source import image_format
from kalmagrove.data.images.survey import survey_pictures
from kalmagrove.data.mixed.codec import MODALITY, MixedCodec
from kalmagrove.data.mixed.reading import MixedRow, split_mixed
from kalmagrove.data.sources import content_fingerprint
from kalmagrove.data.splits import SPLITS
from kalmagrove.data.tables.cells import Row
from kalmagrove.data.tables.codec import make_codec
from kalmagrove.data.tables.column_kinds import columns_of
from kalmagrove.data.tables.columns import TextColumn

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class MixedSource:
    """Texts with images and rows: an `ExampleSource`."""

    source: str
    seed: int
    codec: MixedCodec
    tokenizer: Tokenizer
    modalities: dict[str, dict[str, Any]]
    schema: dict[str, Any]
    inputs: dict[str, Any]
    modality: str = MODALITY
    shuffles: bool = False
    predicts_end: bool = True

    def examples(self, split: str) -> Iterator[Example]:
        """The lines of a split.

        Raises:
            KalmaGroveError: An image cannot be read, or a cell.
        """
        return (self.codec.example(row) for own, row in split_mixed(self.source, seed=self.seed) if own == split)


def mixed_source(
    path: str,
    *,
    seed: int,
    vocab_size: int = 1024,
    bins: int = 64,
    patch_size: int | None = None,
    scan: Scan = "z-order",
    image_size: str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> ExampleSource:
    """The lines of a JSONL, ready to be packed.

    Args:
        path: See `split_mixed`.
        seed: Divides the lines where they have no splits.
        vocab_size: Of the byte-level BPE that is trained on the texts of the training lines.
        bins: As for `table_source`.
        patch_size: As for `image_source`.
        scan: As for `image_source`.
        image_size: As for `image_source`.
        progress: As for `image_source`.

    Raises:
        KalmaGroveError: A line, an image or a row cannot be used; it is named.
        UsageError: An option is out of its range.
    """
    rows = partial(split_mixed, path, seed=seed)
    # All of the lines, what is learnt included; the images' pixels come below.
    content = [content_fingerprint(path, (".jsonl",))]
    columns = columns_of(_table_rows(rows(), "train"), bins=bins)
    text_columns = [column.name for column in columns if isinstance(column, TextColumn)]
    # Without rows it is the tokeniser alone that is made here.
    made = make_codec(columns, _texts(rows(), text_columns), text_vocab_size=vocab_size)
    table, form = made if columns else None, None
    if any(piece.image is not None for _, row in rows() for piece in row.pieces):
        size = None if image_size is None else parse_size(image_size)
        found: dict[str, Pictures] = {split: partial(_pictures, path, seed, split) for split in SPLITS}
        survey = survey_pictures(found, source=path, size=size, seed=seed, progress=progress)
        content.append(survey.content)
        patch_size = choose_patch_size(survey.height, survey.width, patch_size)
        looks = {"patch_size": patch_size, "scan": scan, "is_fitted": size is not None, "predicts_pixels": True}
        form = image_format(survey, made.tokenizer, looks, has_captions=False)
    codec = MixedCodec(made.tokenizer, table, form)
    options = {"vocab_size": vocab_size, "bins": bins, "patch_size": patch_size, "scan": scan, "image_size": image_size}
    inputs = {"content": content, "seed": seed, **options}
    return MixedSource(path, seed, codec, codec.tokenizer, codec.modalities(), codec.schema(), inputs)


def _table_rows(rows: Iterator[tuple[str, MixedRow]], split: str) -> Iterator[Row]:
    for own, row in rows:
        if own == split:
            yield from (piece.row for piece in row.pieces if piece.row is not None)


def _texts(rows: Iterator[tuple[str, MixedRow]], columns: list[str]) -> Iterator[str]:
    for split, row in rows:
        for piece in row.pieces if split == "train" else ():
            if piece.text:
                yield piece.text
            if piece.row is not None:
                cells = [piece.row.cells.get(name) for name in columns]
                yield from (str(cell) for cell in cells if cell is not None)


def _pictures(path: str, seed: int, split: str) -> Iterator[Picture]:
    for own, row in split_mixed(path, seed=seed):
        for piece in row.pieces if own == split else ():
            if piece.image is not None:
                name = f"{piece.image.name} of {row.place}"
                yield Picture(name, partial(read_image, piece.image), levels=FILE_LEVELS)
