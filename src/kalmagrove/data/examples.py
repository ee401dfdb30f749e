"""Examples: sequences of parts, for data whose rows are what a model learns from, as tables and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Part:
    """A part of an example that stays together where parts are shuffled.

    Attributes:
        tokens: (tokens,); the token of a modality's element is its placeholder.
        weights: (tokens,), whether each is to be predicted.
        features: For each modality (its elements in this part, size), in the order of their placeholders.
        places: Row and column of each token within the part, (tokens, 2); None is one line.
    """

    tokens: np.ndarray
    weights: np.ndarray
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    places: np.ndarray | None = None


@dataclass(frozen=True)
class Example:
    """What a model learns from at once.

    Attributes:
        parts: In their natural order.
        values: Values that are to be predicted: cells, or pixels and channels; what words are to a text.
        size: Bytes of what they hold, as bits per byte count them.
    """

    parts: tuple[Part, ...]
    values: int
    size: int


class ExampleSource(Protocol):
    """Examples in splits, and what a model needs to know of them.

    Attributes:
        modality: table, image or mixed.
        source: Where they come from.
        tokenizer: Has every token of the examples, and the end-of-text token that begins and ends each.
        modalities: For each modality its options, the placeholder and what `make_modality` takes.
        schema: What is needed to read further rows like these, and to show what a model says about them; JSON.
        shuffles: Whether the parts are learnt in any order.
        predicts_end: Whether the end of an example is to be predicted.
        inputs: What the examples depend on, to know them again; JSON.
    """

    modality: str
    source: str
    tokenizer: Tokenizer
    modalities: dict[str, dict[str, Any]]
    schema: dict[str, Any]
    shuffles: bool
    predicts_end: bool
    inputs: dict[str, Any]

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of train, valid or test, always in the same order."""
        ...
