"""Lines of a JSONL that mix text, images and rows of tables.

A line is an object with ``parts``, a list whose items are ``{"text": ...}``, ``{"image": PATH}`` or ``{"row": {...}}``,
each perhaps with ``"learn": true``; or ``{"text": "... <image> ...", "images": [PATH, ...]}``. Where parts of a line
say ``learn``, the others are only read; where none does, all are learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from kalmagrove.data.compressed import is_unicode, json_lines
from kalmagrove.data.example_splits import split_examples
from kalmagrove.data.images.lists import path_below
from kalmagrove.data.splits import by_split
from kalmagrove.data.tables.cells import Row
from kalmagrove.data.tables.reading import json_row
from kalmagrove.errors import KalmaGroveError

IMAGE_MARK = "<image>"
"""In a text: the place of the next of its images."""


@dataclass(frozen=True)
class Piece:
    """A part of a line.

    Attributes:
        kind: What it is.
        text: Of a text.
        image: Of an image, its file.
        image_name: Of an image, the name that the line has for it.
        row: Of a row of a table.
        is_learnt: Whether it is to be predicted.
    """

    kind: Literal["text", "image", "row"]
    text: str = ""
    image: Path | None = None
    image_name: str = ""
    row: Row | None = None
    is_learnt: bool = True


@dataclass(frozen=True)
class MixedRow:
    """One line.

    Attributes:
        place: Where it stands, for an error's text.
        pieces: In their order; at least one.
    """

    place: str
    pieces: tuple[Piece, ...]

    def content(self) -> str:
        """The same text for equal lines, and for all lines about the same images: what divides them into splits."""
        images = [piece.image_name for piece in self.pieces if piece.image is not None]
        return json.dumps(
            images or [[piece.kind, piece.text, piece.row and piece.row.content()] for piece in self.pieces]
        )


def split_mixed(source: str, *, seed: int) -> Iterator[tuple[str, MixedRow]]:
    """Stream the lines of a source with the split that each belongs to, always in the same order.

    Args:
        source: A .jsonl file, or a folder of which train.jsonl, valid.jsonl and test.jsonl are read, or several
            of each as in train-0.jsonl; a split that is missing there is taken out of train.
        seed: Divides the lines where they have no splits.

    Raises:
        KalmaGroveError: There is no such file, or a line cannot be used; it is named.
    """
    rows = {split: chain.from_iterable(map(iter_mixed, files)) for split, files in _files(source).items()}
    return split_examples(source, rows, seed=seed)


def _files(source: str) -> dict[str | None, list[Path]]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        return {None: [path]}
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    found = by_split((file.name, file) for file in files)
    if "train" not in found:
        raise KalmaGroveError(f"{source} is no .jsonl file, and no folder with a train.jsonl; give one of these")
    return dict(found.items())


def iter_mixed(path: Path) -> Iterator[MixedRow]:
    """Stream the lines of one file.

    Raises:
        KalmaGroveError: It is no text, or a line cannot be used; it is named.
    """
    for number, value in json_lines(path):
        yield _read(value, path, number)


def _read(value: Any, path: Path, number: int) -> MixedRow:
    place = f"line {number} of {path}"
    if not isinstance(value, dict) or ("parts" in value) == ("text" in value):
        raise KalmaGroveError(f'{place} is no JSON object with either "parts" or "text"; mend or remove that line')
    parts = value["parts"] if "parts" in value else _parts_of_text(value, place)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise KalmaGroveError(f'"parts" of {place} is no list of objects; write [{{"text": ...}}, {{"image": ...}}]')
    some_are_marked = any("learn" in part for part in parts)
    pieces = tuple(_piece(part, path, number, place, usual=not some_are_marked) for part in parts)
    return MixedRow(place, pieces)


def _parts_of_text(value: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The parts of the short form."""
    images = value.get("images", [])
    if not isinstance(value["text"], str) or not isinstance(images, list):
        raise KalmaGroveError(f'{place}: "text" must be text and "images" a list of paths')
    texts = value["text"].split(IMAGE_MARK)
    if len(texts) != len(images) + 1:
        raise KalmaGroveError(f"{place} has {len(texts) - 1} times {IMAGE_MARK} and {len(images)} images; mend it")
    parts: list[dict[str, Any]] = []
    for place_of_text, text in enumerate(texts):
        parts += [{"text": text}] if text else []
        parts += [{"image": images[place_of_text]}] if place_of_text < len(images) else []
    return parts


def _piece(part: dict[str, Any], path: Path, number: int, place: str, *, usual: bool) -> Piece:
    kinds = [kind for kind in ("text", "image", "row") if kind in part]
    is_learnt = part.get("learn", usual)
    if len(kinds) != 1 or set(part) - {*kinds, "learn"} or not isinstance(is_learnt, bool):
        raise KalmaGroveError(
            f'a part of {place} must have one of "text", "image" and "row", and perhaps "learn": true or false'
        )
    value = part[kinds[0]]
    if kinds == ["row"]:
        if not isinstance(value, dict) or not value:
            raise KalmaGroveError(f'"row" of {place} is no object with cells; write {{"name": value, ...}}')
        return Piece("row", row=json_row(value, path, number), is_learnt=is_learnt)
    if not isinstance(value, str) or not value or not is_unicode(value):
        raise KalmaGroveError(f'"{kinds[0]}" of {place} is no text; mend or remove that part')
    if kinds == ["image"]:
        return Piece("image", image=path_below(path.parent, value, place), image_name=value, is_learnt=is_learnt)
    return Piece("text", text=value, is_learnt=is_learnt)
