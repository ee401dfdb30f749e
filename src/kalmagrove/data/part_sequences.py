"""Parts as a packed folder has them, and in an order as the sequences that a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kalmagrove.data.example_places import place_parts
from kalmagrove.data.examples import Part
from kalmagrove.modalities.sequences import Sequences


@dataclass(frozen=True)
class StoredParts:
    """The parts of some examples, one behind another.

    Attributes:
        tokens: (tokens,).
        weights: Whether each is to be predicted, (tokens,).
        places: Row and column of each within its part, (tokens, 2).
        slots: Of a modality's element its number among those of its modality, (tokens,).
        part_ends: Behind which token each part ends, (parts,).
        features: For each modality (its elements, size).
    """

    tokens: np.ndarray
    weights: np.ndarray
    places: np.ndarray
    slots: np.ndarray
    part_ends: np.ndarray
    features: Mapping[str, np.ndarray]


def store_parts(parts: Sequence[Part], *, placeholders: Mapping[str, int], sizes: Mapping[str, int]) -> StoredParts:
    """Parts one behind another.

    Args:
        parts: In the order in which they are kept.
        placeholders: Of each modality.
        sizes: Numbers in a feature vector, by modality.

    Raises:
        ValueError: A modality has more or fewer features than placeholders.
    """
    tokens = np.concatenate([np.zeros(0), *(part.tokens for part in parts)]).astype(np.int64)
    slots = np.zeros(len(tokens), dtype=np.int64)
    features = {}
    for name, size in sizes.items():
        given = [part.features[name] for part in parts if name in part.features]
        features[name] = np.concatenate([np.zeros((0, size)), *given]).astype(np.float32)
        chosen = np.flatnonzero(tokens == placeholders[name])
        if len(features[name]) != len(chosen):
            raise ValueError(f"{len(features[name])} features of {name} for {len(chosen)} placeholders")
        slots[chosen] = np.arange(len(chosen))
    return StoredParts(
        tokens=tokens,
        weights=np.concatenate([np.zeros(0), *(part.weights for part in parts)]).astype(np.float32),
        places=np.concatenate([np.zeros((0, 2)), *map(_places, parts)]).astype(np.int64),
        slots=slots,
        part_ends=np.cumsum([len(part.tokens) for part in parts]),
        features=features,
    )


def _places(part: Part) -> np.ndarray:
    """Row and column of a part's tokens; where they are in one line both are the same."""
    return np.repeat(np.arange(len(part.tokens))[:, None], 2, axis=1) if part.places is None else part.places


def placed_sequences(
    stored: StoredParts,
    orders: Sequence[np.ndarray],
    *,
    end_token: int,
    placeholders: Mapping[str, int],
    width: int | None = None,
    predicts_end: bool = False,
) -> Sequences:
    """Examples behind the token that begins each; those that are shorter end with it too.

    Args:
        stored: Holds their parts.
        orders: The numbers of each example's parts in their order; at least one example.
        end_token: Before and after each example.
        placeholders: Of each modality.
        width: Tokens of a row; None is as many as the longest example needs without an end.
        predicts_end: Whether the end of an example is to be predicted.

    Returns:
        (examples, width) tokens, with axes.
    """
    where = place_parts(orders, stored.part_ends, stored.places)
    at, own = (where.rows, where.columns), stored.tokens[where.sources]
    shape = (len(orders), int(where.ends.max()) if width is None else width)
    tokens = np.full(shape, end_token, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    axes = np.zeros((*shape, 2), dtype=np.float32)
    tokens[at], weights[at] = own, stored.weights[where.sources]
    axes[at] = where.clocks[:, None] + stored.places[where.sources].astype(np.float32)
    features = {}
    for name, values in stored.features.items():
        is_element = own == placeholders[name]
        features[name] = np.zeros((*shape, values.shape[1]), dtype=np.float32)
        features[name][where.rows[is_element], where.columns[is_element]] = values[
            stored.slots[where.sources[is_element]]
        ]
    behind = np.arange(shape[1]) - where.ends[:, None]
    weights[behind == 0] = predicts_end
    axes[behind >= 0] = np.repeat((where.last_clocks[:, None] + behind)[behind >= 0][:, None], 2, axis=1)
    by_name = {name: torch.from_numpy(values) for name, values in features.items()}
    return Sequences(torch.from_numpy(tokens), torch.from_numpy(weights), by_name, torch.from_numpy(axes))


def sequences_of_parts(
    examples: Sequence[Sequence[Part]], *, end_token: int, placeholders: Mapping[str, int], sizes: Mapping[str, int]
) -> Sequences:
    """Examples whose parts stand in the order given; (examples, 1 + most tokens), with axes.

    Args:
        examples: At least one, of one part or more.
        end_token: Before and after each example.
        placeholders: Of each modality.
        sizes: Numbers in a feature vector, by modality.
    """
    stored = store_parts([part for example in examples for part in example], placeholders=placeholders, sizes=sizes)
    ends = np.cumsum([len(example) for example in examples])
    orders = [np.arange(end - len(example), end) for end, example in zip(ends, examples, strict=True)]
    return placed_sequences(stored, orders, end_token=end_token, placeholders=placeholders)
