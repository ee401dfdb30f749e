"""Images brought to one size."""

from __future__ import annotations

import re

import numpy as np

from kalmagrove.data.images.reading import MOST_PIXELS, require_pillow
from kalmagrove.errors import UsageError


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of a size such as 32 or 32x48.

    Raises:
        UsageError: It is no size, or too large.
    """
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match is not None else (0, 0)
    if not 0 < height * width <= MOST_PIXELS:
        raise UsageError(f"data.image_size must be like 32, or like 32x48 for height and width in pixels; got {text!r}")
    return height, width


def fit_to(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image of at least a size, scaled to cover it and cut to it in the middle; (height, width, channels), uint8.

    One that has the size already is left as it is; others are resampled by Lanczos' filter, within their own levels.
    """
    own_height, own_width, channels = pixels.shape
    if (own_height, own_width) == (height, width):
        return pixels
    require_pillow("to resize images")
    from PIL import Image

    # What the new image shows of the old one, in its pixels.
    scale = min(own_height / height, own_width / width)
    left, top = (own_width - width * scale) / 2, (own_height - height * scale) / 2
    box = (left, top, min(own_width, left + width * scale), min(own_height, top + height * scale))
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    # The filter swings beyond the levels at an edge.
    return np.asarray(resized).reshape(height, width, channels).clip(pixels.min(), pixels.max())
