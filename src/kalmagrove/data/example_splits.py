"""Examples - rows of a table, lines of a mixed file, images - in train, valid and test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

from kalmagrove.data.splits import SPLITS, Division, filled_splits
from kalmagrove.errors import KalmaGroveError

EXAMPLES_HELD_OUT = {"valid": 0.1, "test": 0.1}
"""Expected shares of the examples: they are fewer than the documents of a text."""


class HasContent(Protocol):
    """What can be divided into splits by what it holds."""

    def content(self) -> str:
        """The same text for what is equal."""
        ...


Example = TypeVar("Example", bound=HasContent)


def split_examples(
    source: str, found: Mapping[str | None, Iterator[Example]], *, seed: int
) -> Iterator[tuple[str, Example]]:
    """Examples with the split that each belongs to, always in the same order.

    Args:
        source: Where they come from, for an error's text.
        found: Those of train, and of valid and test where these exist, which stay as they are, while a split that is
            missing is taken out of train; or all of them under None, to be divided by a seeded hash of their content,
            so that equal ones are in one split. Repeated ones are kept: how often they occur is a part of what they
            say.
        seed: Chooses another division.

    Raises:
        KalmaGroveError: There are fewer examples than splits.
    """
    if None in found:
        yield from _divided(source, found[None], Division(EXAMPLES_HELD_OUT, seed))
        return
    missing = {split: share for split, share in EXAMPLES_HELD_OUT.items() if split not in found}
    train = found["train"]
    yield from _divided(source, train, Division(missing, seed)) if missing else (("train", one) for one in train)
    for split in SPLITS[1:]:
        yield from ((split, one) for one in found.get(split, ()))


def _divided(source: str, examples: Iterator[Example], division: Division) -> Iterator[tuple[str, Example]]:
    """They wait until each split has one; where that never comes, the fullest split gives one away."""
    waiting: list[Example] = []
    filled: set[str] = set()
    for example in examples:
        waiting.append(example)
        filled.add(division.split(example.content()))
        if len(filled) == len(division.splits):
            yield from ((division.split(kept.content()), kept) for kept in waiting)
            break
    else:
        different = len({kept.content() for kept in waiting})
        if different < len(division.splits):
            raise KalmaGroveError(
                f"{source} holds {different} different rows, too few for {', '.join(division.splits)}; give more"
            )
        yield from zip(filled_splits([kept.content() for kept in waiting], division), waiting, strict=True)
    yield from ((division.split(example.content()), example) for example in examples)
