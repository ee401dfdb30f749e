"""Mixed lines as parts of a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmagrove.data.examples import Example, Part
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.parts import FEATURE, image_part
from kalmagrove.data.images.reading import read_image
from kalmagrove.data.mixed.reading import MixedRow, Piece
from kalmagrove.data.tables.cells import cell_text
from kalmagrove.data.tables.codec import TableCodec, open_codec
from kalmagrove.errors import KalmaGroveError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODALITY, SCHEMA_VERSION = "mixed", 1


@dataclass(frozen=True, eq=False)
class MixedCodec:
    """How texts, images and rows become parts.

    Attributes:
        tokenizer: Has the tokens of all.
        table: Of rows; None where there are none.
        form: Of images; None where there are none.
    """

    tokenizer: Tokenizer
    table: TableCodec | None
    form: ImageFormat | None

    def modalities(self) -> dict[str, dict[str, Any]]:
        """The options of the modalities that a model of these lines has."""
        images = {} if self.form is None else {FEATURE: self.form.patch_options()}
        return {**({} if self.table is None else self.table.modalities()), **images}

    def schema(self) -> dict[str, Any]:
        """As JSON, for :func:`open_mixed`."""
        return {
            "modality": MODALITY,
            "version": SCHEMA_VERSION,
            "table": None if self.table is None else self.table.schema(),
            "image": None if self.form is None else self.form.to_dict(),
        }

    def text_part(self, text: str) -> Part:
        """A text; what looks like a special token in it is text like any other."""
        tokens = np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        return Part(tokens, np.ones(len(tokens)))

    def parts(self, row: MixedRow, pieces: Sequence[Piece]) -> tuple[Part, ...]:
        """Some of a line's pieces in their order.

        Raises:
            KalmaGroveError: An image or a row does not go with those that the model knows.
        """
        return tuple(
            part if piece.is_learnt else replace(part, weights=np.zeros(len(part.tokens)))
            for piece in pieces
            for part in self._parts_of(piece, row.place)
        )

    def _parts_of(self, piece: Piece, place: str) -> list[Part]:
        if piece.image is not None:
            if self.form is None:
                raise KalmaGroveError(f"{place} has an image, and the model was trained without any")
            pixels = self.form.prepared(read_image(piece.image), f"the image {piece.image.name} of {place}")
            return [image_part(self.form, pixels)]
        if piece.row is not None:
            if self.table is None:
                raise KalmaGroveError(f"{place} has a row of a table, and the model was trained without any")
            columns = self.table.columns
            # That a value is missing says something only where a training row missed it.
            given = {n: v for n, v in self.table.read(piece.row).items() if v is not None or columns[n].has_missing}
            return [self.table.part(column, value) for column, value in sorted(given.items())]
        return [self.text_part(piece.text)]

    def example(self, row: MixedRow) -> Example:
        """A line to learn from; its bytes and values are those of what is to be predicted."""
        learnt = [piece for piece in row.pieces if piece.is_learnt]
        counts = [self._size(piece) for piece in learnt]
        parts = self.parts(row, row.pieces)
        return Example(parts, values=sum(values for values, _ in counts), size=sum(size for _, size in counts))

    def _size(self, piece: Piece) -> tuple[int, int]:
        """Values and bytes: words of a text, cells of a row, pixels and channels of an image."""
        if piece.image is not None and self.form is not None:
            return self.form.dimensions, self.form.dimensions
        if piece.row is not None:
            texts = [cell_text(cell) for cell in piece.row.cells.values()]
            return len(texts), sum(len(text.encode()) + 1 for text in texts)
        return len(piece.text.split()), len(piece.text.encode())


def open_mixed(schema: Mapping[str, Any], tokenizer: Tokenizer) -> MixedCodec:
    """The codec of a model.

    Args:
        schema: As `MixedCodec.schema` gave it.
        tokenizer: The model's.

    Raises:
        KalmaGroveError: They are damaged, or do not belong together.
    """
    if schema.get("modality") != MODALITY or schema.get("version") != SCHEMA_VERSION:
        raise KalmaGroveError("the schema is not one of texts with images and rows; train the model again")
    table, image = schema.get("table"), schema.get("image")
    tokenizer.encode_special_tokens = True
    return MixedCodec(
        tokenizer,
        None if table is None else open_codec(table, tokenizer),
        None if image is None else ImageFormat.from_dict(image),
    )
