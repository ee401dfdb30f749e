"""One PNG or JPEG file as an array of pixels, or an error that names the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kalmagrove.errors import KalmaGroveError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
OTHER_SUFFIXES = (".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm", ".pgm", ".ico", ".jxl")
"""Images too, which are refused by name in the place of being passed over."""
FORMATS = ("PNG", "JPEG")
MOST_PIXELS = 1 << 26
FILE_LEVELS = 256
"""Values of a pixel of such a file."""

_GREY_MODES = ("1", "L", "LA")
_MODES = (*_GREY_MODES, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH_AT = 24
_REMEDY = "make or download it again, or leave it out"


def read_image(path: Path) -> np.ndarray:
    """The pixels of a file, (height, width, 1 or 3), uint8.

    What is not grey or RGB is converted: black and white to grey; a palette and CMYK to RGB, without a colour profile;
    what is transparent is laid on white. A photograph is turned as its EXIF data says.

    Raises:
        KalmaGroveError: It is missing, damaged, animated or too large, has 16 bits a channel, or is neither PNG nor
            JPEG.
    """
    require_pillow(f"to read {path}")
    from PIL import Image

    if not path.is_file():
        raise KalmaGroveError(f"there is no image file {path}; mend its path or leave it out")
    try:
        _check_depth(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _check(image, path)
                # Otherwise the end of a PNG, and what tells whether it is damaged, are not looked at.
                image.verify()
            with Image.open(path, formats=FORMATS) as image:
                return _pixels(image)
    except KalmaGroveError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise KalmaGroveError(_too_large(path)) from None
    # What is wrong with a file reaches the library's own code, which has no common error for it.
    except Exception as error:
        reason = first_line(error)
        raise KalmaGroveError(f"{path} is no sound PNG or JPEG image ({reason}); {_REMEDY}") from error


def require_pillow(purpose: str) -> None:
    """That Pillow is installed.

    Raises:
        KalmaGroveError: It is not; the text says how to install it.
    """
    try:
        import PIL  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise KalmaGroveError(f"{purpose}, install Pillow with: pip install 'kalmagrove[vision]'") from error


def _check_depth(path: Path) -> None:
    """The library would cut 16 bits of a colour PNG down to 8 without a word."""
    with path.open("rb") as file:
        head = file.read(_PNG_DEPTH_AT + 1)
    if head.startswith(_PNG_SIGNATURE) and head[_PNG_DEPTH_AT:] == b"\x10":
        raise KalmaGroveError(f"{path} has 16 bits a channel; convert it to 8 bits")


def _check(image: Image, path: Path) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise KalmaGroveError(_too_large(path))
    # Cameras keep a small copy behind a JPEG; that is no animation.
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        raise KalmaGroveError(f"{path} is animated; take single pictures out of it")
    if image.mode not in _MODES:
        raise KalmaGroveError(f"{path} has pixels of the kind {image.mode}; convert it to grey or RGB with 8 bits")


def _pixels(image: Image) -> np.ndarray:
    from PIL import Image as pillow
    from PIL import ImageOps

    kind = "L" if image.mode in _GREY_MODES else "RGB"
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
        white = pillow.new("RGBA", upright.size, "white")
        upright = pillow.alpha_composite(white, upright.convert("RGBA"))
    return np.asarray(upright.convert(kind)).reshape(upright.height, upright.width, -1)


def _too_large(path: Path) -> str:
    return f"{path} has more than {MOST_PIXELS / 1e6:.0f} million pixels; make it smaller"
