"""Divide the documents of a source into train, valid and test, or keep the splits it comes with."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TypeVar

from kalmagrove.data.sources import (
    LONGEST_DOCUMENT,
    cut_at_line_ends,
    hub_splits,
    is_hub_name,
    iter_documents,
    iter_file,
    source_files,
)
from kalmagrove.data.synthetic.options import is_synthetic
from kalmagrove.data.synthetic.source import synthetic_splits
from kalmagrove.errors import KalmaGroveError

Item = TypeVar("Item")
SPLITS = ("train", "valid", "test")
HELD_OUT = {"valid": 0.02, "test": 0.02}
"""Expected shares of a text's documents."""

_OUR_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
_SPLIT_FILE = re.compile(rf"({'|'.join(_OUR_NAMES)})([-_]\d[^./]*)?\.[^/]*", re.IGNORECASE)
_BLOCK_CHARACTERS = 4096
_FEWEST_BLOCKS = 16
# Documents wait, at most this many characters of them, until each split has one.
_MOST_WAITING_CHARACTERS = 1 << 25


@dataclass(frozen=True)
class Division:
    """Places a text by a seeded hash of its content, so equal texts share a split.

    Attributes:
        held_out: Expected share of the texts in each split but train.
        seed: Chooses another division.
    """

    held_out: dict[str, float]
    seed: int

    @property
    def splits(self) -> tuple[str, ...]:
        """Train and what is held out."""
        return ("train", *self.held_out)

    def share(self, text: str) -> float:
        """Where a text's hash lies between 0 and 1."""
        return int.from_bytes(_digest(text, self.seed)[:8], "big") / 2**64

    def split(self, text: str) -> str:
        """The split of a text."""
        share, bound = self.share(text), 0.0
        for split, fraction in self.held_out.items():
            bound += fraction
            if share < bound:
                return split
        return "train"


def split_documents(
    source: str | None, *, seed: int = 0, held_out: Mapping[str, float] = HELD_OUT
) -> Iterator[tuple[str, str]]:
    """Stream the documents of a source with the split that each belongs to, always in the same order.

    A folder with files named train.*, valid.* (validation.*, val.*, dev.*) and test.*, also in numbered parts, comes
    with splits, and so do a synthetic task and a Hub data set that has them; these stay exactly as they are, and a
    split that is missing there is taken out of train. Any other source is divided by a seeded hash of each document's
    content, after exact duplicates are removed. A source of one or two documents is cut into blocks that are divided in
    their place.

    Args:
        source: As for `iter_documents`.
        seed: Chooses another division.
        held_out: Expected shares of the documents in valid and test.

    Yields:
        (split, document) pairs; each split gets at least one.

    Raises:
        KalmaGroveError: The source cannot be read or holds too little text for three splits.
    """
    given = given_splits(source)
    if not given:
        yield from _divide(_without_duplicates(iter_documents(source)), Division(dict(held_out), seed))
        return
    missing = {split: share for split, share in held_out.items() if split not in given}
    train = given.pop("train")
    yield from _divide(train, Division(missing, seed)) if missing else (("train", document) for document in train)
    for split, documents in given.items():
        yield from ((split, document) for document in documents)


def given_splits(source: str | None) -> dict[str, Iterator[str]]:
    """Documents of each split that a source comes with: train and at least one other, or nothing.

    Args:
        source: As for `iter_documents`. Files of a folder count where they lie directly in it and are not .py files.

    Raises:
        KalmaGroveError: The source does not exist or cannot be opened.
    """
    if is_synthetic(source):
        return synthetic_splits(source)
    found: dict[str, list[Iterator[str]]] = {}
    if source is not None and is_hub_name(source):
        for name, documents in hub_splits(source).items():
            if name in _OUR_NAMES:
                found.setdefault(_OUR_NAMES[name], []).append(documents)
    elif source is not None:
        files = (file for file in source_files(source) if ".py" not in file.path.suffixes)
        found = by_split((file.name, iter_file(file.path)) for file in files)
    if "train" not in found or len(found) == 1:
        return {}
    return {split: chain.from_iterable(found[split]) for split in SPLITS if split in found}


def by_split(named: Iterable[tuple[str, Item]]) -> dict[str, list[Item]]:
    """What comes with names of files, by the split that each name says; the others are left out."""
    found: dict[str, list[Item]] = {}
    for name, item in named:
        split = split_of_file(name)
        if split is not None:
            found.setdefault(split, []).append(item)
    return found


def split_of_file(name: str) -> str | None:
    """The split that a name says: train.*, valid.* (validation.*, val.*, dev.*) or test.*, also in numbered parts."""
    match = _SPLIT_FILE.fullmatch(name)
    return None if match is None else _OUR_NAMES[match[1].lower()]


def _without_duplicates(documents: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for document in documents:
        digest = _digest(document, seed=0)
        if digest not in seen:
            seen.add(digest)
            yield document


def _digest(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()


def _divide(documents: Iterable[str], division: Division) -> Iterator[tuple[str, str]]:
    documents = iter(documents)
    waiting: list[str] = []
    characters = 0
    filled: set[str] = set()
    for document in documents:
        waiting.append(document)
        characters += len(document)
        filled.add(division.split(document))
        if len(filled) == len(division.splits):
            break
        if characters > _MOST_WAITING_CHARACTERS and len(waiting) >= len(division.splits):
            break
    else:
        # Holding a whole document out of a few, or of a few long ones, would take far more than the fractions.
        if len(waiting) < len(division.splits) or characters > len(waiting) * LONGEST_DOCUMENT // 4:
            yield from _divide_blocks(waiting, division)
            return
    yield from zip(filled_splits(waiting, division), waiting, strict=True)
    yield from ((division.split(document), document) for document in documents)


def filled_splits(texts: list[str], division: Division) -> list[str]:
    """The split of each text, equal ones in one; a split that got none takes a text from the split that has most.

    Raises:
        KalmaGroveError: There are fewer different texts than splits.
    """
    placed = {text: division.split(text) for text in texts}
    if len(placed) < len(division.splits):
        raise KalmaGroveError(
            f"the source holds too little text to be divided into {', '.join(division.splits)}; give a longer one"
        )
    for empty in [split for split in division.splits if split not in placed.values()]:
        fullest = Counter(placed.values()).most_common(1)[0][0]
        placed[min((text for text, split in placed.items() if split == fullest), key=division.share)] = empty
    return [placed[text] for text in texts]


def _divide_blocks(documents: list[str], division: Division) -> Iterator[tuple[str, str]]:
    """Divide blocks of the documents; neighbouring blocks of one split are one document again."""
    characters = sum(len(document) for document in documents)
    longest = max(1, min(_BLOCK_CHARACTERS, characters // _FEWEST_BLOCKS))
    blocks = [(number, block) for number, text in enumerate(documents) for block in cut_at_line_ends(text, longest)]
    texts = [block for _, block in blocks]
    if len(set(texts)) < len(division.splits):
        # A text that repeats itself is divided all the same.
        texts = [f"{place} {block}" for place, block in enumerate(texts)]
    splits = filled_splits(texts, division)
    placed = [(split, number, block) for split, (number, block) in zip(splits, blocks, strict=True)]
    for (split, _), run in groupby(placed, key=lambda item: item[:2]):
        yield split, "".join(block for _, _, block in run)
