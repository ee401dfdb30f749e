"""Images cut into square patches, and the order in which a sequence has them."""

from __future__ import annotations

from math import gcd, isqrt

import numpy as np

from kalmagrove.data.images.choices import Scan
from kalmagrove.errors import UsageError

MOST_PATCHES = 4096
LARGEST_PATCH = 32


def patch_places(rows: int, columns: int, scan: Scan) -> np.ndarray:
    """Row and column of every patch in the order of the sequence, (patches, 2).

    In z-order (Morton, 1966) each aligned run of 4, 16, 64 ... patches is a square of the image wherever that many rows
    and columns are whole; in raster order rows follow one another.
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    places = np.stack((row, column), axis=1)
    return places if scan == "raster" else places[np.argsort(_interleaved(row, column), kind="stable")]


def _interleaved(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The bits of both numbers in turns, the column's first."""
    code = np.zeros_like(row)
    for bit in range(int(max(row.max(), column.max())).bit_length()):
        code |= (column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1
    return code


def to_patches(images: np.ndarray, places: np.ndarray, patch_size: int) -> np.ndarray:
    """The pixels of each patch, row by row, (..., patches, patch_size^2 x channels).

    Args:
        images: (..., height, width, channels), with sides that the patch size divides.
        places: Of :func:`patch_places`.
        patch_size: Pixels of a side.
    """
    *leading, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(*leading, rows, patch_size, columns, patch_size, channels).swapaxes(-4, -3)
    return grid[..., places[:, 0], places[:, 1], :, :, :].reshape(*leading, len(places), -1)


def from_patches(patches: np.ndarray, places: np.ndarray, patch_size: int, channels: int) -> np.ndarray:
    """The images of :func:`to_patches`, (..., height, width, channels)."""
    rows, columns = (int(side) + 1 for side in places.max(axis=0))
    leading = patches.shape[:-2]
    grid = np.zeros((*leading, rows, columns, patch_size, patch_size, channels), dtype=patches.dtype)
    shaped = patches.reshape(*leading, len(places), patch_size, patch_size, channels)
    grid[..., places[:, 0], places[:, 1], :, :, :] = shaped
    return grid.swapaxes(-4, -3).reshape(*leading, rows * patch_size, columns * patch_size, channels)


def choose_patch_size(height: int, width: int, patch_size: int | None) -> int:
    """A patch size that divides both sides of an image: the one asked for, or about the root of the shorter side.

    Raises:
        UsageError: It does not divide them, is too large, or makes too many patches.
    """
    common = gcd(height, width)
    sizes = [size for size in range(1, min(common, LARGEST_PATCH) + 1) if common % size == 0]
    fitting = [size for size in sizes if height * width // size**2 <= MOST_PATCHES]
    if patch_size is None and fitting:
        root = isqrt(min(height, width))
        return max((size for size in fitting if size <= root), default=fitting[0])
    if patch_size in fitting:
        return patch_size
    if not fitting:
        raise UsageError(
            f"images of {height} x {width} pixels cannot be cut into at most {MOST_PATCHES} square patches of at most "
            f"{LARGEST_PATCH} pixels a side; have them resized by data.image_size"
        )
    raise UsageError(
        f"data.patch_size {patch_size} does not fit images of {height} x {width} pixels; sizes that do: "
        f"{', '.join(map(str, fitting))}, or have the images resized by data.image_size"
    )
