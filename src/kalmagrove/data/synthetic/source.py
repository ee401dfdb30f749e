"""A synthetic source by its name: documents in splits, its tokeniser, its fingerprint, and its best prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from kalmagrove.data.synthetic.markov import MarkovSource
from kalmagrove.data.synthetic.options import MarkovOptions, full_name, held_out_tokens, parse_synthetic
from kalmagrove.data.synthetic.recall import RecallSource
from kalmagrove.data.synthetic.words import text_of, word_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SyntheticSource = MarkovSource | RecallSource
STREAMS = {"train": 1, "valid": 2, "test": 3}
"""Random streams of the splits; stream 0 makes the source itself."""
_GENERATOR = 1
"""Changes whenever the same options give another text."""


@lru_cache(maxsize=4)
def open_synthetic(source: str) -> SyntheticSource:
    """The source of a name such as ``synthetic:markov,states=64``.

    Raises:
        UsageError: The task, an option or a value is unknown or out of range.
    """
    options = parse_synthetic(source)
    return MarkovSource(options) if isinstance(options, MarkovOptions) else RecallSource(options)


def synthetic_splits(source: str) -> dict[str, Iterator[str]]:
    """Texts of the documents of train, valid and test, from random streams of their own.

    Raises:
        UsageError: As for `open_synthetic`.
    """
    return {split: _texts(open_synthetic(source), split) for split in STREAMS}


def synthetic_tokenizer(source: str) -> Tokenizer:
    """The tokeniser that gives one token a word.

    Raises:
        UsageError: As for `open_synthetic`.
    """
    return word_tokenizer(open_synthetic(source).words)


def synthetic_fingerprint(source: str) -> str:
    """SHA-256 over all options, those that are left out among them.

    Raises:
        UsageError: As for `open_synthetic`.
    """
    return hashlib.sha256(f"{_GENERATOR}:{full_name(parse_synthetic(source))}".encode()).hexdigest()


def _texts(source: SyntheticSource, split: str) -> Iterator[str]:
    options, words = source.options, source.words
    tokens = options.tokens if split == "train" else held_out_tokens(options)
    for document in source.documents(STREAMS[split], tokens):
        yield text_of(document, words)
