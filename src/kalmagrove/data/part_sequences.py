"""Parts in an order as the sequence that a model reads, as a packed folder has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kalmagrove.data.example_places import place_parts
from kalmagrove.data.examples import Part
from kalmagrove.modalities.sequences import Sequences


def sequences_of_parts(
    examples: Sequence[Sequence[Part]], *, end_token: int, placeholders: Mapping[str, int], sizes: Mapping[str, int]
) -> Sequences:
    """Examples behind the token that begins each; those that are shorter end with it too.

    Args:
        examples: At least one, of one part or more.
        end_token: Before and after each example.
        placeholders: Of each modality.
        sizes: Numbers in a feature vector, by modality.

    Returns:
        (examples, 1 + most tokens) tokens, with axes.
    """
    parts = [part for example in examples for part in example]
    tokens, weights = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "weights"))
    places = np.concatenate([_places(part) for part in parts])
    ends = np.cumsum([len(example) for example in examples])
    orders = [np.arange(end - len(example), end) for end, example in zip(ends, examples, strict=True)]
    where = place_parts(orders, np.cumsum([len(part.tokens) for part in parts]), places)
    at, own = (torch.from_numpy(where.rows), torch.from_numpy(where.columns)), where.sources
    shape = (len(examples), int(where.ends.max()))
    found_tokens, found_weights = torch.full(shape, end_token), torch.zeros(shape)
    found_tokens[at] = torch.from_numpy(tokens[own]).long()
    found_weights[at] = torch.from_numpy(weights[own]).float()
    behind = torch.arange(shape[1]) - torch.from_numpy(where.ends)[:, None]
    axes = (torch.from_numpy(where.last_clocks)[:, None] + behind).clamp(min=0)[..., None].repeat(1, 1, 2).float()
    axes[:, 0] = 0
    axes[at] = torch.from_numpy(where.clocks[:, None] + places[own]).float()
    features = {name: torch.zeros((*shape, size)) for name, size in sizes.items()}
    for name, tensor in features.items():
        given = [part.features[name] for part in parts if name in part.features]
        if given:
            tensor[found_tokens == placeholders[name]] = torch.from_numpy(np.concatenate(given)).float()
    return Sequences(found_tokens, found_weights, features, axes)


def _places(part: Part) -> np.ndarray:
    """Row and column of a part's tokens; where they are in one line both are the same."""
    return np.repeat(np.arange(len(part.tokens))[:, None], 2, axis=1) if part.places is None else part.places
