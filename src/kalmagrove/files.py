"""Write files and folders so that a crash leaves either the old content or the new, never a part of it."""

import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kalmagrove.errors import KalmaGroveError, UsageError


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one step.

    The text goes to a hidden sibling first, which reaches the disk before it takes the file's name.

    Args:
        path: The file to create or replace; its folder must exist.
        text: The new content, written as UTF-8 with its line ends unchanged.

    Raises:
        OSError: The text could not be written; the old content, if any, is still there.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden sibling to write to, which takes the file's name when the context ends without an error, and else goes.

    Args:
        path: The file to create or replace; its folder must exist.

    Raises:
        OSError: The content did not reach the disk; the old content, if any, is still there.
    """
    remove_abandoned(path)
    temporary = temporary_name(path)
    try:
        yield temporary
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


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """What a file of one JSON object holds.

    Args:
        path: The file.
        remedy: What to do when the file is damaged, for the error's text.

    Raises:
        KalmaGroveError: It holds something else, or no text.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise KalmaGroveError(f"{path} is damaged; {remedy}") from error
    if not isinstance(found, dict):
        raise KalmaGroveError(f"{path} is damaged; {remedy}")
    return found


def finite_or_null(value: Any) -> Any:
    """Return a copy of a JSON value in which NaN and the infinities, which JSON lacks, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def replace_folder(prepared: Path, path: Path) -> None:
    """Give a prepared folder its name once all of it is on the disk; what has the name goes after that.

    A crash leaves the old folder, the new one, or for a moment none of that name, but never a part.

    Args:
        prepared: A folder beside ``path``.
        path: The name; a folder, a file or nothing may have it.

    Raises:
        OSError: The folder could not be renamed or did not reach the disk.
    """
    fsync_tree(prepared)
    replaced = path.with_name(f"{temporary_name(path).name}-replaced")
    remove(replaced)
    rename_over(prepared, path, aside=replaced)
    fsync_folder(path.parent)
    remove(replaced)


def rename_over(prepared: Path, path: Path, *, aside: Path) -> None:
    """Give a prepared folder its name; a folder cannot be renamed over a full one, so what has the name goes aside.

    Args:
        prepared: The folder.
        path: The name; a folder, a file or nothing may have it.
        aside: Where that goes; nothing may be there.

    Raises:
        OSError: The folder could not be renamed; what had the name has it again.
    """
    is_taken = os.path.lexists(path)
    if is_taken:
        os.rename(path, aside)
    try:
        os.rename(prepared, path)
    except BaseException:
        if is_taken:
            os.rename(aside, path)
        raise


@contextmanager
def whole_folder(path: Path, *, unless: str | None = None) -> Iterator[Path]:
    """An empty temporary folder to fill, which takes its name when the context ends without an error, and else goes.

    Args:
        path: The name; a folder, a file or nothing may have it. Folders around it are made where they are missing.
        unless: A file. A folder that has it when the context ends was made by another process meanwhile, which may be
            using it, and is kept; any other that is not empty is an error. None replaces whatever has the name.

    Raises:
        OSError: The folder could not be made or renamed, or did not reach the disk.
    """
    remove_abandoned(path)
    temporary = temporary_name(path)
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if unless is None:
            replace_folder(temporary, path)
        else:
            _take_free_name(temporary, path, unless)
    finally:
        remove(temporary)


def _take_free_name(temporary: Path, path: Path, unless: str) -> None:
    fsync_tree(temporary)
    try:
        # Unlike POSIX, Windows does not rename over an empty folder.
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        os.rename(temporary, path)
    except OSError:
        if not (path / unless).exists():
            raise
    fsync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder as far as the system lets it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def temporary_name(path: Path) -> Path:
    """Return the hidden sibling, private to this process, under which a path's new content is prepared."""
    return path.with_name(f".{path.name}.tmp-{_machine()}-{os.getpid()}")


def remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that are gone left under a path's temporary names."""
    if os.name == "nt":
        # There is no harmless signal to ask with.
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-{_machine()}-*"):
        number = re.fullmatch(r"(\d+)(-replaced)?", left.name.rpartition(f".tmp-{_machine()}-")[2])
        if number is not None and not _is_running(int(number[1])):
            remove(left)


def _machine() -> str:
    """Tells machines that share a disk apart, without giving their names."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        # It belongs to somebody else.
        return True
    return True


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_tree(folder: Path) -> None:
    """Wait until a folder, all below it and their content are on the disk.

    Raises:
        OSError: The disk did not take them.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            fsync_file(path)
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(folder)


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


def require_free_folder(folder: Path) -> None:
    """That nothing would be overwritten.

    Raises:
        UsageError: The folder is not empty, or a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty; choose another folder")
