"""Windows of a token stream: shuffled batches for training and sliding windows for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from kalmagrove.errors import KalmaGroveError, UsageError


def batch_at(
    tokens: np.ndarray,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    step: int,
    rows: range | None = None,
) -> np.ndarray:
    """The batch of one training step; a pure function of its arguments.

    Windows start ``context_length`` tokens apart, from an offset that each epoch draws anew. An epoch reads each of
    its windows once, in a seeded order. The sequence of windows does not depend on the size of the batches.

    Args:
        tokens: One-dimensional stream.
        context_length: Tokens that a model reads; a window has one more.
        batch_size: Windows of a step.
        seed: Chooses the offsets and orders.
        step: Step number, from 0.
        rows: Those of the step's windows that are wanted; all where left out.

    Returns:
        int64 tokens, (rows, context + 1).

    Raises:
        KalmaGroveError: The stream is too short for one window.
        UsageError: The context length is not positive.
    """
    windows = window_count(len(tokens), context_length)
    wanted = range(batch_size) if rows is None else rows
    starts = np.empty(len(wanted), dtype=np.int64)
    for row, number in enumerate(wanted):
        epoch, place = divmod(step * batch_size + number, windows)
        draw, order = _epoch(windows, seed, epoch)
        # Every offset leaves room for all windows, and the largest lets the last one end at the last token.
        offset = draw % (len(tokens) - windows * context_length)
        starts[row] = offset + order[place] * context_length
    return np.asarray(tokens[starts[:, None] + np.arange(context_length + 1)], dtype=np.int64)


def window_count(tokens: int, context_length: int) -> int:
    """Windows of an epoch, the same for every epoch.

    Args:
        tokens: Length of the stream.
        context_length: Tokens that a model reads.

    Raises:
        KalmaGroveError: The stream is too short for one window.
        UsageError: The context length is not positive.
    """
    needed = tokens_needed(context_length)
    if tokens < needed:
        raise KalmaGroveError(
            f"the split holds {tokens} tokens, but a context length of {context_length} needs at least {needed}; "
            "use more text or a shorter context"
        )
    return max(1, (tokens - context_length) // context_length)


def tokens_needed(context_length: int) -> int:
    """Shortest token stream that gives a window.

    Raises:
        UsageError: The context length is not positive.
    """
    if context_length < 1:
        raise UsageError(f"context_length must be at least 1, got {context_length}")
    return context_length + 1


def evaluation_windows(tokens: np.ndarray, *, context_length: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Sliding windows that score each token but the first exactly once.

    Args:
        tokens: One-dimensional stream.
        context_length: Tokens that a model reads at most.
        stride: Tokens between the starts of windows, at most ``context_length``; all windows but the first score at
            most this many.

    Yields:
        (window, scored): int64 tokens, (at most context + 1,), and how many of its last tokens count.

    Raises:
        KalmaGroveError: There are fewer than two tokens.
        UsageError: The context length or the stride is out of range.
    """
    tokens_needed(context_length)
    if not 1 <= stride <= context_length:
        raise UsageError(f"stride must be between 1 and the context length {context_length}, got {stride}")
    if len(tokens) < 2:
        raise KalmaGroveError(f"the split holds {len(tokens)} tokens, but at least 2 are needed to score one")
    scored_to = 1
    for start in range(0, len(tokens), stride):
        end = min(start + context_length + 1, len(tokens))
        yield np.asarray(tokens[start:end], dtype=np.int64), end - scored_to
        scored_to = end
        if end == len(tokens):
            return


@lru_cache(maxsize=4096)
def shuffled_order(count: int, *key: int) -> np.ndarray:
    """The numbers below ``count`` in an order that a key, such as seed and epoch, draws; (count,)."""
    order = np.argsort(np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count), kind="stable")
    order.flags.writeable = False
    return order


@lru_cache(maxsize=4)
def _epoch(windows: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """A random number for the offset, and the order of the windows, (windows,)."""
    # Only the raw stream of a bit generator is the same in all NumPy versions.
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(windows + 1)
    order = np.argsort(draws[1:], kind="stable")
    order.flags.writeable = False
    return int(draws[0]), order
