"""The nats that a causal language model spends on token windows; for our models and for any of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import autocast
from kalmagrove.world import ALONE, World

LOGIT_BUDGET = 1 << 25
"""Logits that are made at once."""


def nats_of_windows(
    model: nn.Module,
    windows: Iterable[tuple[np.ndarray, int]],
    *,
    vocab_size: int,
    device: torch.device,
    precision: Literal["bf16", "fp32"],
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
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if _is_sharded(model) else composed_weights(model):
            for batch, scored, counts in _shared_batches(_equal_batches(windows, vocab_size * world.size), world):
                tokens = torch.from_numpy(batch).to(device)
                with autocast(precision, device):
                    logits = model(input_ids=tokens[:, :-1]).logits[:, -scored:]
                if counts:
                    targets = tokens[:, -scored:].flatten()
                    total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
                    scored_tokens += targets.numel()
    finally:
        model.train(was_training)
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


def _equal_batches(windows: Iterable[tuple[np.ndarray, int]], vocab_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Consecutive windows of one length and one number of scored tokens, stacked."""
    waiting: list[np.ndarray] = []
    shape: tuple[int, int] | None = None
    for window, scored in windows:
        most = max(1, LOGIT_BUDGET // (len(window) * vocab_size))
        if waiting and (shape != (len(window), scored) or len(waiting) >= most):
            yield np.stack(waiting), shape[1] if shape else scored
            waiting = []
        shape = (len(window), scored)
        waiting.append(window)
    if waiting and shape is not None:
        yield np.stack(waiting), shape[1]
