"""Whether stored examples are what they are said to be: what files and a manifest from elsewhere may not be."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kalmagrove.data.packing import SplitInfo
from kalmagrove.data.part_sequences import StoredParts


def check_examples(
    stored: StoredParts,
    example_ends: np.ndarray,
    info: SplitInfo,
    *,
    placeholders: Mapping[str, int],
    vocab_size: int,
) -> int:
    """That the files of one split fit each other, its counts and its tokeniser.

    Args:
        stored: All parts of the split.
        example_ends: Behind which part each example ends, (examples,).
        info: What the split is said to hold.
        placeholders: Of each modality.
        vocab_size: One more than the largest token.

    Returns:
        Tokens of the longest example, its beginning and end among them.

    Raises:
        ValueError: They do not; the text says what is wrong.
    """
    count = len(stored.tokens)
    lengths = {len(stored.weights), len(stored.places), len(stored.slots), info.tokens}
    if lengths != {count}:
        raise ValueError(f"its files hold {count} tokens, and other numbers of what belongs to them")
    if len(example_ends) != info.documents or not info.documents:
        raise ValueError(f"it holds {len(example_ends)} examples, and {info.documents} are listed")
    if not _are_ends(stored.part_ends, count) or not _are_ends(example_ends, len(stored.part_ends)):
        raise ValueError("its parts or examples end where none can")
    if (stored.tokens >= vocab_size).any() or (stored.weights > 1).any():
        raise ValueError("it holds tokens or weights that are none")
    for name, values in stored.features.items():
        slots = stored.slots[stored.tokens == placeholders[name]]
        if len(slots) and slots.max() >= len(values):
            raise ValueError(f"features of {name} are missing")
    token_ends = np.concatenate([[0], stored.part_ends]).astype(np.int64)[example_ends.astype(np.int64)]
    return int(np.diff(token_ends, prepend=0).max()) + 2


def _are_ends(ends: np.ndarray, count: int) -> bool:
    """Whether they divide ``count`` things in their order."""
    if not len(ends):
        return count == 0
    return int(ends[-1]) == count and bool((np.diff(ends.astype(np.int64), prepend=0) >= 0).all())
