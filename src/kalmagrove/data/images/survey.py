"""What all images of a source have in common, and which split each belongs to: one pass over them."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kalmagrove.data.example_splits import EXAMPLES_HELD_OUT
from kalmagrove.data.images.fitting import fit_to
from kalmagrove.data.images.pictures import UNDIVIDED, Picture, Pictures
from kalmagrove.data.splits import SPLITS, Division, filled_splits
from kalmagrove.errors import KalmaGroveError

FEW_LEVELS = 64
"""Pixels that take at most so many values are predicted as these, others as 256."""
LONGEST_LABEL = 200

_LEFT_OUT = len(SPLITS)


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        channels: 1 where all are grey, else 3.
        levels: Values of a pixel, of the training images.
        classes: Labels of the training images, in their natural order.
        has_captions: Whether a training image has one.
        content: SHA-256 of all images, labels and captions, and of the splits that the source comes with.
        places: For each split of the source, which split each image belongs to.
    """

    height: int
    width: int
    channels: int
    levels: int
    classes: tuple[str, ...]
    has_captions: bool
    content: str
    places: Mapping[str, np.ndarray]

    def pictures(self, found: Mapping[str, Pictures], split: str) -> Iterator[Picture]:
        """The images of a split, in the order of their source.

        Raises:
            KalmaGroveError: There are more or fewer images than there were.
        """
        own = SPLITS.index(split)
        for name, places in self.places.items():
            if own not in places:
                continue
            count = 0
            for picture in found[name]():
                if count < len(places) and places[count] == own:
                    yield picture
                count += 1
            if count != len(places):
                raise KalmaGroveError("images were added or removed while they were read; begin again")


@dataclass
class _Found:
    """What is known of the images so far, in their order."""

    shape: tuple[int, int] | None
    first: str = ""
    channels: int = 1
    largest: bytearray = field(default_factory=bytearray)
    labels: array[int] = field(default_factory=lambda: array("i"))
    captioned: bytearray = field(default_factory=bytearray)
    digests: list[bytes] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    label_places: dict[str, int] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    content: Any = field(default_factory=hashlib.sha256)

    def add(self, picture: Picture, *, is_fitted: bool) -> int:
        """Returns the bytes of its pixels."""
        pixels = picture.load()
        if self.shape is None:
            self.shape, self.first = (pixels.shape[0], pixels.shape[1]), picture.name
        _check_size(pixels, picture.name, self.shape, None if is_fitted else self.first)
        pixels = fit_to(pixels, *self.shape)
        self.channels = max(self.channels, pixels.shape[2])
        self.largest.append(picture.levels - 1 if picture.levels is not None else int(pixels.max()))
        self.captioned.append(picture.caption is not None)
        self.labels.append(self._label_place(picture))
        self.digests.append(hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).digest())
        described = [self.digests[-1].hex(), picture.label, picture.caption]
        self.contents.append(hashlib.blake2b(json.dumps(described).encode(), digest_size=16).digest())
        self.content.update(json.dumps(described).encode())
        return pixels.nbytes

    def _label_place(self, picture: Picture) -> int:
        label = picture.label
        if label is None:
            return -1
        if len(label) > LONGEST_LABEL or not label.isprintable():
            raise KalmaGroveError(f"the label of {picture.name} is too long or not printable; give it a short name")
        if label not in self.label_places:
            self.label_places[label] = len(self.label_names)
            self.label_names.append(picture.name)
        return self.label_places[label]


