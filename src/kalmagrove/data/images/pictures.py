"""Pictures of a folder, a JSONL or an .npz, each read only when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kalmagrove.data.images.reading import FILE_LEVELS, OTHER_SUFFIXES, SUFFIXES, read_image
from kalmagrove.data.splits import SPLITS, by_split
from kalmagrove.errors import KalmaGroveError

LISTS = (".jsonl", ".npz")
UNDIVIDED = "all"
"""The split of pictures that come without splits."""


@dataclass(frozen=True)
class Picture:
    """A picture that can be read.

    Attributes:
        name: Where it is, for a person.
        load: Its pixels, (height, width, channels), uint8; to be called before the next picture is taken.
        label: Its class.
        caption: A text about it.
        levels: Values that a pixel can take, where the kind of file says it.
    """

    name: str
    load: Callable[[], np.ndarray]
    label: str | None = None
    caption: str | None = None
    levels: int | None = None


Pictures = Callable[[], Iterable[Picture]]


def find_pictures(path: str) -> dict[str, Pictures]:
    """The pictures of each split that a source comes with, or all under ``UNDIVIDED``; always in the same order.

    A source is a folder of PNG and JPEG files, whose folders are classes; a JSONL whose lines have ``image``, a path
    below its own folder, and may have ``label`` and ``caption``; an .npz with ``images`` and perhaps ``labels``; or one
    picture. It comes with splits where a folder holds folders, or files such as those, named train, valid and test.

    Raises:
        KalmaGroveError: There is nothing, something else, or something that cannot be told to be one or the other.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return {UNDIVIDED: _pictures_of_file(root)}
    if not root.is_dir():
        raise KalmaGroveError(f"there is no file or folder {path}; mend the path")
    lists = _by_split(file for file in sorted(root.iterdir()) if file.suffix.lower() in LISTS and file.is_file())
    if lists:
        return {split: _chained([_pictures_of_file(file) for file in files]) for split, files in lists.items()}
    folders = _by_split(entry for entry in sorted(root.iterdir()) if entry.is_dir())
    if not folders:
        return {UNDIVIDED: partial(_folder_pictures, root)}
    known = {folder for found in folders.values() for folder in found}
    for file in _image_files(root):
        if root / file.relative_to(root).parts[0] not in known:
            raise KalmaGroveError(
                f"{file} lies beside the folder {known.pop()}, which is a split; move it into one of the splits"
            )
    return {
        split: _chained([partial(_folder_pictures, folder, named_from=root) for folder in found])
        for split, found in folders.items()
    }


def _by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Files or folders that are named after splits: train and at least one other, or nothing."""
    found = by_split((path.name if path.suffix.lower() in LISTS else f"{path.name}.", path) for path in paths)
    return {split: found[split] for split in SPLITS if split in found} if "train" in found and len(found) > 1 else {}


def _chained(sources: list[Pictures]) -> Pictures:
    def pictures() -> Iterator[Picture]:
        for source in sources:
            yield from source()

    return pictures


def _pictures_of_file(path: Path) -> Pictures:
    from kalmagrove.data.images.arrays import array_pictures
    from kalmagrove.data.images.lists import listed_pictures

    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return partial(listed_pictures, path)
    if suffix == ".npz":
        return partial(array_pictures, path)
    _check_kind(path)
    if suffix in SUFFIXES:
        return lambda: [Picture(path.name, partial(read_image, path), levels=FILE_LEVELS)]
    raise KalmaGroveError(f"{path} is no folder, JSONL, .npz, PNG or JPEG; images come as one of these")


def _folder_pictures(root: Path, *, named_from: Path | None = None) -> Iterator[Picture]:
    """The classes are the folders directly in a folder, or it has none; names begin at the folder that was given."""
    above = root if named_from is None else named_from
    files = _image_files(root)
    labels = [file.relative_to(root).parts[0] if file.parent != root else None for file in files]
    if None in labels and len(set(labels)) > 1:
        single = files[labels.index(None)]
        classed = next(file for file, label in zip(files, labels, strict=True) if label is not None)
        raise KalmaGroveError(
            f"{single} is in no class, and {classed} is; put every image into a folder named after its class, or none"
        )
    for file, label in zip(files, labels, strict=True):
        yield Picture(file.relative_to(above).as_posix(), partial(read_image, file), label, levels=FILE_LEVELS)


def _image_files(root: Path) -> list[Path]:
    """PNG and JPEG files below a folder, by name; hidden ones and files of other kinds are passed over."""
    inside, found = root.resolve(), []
    for folder, folder_names, file_names in os.walk(root):
        folder_names[:] = [name for name in folder_names if not name.startswith(".")]
        for name in folder_names:
            if Path(folder, name).is_symlink():
                raise KalmaGroveError(f"{Path(folder, name)} is a link to a folder; put the folder itself there")
        for path in (Path(folder, name) for name in file_names if not name.startswith(".")):
            _check_kind(path)
            if path.suffix.lower() not in SUFFIXES:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise KalmaGroveError(f"{path} is a link out of {root}; put the image itself there")
            found.append(path)
    if not found:
        raise KalmaGroveError(f"{root} holds no PNG or JPEG file; give a folder of images, a JSONL or an .npz")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _check_kind(path: Path) -> None:
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise KalmaGroveError(f"{path} is neither PNG nor JPEG; convert it or leave it out")
