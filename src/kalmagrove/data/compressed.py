"""Files that may be compressed: their lines, the JSON values of their lines, and the tables of Parquet."""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from kalmagrove.errors import KalmaGroveError

COMPRESSION_SUFFIXES = (".xz", ".gz", ".zst")
UNSOUND: Any = object()
"""The value of a line that is no sound JSON."""
_CHUNK_BYTES = 1 << 20
# A chunk of a zstd file is unpacked in one piece, which may be hundreds of times larger.
_ZSTD_CHUNK_BYTES = 1 << 15


def json_lines(path: Path, *, longest: int | None = None) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not blank; `UNSOUND` where it is no sound JSON.

    Args:
        path: Of the file.
        longest: Characters that a line may have.

    Raises:
        KalmaGroveError: The file is damaged or is not text in UTF-8, or a line is longer.
    """
    for number, line in enumerate(iter_lines(path, longest), start=1):
        if longest is not None and len(line) > longest:
            raise KalmaGroveError(f"line {number} of {path} is longer than {longest:,} characters")
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = UNSOUND
        yield number, value


@contextmanager
def open_parquet(path: Path) -> Iterator[tuple[Any, Any]]:
    """A Parquet file, and pyarrow, in whose terms its columns are.

    Raises:
        KalmaGroveError: pyarrow is not installed, or the file is not sound, whenever that is noticed.
    """
    pyarrow = import_data_extra("pyarrow", f"to read {path}")
    parquet = importlib.import_module("pyarrow.parquet")
    with _open_seekable(path) as file:
        try:
            yield parquet.ParquetFile(file), pyarrow
        except KalmaGroveError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise KalmaGroveError(f"{path} is not a sound parquet file; make or download it again") from error


@contextmanager
def _open_seekable(path: Path) -> Iterator[IO[bytes]]:
    """A parquet file is read from its end, so a compressed one is unpacked to the disk first."""
    if path.suffix.lower() not in COMPRESSION_SUFFIXES:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        for chunk in _chunks(path):
            unpacked.write(chunk)
        unpacked.seek(0)
        yield unpacked


def iter_lines(path: Path, longest: int | None) -> Iterator[str]:
    """Lines of a file, perhaps compressed, with their ends; one of more than ``longest`` characters comes in pieces.

    Raises:
        KalmaGroveError: The file is damaged or is not text in UTF-8.
    """
    rest = ""
    for text in _decoded(path):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line + "\n"
        if longest is not None and len(rest) > longest:
            yield rest
            rest = ""
    if rest:
        yield rest


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for chunk in _chunks(path):
            if b"\0" in chunk:
                raise KalmaGroveError(f"{path} is not text: it holds NUL bytes; give a UTF-8 text file")
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise KalmaGroveError(f"{path} is not text in UTF-8; convert it to UTF-8 or leave it out") from error


def _chunks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file, a part at a time."""
    suffix = path.suffix.lower()
    damage: tuple[type[Exception], ...] = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)
    try:
        if suffix == ".zst":
            zstandard = import_data_extra("zstandard", f"to read {path}")
            damage += (zstandard.ZstdError,)
            yield from _zstd_chunks(path, zstandard)
        else:
            with _open_binary(path, suffix) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
    except damage as error:
        raise KalmaGroveError(
            f"{path} is damaged or cut short and cannot be unpacked; make or download it again"
        ) from error
    except OSError as error:
        raise KalmaGroveError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_binary(path: Path, suffix: str) -> BinaryIO | gzip.GzipFile | lzma.LZMAFile:
    if suffix == ".xz":
        return lzma.open(path)
    return gzip.open(path) if suffix == ".gz" else path.open("rb")


def _zstd_chunks(path: Path, zstandard: Any) -> Iterator[bytes]:
    """Unlike the library's own reader, this one notices a file that ends inside a frame."""
    frame: Any = None
    with path.open("rb") as file:
        while packed := file.read(_ZSTD_CHUNK_BYTES):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError(path)


def import_data_extra(module: str, purpose: str) -> Any:
    """A module of the extra ``data``.

    Args:
        module: Its name.
        purpose: The beginning of the error's text, such as "to read FILE".

    Raises:
        KalmaGroveError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise KalmaGroveError(f"{purpose}, install {module} with: pip install 'kalmagrove[data]'") from error


def is_unicode(text: str) -> bool:
    """Whether a text holds whole characters alone, and no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
