"""How the images that a model knows look, and which tokens stand for what; beside the model as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from kalmagrove.data.images.choices import SCANS, Scan
from kalmagrove.data.images.fitting import fit_to
from kalmagrove.data.images.patches import LARGEST_PATCH, MOST_PATCHES, patch_places
from kalmagrove.data.images.reading import MOST_PIXELS
from kalmagrove.errors import KalmaGroveError

MODALITY = "image"
MOST_CLASSES = 1 << 16


@dataclass(frozen=True)
class ImageFormat:
    """What images have in common.

    Attributes:
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        channels: 1 is grey, 3 is RGB.
        levels: Values of a pixel: 0 to ``levels - 1``.
        patch_size: Pixels of a patch's side; it divides height and width.
        scan: The order of the patches.
        predicts_pixels: Whether images are learnt, and not their labels alone.
        is_fitted: Whether images of other sizes are scaled and cut to this one, in the place of being refused.
        classes: Names of the labels.
        end_token: Before and after every example.
        image_token: Begins an image.
        patch_token: Stands for a patch.
        label_token: Asks for the label.
        class_tokens: One for each class.
        caption_tokens: Begin and end of a caption; None where there are none.
    """

    height: int
    width: int
    channels: int
    levels: int
    patch_size: int
    scan: Scan
    predicts_pixels: bool
    is_fitted: bool
    classes: tuple[str, ...]
    end_token: int
    image_token: int
    patch_token: int
    label_token: int
    class_tokens: tuple[int, ...]
    caption_tokens: tuple[int, int] | None

    @property
    def dimensions(self) -> int:
        """Pixels x channels of an image."""
        return self.height * self.width * self.channels

    @cached_property
    def places(self) -> np.ndarray:
        """Row and column of every patch in their order, (patches, 2)."""
        return patch_places(self.height // self.patch_size, self.width // self.patch_size, self.scan)

    @cached_property
    def next_places(self) -> np.ndarray:
        """Row and column of the patch after each, (patches, 2); one more than there are after the last."""
        return np.concatenate((self.places[1:], [self.places.max(axis=0) + 1]))

    @property
    def pixels(self) -> int:
        """Pixels x channels of a patch."""
        return self.patch_size**2 * self.channels

    @property
    def feature_size(self) -> int:
        """Of a patch: its pixels, and where the next one lies."""
        return self.pixels + 2

    def patch_options(self) -> dict[str, Any]:
        """What a model's configuration says about patches."""
        rows, columns = self.height // self.patch_size, self.width // self.patch_size
        return {
            "placeholder": self.patch_token,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "levels": self.levels,
            "rows": rows,
            "columns": columns,
        }

    def prepared(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """An image as the model knows it, (height, width, channels).

        A grey image becomes a coloured one where the model knows those.

        Args:
            pixels: (any height, any width, 1 or 3), uint8.
            name: Where it is, for an error.

        Raises:
            KalmaGroveError: Its size, channels or levels are not the format's.
        """
        if self.is_fitted and pixels.shape[0] >= self.height and pixels.shape[1] >= self.width:
            pixels = fit_to(pixels, self.height, self.width)
        if pixels.shape[:2] != (self.height, self.width):
            remedy = "leave it out" if self.is_fitted else "resize it, or train with data.image_size, which resizes all"
            raise KalmaGroveError(
                f"{name} has {pixels.shape[0]} x {pixels.shape[1]} pixels, not {self.height} x {self.width}; {remedy}"
            )
        if pixels.shape[2] > self.channels:
            raise KalmaGroveError(f"{name} is in colour, and the model knows grey images; convert it to grey")
        if pixels.max() >= self.levels:
            raise KalmaGroveError(
                f"{name} has the level {pixels.max()}, the training images go from 0 to {self.levels - 1}; scale it"
            )
        return np.broadcast_to(pixels, (self.height, self.width, self.channels))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"modality": MODALITY, **asdict(self)}

    @classmethod
    def from_dict(cls, schema: Mapping[str, Any]) -> ImageFormat:
        """The format of :meth:`to_dict`, checked.

        Raises:
            KalmaGroveError: It is of another modality, or something is missing or does not fit together.
        """
        if schema.get("modality") != MODALITY:
            raise KalmaGroveError(f"the model was trained on {schema.get('modality')!r}, not on images")
        missing = [field.name for field in fields(cls) if field.name not in schema]
        if missing:
            raise KalmaGroveError(f"the model's schema of images lacks {', '.join(missing)}; its folder is damaged")
        wrong = [name for name, is_sound in _checks(schema).items() if not is_sound]
        if wrong:
            raise KalmaGroveError(
                f"the model's schema of images has values that cannot be in {', '.join(wrong)}; its folder is damaged"
            )
        values = {field.name: schema[field.name] for field in fields(cls)}
        for name in ("classes", "class_tokens", "caption_tokens"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)


def _checks(schema: Mapping[str, Any]) -> dict[str, bool]:
    """For each value of a schema whether it can be; those that others depend on first."""
    height, width, patch_size = (schema[name] for name in ("height", "width", "patch_size"))
    is_sized = all(_is_within(side, 1, MOST_PIXELS) for side in (height, width)) and height * width <= MOST_PIXELS
    is_cut = is_sized and _is_within(patch_size, 1, LARGEST_PATCH)
    is_cut = is_cut and height % patch_size == width % patch_size == 0
    classes, class_tokens, caption = (schema[name] for name in ("classes", "class_tokens", "caption_tokens"))
    tokens = [schema[name] for name in ("end_token", "image_token", "patch_token", "label_token")]
    are_lists = isinstance(classes, list | tuple) and isinstance(class_tokens, list | tuple)
    tokens += [*class_tokens] if are_lists else []
    tokens += [*caption] if isinstance(caption, list | tuple) and len(caption) == 2 else []
    are_tokens = all(_is_within(token, 0, 2**31 - 1) for token in tokens)
    return {
        "height or width": is_sized,
        "patch_size": is_cut and height * width // patch_size**2 <= MOST_PATCHES,
        "channels": _is_within(schema["channels"], 1, 3) and schema["channels"] != 2,
        "levels": _is_within(schema["levels"], 2, 256),
        "scan": isinstance(schema["scan"], str) and schema["scan"] in SCANS,
        "is_fitted or predicts_pixels": all(isinstance(schema[n], bool) for n in ("is_fitted", "predicts_pixels")),
        "classes": are_lists
        and len(classes) == len(class_tokens) <= MOST_CLASSES
        and all(isinstance(name, str) and name for name in classes)
        and len(set(classes)) == len(classes),
        "tokens": are_tokens and len(set(tokens)) == len(tokens),
        "caption_tokens": caption is None or (isinstance(caption, list | tuple) and len(caption) == 2),
    }


def _is_within(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