def survey_pictures(
    found: Mapping[str, Pictures],
    *,
    source: str,
    size: tuple[int, int] | None,
    seed: int,
    progress: Callable[[str, int], None] | None = None,
) -> Survey:
    """Reads every image once.

    Images that come without splits are divided by a seeded hash of their pixels, after exact duplicates, with the same
    label and caption, are left out. A split that a source lacks is taken out of train; the others stay as they are.

    Args:
        found: Of `find_pictures`.
        source: Its name.
        size: Height and width that images are fitted to; None is that of the first, which all must have.
        seed: Chooses another division.
        progress: Called with ``"reading"`` and the bytes of pixels so far.

    Raises:
        KalmaGroveError: An image cannot be read, does not go with the others, or there are too few.
    """
    seen, counts, read = _Found(size), {}, 0
    for name, pictures in found.items():
        seen.content.update(name.encode())
        before = len(seen.digests)
        for picture in pictures():
            read += seen.add(picture, is_fitted=size is not None)
            if progress is not None:
                progress("reading", read)
        counts[name] = len(seen.digests) - before
    places = _divide(seen, counts, source, seed)
    in_train = places == SPLITS.index("train")
    if seen.shape is None or not in_train.any():
        raise KalmaGroveError(f"{source} holds no image to train on; give some")
    largest = int(np.frombuffer(seen.largest, np.uint8)[in_train].max())
    bounds = np.cumsum([0, *counts.values()])
    return Survey(
        *seen.shape,
        seen.channels,
        max(2, largest + 1) if largest < FEW_LEVELS else 256,
        _classes(seen, in_train, places != _LEFT_OUT, source),
        bool(np.frombuffer(seen.captioned, np.uint8)[in_train].any()),
        seen.content.hexdigest(),
        {name: places[bounds[at] : bounds[at + 1]] for at, name in enumerate(counts)},
    )


def _check_size(pixels: np.ndarray, name: str, shape: tuple[int, int], first: str | None) -> None:
    """Where all images must have the size of the first: ``first`` is its name."""
    height, width = pixels.shape[:2]
    if first is not None and (height, width) != shape:
        raise KalmaGroveError(
            f"{name} has {height} x {width} pixels, {first} has {shape[0]} x {shape[1]}; resize one, or all with "
            "data.image_size"
        )
    if height < shape[0] or width < shape[1]:
        raise KalmaGroveError(
            f"{name} has {height} x {width} pixels, fewer than data.image_size {shape[0]}x{shape[1]}; leave it out or "
            "choose a smaller size"
        )


def _divide(seen: _Found, counts: Mapping[str, int], source: str, seed: int) -> np.ndarray:
    """The split of every image, as its place among the names of splits; duplicates are in none."""
    digests = seen.digests
    held_out = {split: share for split, share in EXAMPLES_HELD_OUT.items() if split not in counts}
    places = np.concatenate([np.full(n, SPLITS.index(s if s in SPLITS else "train")) for s, n in counts.items()])
    divided = np.arange(counts.get(UNDIVIDED, counts.get("train", 0)))
    if UNDIVIDED in counts:
        firsts = {content: place for place, content in reversed(list(enumerate(seen.contents)))}
        divided = np.array(sorted(firsts.values()), dtype=int)
        places[:] = _LEFT_OUT
    if not held_out:
        return places
    different = len({digests[place] for place in divided})
    if different <= len(held_out):
        raise KalmaGroveError(
            f"{source} holds {different} different images, too few for {', '.join(('train', *held_out))}; give more"
        )
    texts = [digests[place].hex() for place in divided]
    places[divided] = [SPLITS.index(split) for split in filled_splits(texts, Division(held_out, seed))]
    return places


def _classes(seen: _Found, in_train: np.ndarray, is_used: np.ndarray, source: str) -> tuple[str, ...]:
    labels = np.frombuffer(seen.labels, dtype=np.intc)
    trained = set(labels[in_train].tolist()) - {-1}
    unknown = sorted(set(labels[is_used].tolist()) - trained - {-1})
    if unknown:
        label, name = list(seen.label_places)[unknown[0]], seen.label_names[unknown[0]]
        raise KalmaGroveError(
            f"the class {label!r} of {name} is that of no training image; give more images of it, or leave them out"
        )
    classes = sorted((label for label, place in seen.label_places.items() if place in trained), key=_natural)
    if len(classes) == 1:
        raise KalmaGroveError(
            f"all training images of {source} are of the class {classes[0]!r}; give more classes, or images without "
            "labels: outside of folders that are named after classes"
        )
    return tuple(classes)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """So that 2 comes before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
