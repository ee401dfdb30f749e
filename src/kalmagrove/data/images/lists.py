"""Pictures that the lines of a JSONL name, with labels and captions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kalmagrove.data.compressed import is_unicode, json_lines
from kalmagrove.data.images.pictures import Picture
from kalmagrove.data.images.reading import FILE_LEVELS, read_image
from kalmagrove.errors import KalmaGroveError

LONGEST_LINE = 1 << 20


def listed_pictures(path: Path) -> Iterator[Picture]:
    """The pictures of a JSONL: ``image``, a path below its folder, and perhaps ``label`` and ``caption``.

    Raises:
        KalmaGroveError: A line is no such object, or its image lies elsewhere; the line is named.
    """
    for number, row in json_lines(path, longest=LONGEST_LINE):
        yield _picture(row, path, f"line {number} of {path}")


def _picture(row: Any, path: Path, where: str) -> Picture:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise KalmaGroveError(f'{where} is no JSON object with a string "image"; mend or remove that line')
    file = path_below(path.parent, row["image"], where)
    label, caption = _label(row.get("label"), where), row.get("caption")
    if caption is not None and (not isinstance(caption, str) or not caption or not is_unicode(caption)):
        raise KalmaGroveError(f"the caption in {where} is no text; mend it or leave it out")
    return Picture(row["image"], partial(read_image, file), label, caption, FILE_LEVELS)


def path_below(folder: Path, name: str, where: str) -> Path:
    """The file that a line names.

    Raises:
        KalmaGroveError: It does not lie below the folder.
    """
    path = folder / name
    try:
        is_inside = not Path(name).is_absolute() and path.resolve().is_relative_to(folder.resolve())
    # A NUL byte, a circle of links, or half a surrogate pair.
    except (ValueError, OSError, RuntimeError):
        is_inside = False
    if not is_inside:
        raise KalmaGroveError(f"the image {name!r} in {where} is no path below {folder}; keep images below that folder")
    return path


def _label(value: Any, where: str) -> str | None:
    if value is None or (isinstance(value, str) and value and is_unicode(value)):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise KalmaGroveError(
        f"the label {value!r} in {where} is neither a name nor a whole number; mend it or leave it out"
    )
