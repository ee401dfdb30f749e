"""The parts of an example: an image, its label, its caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kalmagrove.data.examples import Part
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.patches import to_patches

FEATURE = "patch"
"""Name of the modality."""


def image_part(form: ImageFormat, pixels: np.ndarray) -> Part:
    """An image: a token that begins it, and its patches, which lie in rows and columns below and beside that.

    Args:
        form: Of the images.
        pixels: Of :meth:`ImageFormat.prepared`.
    """
    patches = to_patches(pixels, form.places, form.patch_size)
    tokens = np.full(len(patches) + 1, form.patch_token)
    tokens[0] = form.image_token
    weights = np.full(len(tokens), int(form.predicts_pixels))
    weights[0] = 0
    places = np.concatenate((np.zeros((1, 2), dtype=int), form.places + 1))
    return Part(tokens, weights, {FEATURE: np.concatenate((patches, form.next_places), axis=1)}, places)


def label_part(form: ImageFormat, label: str | None) -> Part:
    """The label: a token that asks for it, and the one of its class; None is the question alone."""
    answer = [] if label is None else [form.class_tokens[form.classes.index(label)]]
    return _asked([form.label_token, *answer])


def caption_part(form: ImageFormat, tokens: Sequence[int]) -> Part:
    """The caption: a token that asks for it, its own, and one that ends it."""
    assert form.caption_tokens is not None
    return _asked([form.caption_tokens[0], *tokens, form.caption_tokens[1]])


def _asked(tokens: list[int]) -> Part:
    weights = np.ones(len(tokens))
    weights[0] = 0
    return Part(np.asarray(tokens), weights)
