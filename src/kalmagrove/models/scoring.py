"""The nats that a causal language model spends on token windows; for our models and for any of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import Precision, autocast
from kalmagrove.world import ALONE, World

LOGIT_BUDGET = 1 << 25
"""Logits that are made at once."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode as long as the context is open, and then in its own mode again."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def nats_of_windows(
    model: nn.Module,
    windows: Iterable[tuple[np.ndarray, int]],
    *,
    vocab_size: int,
    device: torch.device,
    precision: Precision,
    world: World = ALONE,
) -> tuple[float, int]:
    """Sum of nats over windows, and the number of tokens that were scored.

    Args:
        model: Called as ``model(input_ids=...)``; gives ``logits``. Its mode (training or not) is kept.
        windows: (tokens, scored) pairs: the last ``scored`` tokens count, the others are context.
        vocab_size: Of the logits; sets how many windows go through at once.
        device: Of the model.
        precision: Of the products; the softmax is float32.
        world: Processes that share the windows; all of them call this together and get the same.
    """
    total, scored_tokens = 0.0, 0
    batches = stacked_windows(windows, most_tokens=LOGIT_BUDGET // (vocab_size * world.size))
    with evaluating(model), torch.no_grad(), nullcontext() if _is_sharded(model) else composed_weights(model):
        for batch, scored, counts in _shared_batches(batches, world):
            tokens = torch.from_numpy(batch).to(device)
            with autocast(precision, device):
                logits = model(input_ids=tokens[:, :-1]).logits[:, -scored:]
            if counts:
                targets = tokens[:, -scored:].flatten()
                total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
                scored_tokens += targets.numel()
    total, scored_sum = world.sum([total, scored_tokens], device)
    return total, int(scored_sum)


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _shared_batches(batches: Iterable[tuple[np.ndarray, int]], world: World) -> Iterator[tuple[np.ndarray, int, bool]]:
    """This process's batches, each with whether it counts.

    In the last round some processes have none left and repeat what another one scores: the forwards of a sharded model
    are done by all together.
    """
    remaining = iter(batches)
    while round_of_all := list(islice(remaining, world.size)):
        place = min(world.rank, len(round_of_all) - 1)
        yield *round_of_all[place], place == world.rank


def stacked_windows(
    windows: Iterable[tuple[np.ndarray, int]], *, most: int | None = None, most_tokens: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Consecutive windows of one length and one number of scored tokens, together, (windows, tokens).

    Args:
        windows: Each with how many of its last tokens are scored.
        most: Windows at once; None is no limit.
        most_tokens: Of them together, but one window at least; None is no limit.
    """
    for (length, scored), group in groupby(windows, key=lambda window: (len(window[0]), window[1])):
        by_tokens = None if most_tokens is None else max(1, most_tokens // length)
        at_once = min((limit for limit in (most, by_tokens) if limit is not None), default=None)
        own = (window for window, _ in group)
        while waiting := list(islice(own, at_once)):
            yield np.stack(waiting), scored
