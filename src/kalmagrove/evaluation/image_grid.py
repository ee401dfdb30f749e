"""Images side by side in one PNG."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np

from kalmagrove.data.images.reading import require_pillow
from kalmagrove.files import whole_file

GAP = 1
"""Pixels between images, before they are enlarged."""
SMALLEST_SIDE = 64
"""Smaller images are enlarged to about so many pixels, that a person may see them."""


def image_grid(images: np.ndarray, columns: int, levels: int) -> np.ndarray:
    """Images in rows, (height, width, channels), uint8, on white.

    Args:
        images: (images, height, width, channels), levels from 0 to ``levels - 1``.
        columns: Images in a row.
        levels: Of a pixel; the largest becomes white.
    """
    count, height, width, channels = images.shape
    rows = ceil(count / columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, dtype=np.uint8)
    for place, image in enumerate(images):
        row, column = place // columns * (height + GAP), place % columns * (width + GAP)
        grid[row : row + height, column : column + width] = np.rint(image * (255 / (levels - 1)))
    scale = ceil(SMALLEST_SIDE / max(height, width))
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def write_png(pixels: np.ndarray, path: Path) -> None:
    """Writes pixels (height, width, 1 or 3), uint8, as a PNG.

    Raises:
        KalmaGroveError: Pillow is not installed.
        OSError: The file could not be written.
    """
    require_pillow(f"to write {path}")
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
