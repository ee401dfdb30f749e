"""Sets of images for the benchmark, each as a folder or an .npz that `image_source` reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kalmagrove.data.images.pictures import find_pictures
from kalmagrove.data.images.source import ImageSource

SIDE = 32
"""Of the squares that are cut out of photographs."""
MOST_HUB_IMAGES = {"train": 10_000, "test": 2_000}


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    Attributes:
        name: Of its folder.
        origin: Where the images come from, for the page.
        write: Writes the set for a path and returns what is to be read.
        patch_size: Pixels of a patch's side.
        epochs: How often a training reads each training image.
    """

    name: str
    origin: str
    write: Callable[[Path], Path]
    patch_size: int
    epochs: float


class NoSuchSet(Exception):
    """The set cannot be had here."""


def write_digits(folder: Path) -> Path:
    """Optical digits of 8 x 8 pixels with 17 levels; divided by their content."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _written(folder / "digits.npz", digits.images.astype(np.uint8), digits.target)


def write_photographs(folder: Path) -> Path:
    """Squares cut out of two photographs: the left for training, a strip for validation, the right for the test."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    draw = np.random.Generator(np.random.PCG64(0))
    bounds = {"train": (0, 400, 3000), "valid": (400, 520, 300), "test": (520, 640, 300)}
    for split, (left, right, count) in bounds.items():
        squares = []
        for number in range(count):
            photograph = photographs[number % len(photographs)]
            row = int(draw.integers(0, photograph.shape[0] - SIDE + 1))
            column = int(draw.integers(left, right - SIDE + 1))
            squares.append(photograph[row : row + SIDE, column : column + SIDE])
        _written(folder / "photographs" / f"{split}.npz", np.stack(squares), None)
    return folder / "photographs"


def write_from_hub(name: str, column: str, folder: Path) -> Path:
    """A set of the Hub, its first images; needs the extra "data" and a network.

    Raises:
        NoSuchSet: One of them is missing.
    """
    try:
        from datasets import load_dataset

        parts = {split: load_dataset(name, split=f"{split}[:{most}]") for split, most in MOST_HUB_IMAGES.items()}
    # Network and library errors have no common base.
    except Exception as error:
        raise NoSuchSet((str(error).splitlines() or [type(error).__name__])[0][:120]) from error
    target = folder / name.rpartition("/")[2]
    for split, rows in parts.items():
        images = np.stack([np.asarray(image) for image in rows[column]])
        _written(target / f"{split}.npz", images, np.asarray(rows["label"]))
    return target


def _written(path: Path, images: np.ndarray, labels: np.ndarray | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, **({} if labels is None else {"labels": labels}))
    return path


def arrays(source: ImageSource, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels between -1 and 1, (images, height, width, channels), and the place of each label, (images,)."""
    form, pixels, labels = source.form, [], []
    for picture in source.survey.pictures(find_pictures(source.source), split):
        pixels.append(form.prepared(picture.load(), picture.name))
        labels.append(form.classes.index(picture.label) if picture.label is not None else 0)
    return np.stack(pixels).astype(np.float32) * (2 / (form.levels - 1)) - 1, np.asarray(labels)


SETS = {
    "digits": ImageSet("digits", "scikit-learn's load_digits", write_digits, 2, 12),
    "photographs": ImageSet("photographs", "scikit-learn's load_sample_images", write_photographs, 4, 3.5),
    "mnist": ImageSet("mnist", "ylecun/mnist", lambda folder: write_from_hub("ylecun/mnist", "image", folder), 4, 2),
    "cifar10": ImageSet(
        "cifar10", "uoft-cs/cifar10", lambda folder: write_from_hub("uoft-cs/cifar10", "img", folder), 4, 2
    ),
}
