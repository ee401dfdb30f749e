"""Pictures of an .npz, one after the other: the array is never in memory as a whole."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from kalmagrove.data.images.pictures import Picture
from kalmagrove.data.images.reading import MOST_PIXELS
from kalmagrove.errors import KalmaGroveError, first_line

MOST_LEVELS = 256
_LONGEST_LABEL_BYTES = 4096


def array_pictures(path: Path) -> Iterator[Picture]:
    """The pictures of ``images`` (n, height, width) or (n, height, width, 1 or 3), with ``labels`` (n,) if there are.

    Pixels are whole numbers from 0 to 255, labels whole numbers or text.

    Raises:
        KalmaGroveError: The file is damaged or its arrays are not like that.
    """
    with _open(path) as archive:
        names = set(archive.namelist())
        if "images.npy" not in names:
            raise KalmaGroveError(f"{path} holds no array named images; save one with numpy.savez(path, images=...)")
        with archive.open("images.npy") as file:
            shape, kind = _header(file, f"images of {path}")
            if len(shape) == 3:
                shape = (*shape, 1)
            if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1 or prod(shape[1:3]) > MOST_PIXELS:
                raise KalmaGroveError(
                    f"images of {path} have the shape {shape}; it must be (images, height, width[, 1 or 3 channels]), "
                    f"with at most {MOST_PIXELS / 1e6:.0f} million pixels an image"
                )
            if kind.kind not in "buif":
                raise KalmaGroveError(f"images of {path} are {kind}; they must be whole numbers from 0 to 255")
            labels = _labels(archive, path, shape[0]) if "labels.npy" in names else [None] * shape[0]
            for index, label in enumerate(labels):
                content = _exactly(file, kind.itemsize * prod(shape[1:]), path)
                values = np.frombuffer(content, kind).reshape(shape[1:])
                name = f"{path.name}[{index}]"
                yield Picture(name, partial(_as_pixels, values, f"image {index} of {path}"), label)
            _check_end(file, path)


@contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except KalmaGroveError:
        raise
    # RuntimeError is a password, NotImplementedError a packing that the library does not have.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError, MemoryError) as error:
        reason = first_line(error)
        raise KalmaGroveError(f"{path} is no sound .npz ({reason}); make or download it again") from error


def _header(file: IO[bytes], what: str) -> tuple[tuple[int, ...], np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise KalmaGroveError(f"{what} have the array format {version}; save them with a usual type")
    shape, is_fortran, kind = read[version](file)
    if is_fortran and len(shape) > 1:
        raise KalmaGroveError(f"{what} are in Fortran order; save numpy.ascontiguousarray of them")
    if kind.hasobject or kind.subdtype is not None or kind.names is not None:
        raise KalmaGroveError(f"{what} are Python objects or records; save plain numbers")
    return shape, kind


def _labels(archive: zipfile.ZipFile, path: Path, count: int) -> list[str | None]:
    with archive.open("labels.npy") as file:
        shape, kind = _header(file, f"labels of {path}")
        if shape != (count,):
            raise KalmaGroveError(f"labels of {path} have the shape {shape}, for {count} images; give one for each")
        if kind.kind not in "buiU" or kind.itemsize > _LONGEST_LABEL_BYTES:
            raise KalmaGroveError(f"labels of {path} are {kind}; they must be whole numbers or short names")
        labels: list[str | None] = []
        for _ in range(count):
            value = np.frombuffer(_exactly(file, kind.itemsize, path), kind)[0]
            labels.append(str(value if kind.kind == "U" else int(value)))
    if "" in labels:
        raise KalmaGroveError(f"label {labels.index('')} of {path} is empty; give every image a class, or none")
    return labels


def _exactly(file: IO[bytes], count: int, path: Path) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise KalmaGroveError(f"{path} is cut short; make or download it again")
    return content


def _check_end(file: IO[bytes], path: Path) -> None:
    """The library looks at the sum over an array when its end is read."""
    if file.read(1):
        raise KalmaGroveError(f"{path} holds more than its header says; make or download it again")


def _as_pixels(values: np.ndarray, where: str) -> np.ndarray:
    whole = values.astype(np.uint8) if _are_levels(values) else None
    if whole is None or not np.array_equal(whole, values):
        raise KalmaGroveError(f"{where} has values that are no whole numbers from 0 to {MOST_LEVELS - 1}; scale it")
    return whole


def _are_levels(values: np.ndarray) -> bool:
    """Not a number compares as false."""
    return bool(values.min() >= 0) and bool(values.max() < MOST_LEVELS)
