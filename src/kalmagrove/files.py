"""Write small files so that a crash leaves either the old content or the new, never a part of it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one step.

    The text goes to a hidden sibling first, which reaches the disk before it takes the file's name.

    Args:
        path: The file to create or replace; its folder must exist.
        text: The new content, written as UTF-8 with its line ends unchanged.

    Raises:
        OSError: The text could not be written; the old content, if any, is still there.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace a file with an indented, standard JSON document in one step.

    Args:
        path: The file to create or replace; its folder must exist.
        value: Anything JSON can hold; floats that are not finite are written as null.

    Raises:
        OSError: The document could not be written; the old content, if any, is still there.
    """
    write_text_atomic(path, json.dumps(finite_or_null(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite_or_null(value: Any) -> Any:
    """Return a copy of a JSON value in which NaN and the infinities, which JSON lacks, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def temporary_name(path: Path) -> Path:
    """Return the hidden sibling, private to this process, under which a path's new content is prepared."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def fsync_file(path: Path) -> None:
    """Wait until a file's content is on the disk.

    Raises:
        OSError: The disk did not take it.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk; does nothing on Windows, where folders cannot be opened.

    Raises:
        OSError: The disk did not take them.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
