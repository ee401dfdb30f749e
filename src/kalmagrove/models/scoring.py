"""The nats that a causal language model spends on token windows; for our models and for any of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import autocast

LOGIT_BUDGET = 1 << 25
"""Logits that are made at once."""


def nats_of_windows(
    model: nn.Module,
    windows: Iterable[tuple[np.ndarray, int]],
    *,
    vocab_size: int,
    device: torch.device,
    precision: Literal["bf16", "fp32"],
) -> tuple[float, int]:
    """Sum of nats over windows, and the number of tokens that were scored.

    Args:
        model: Called as ``model(input_ids=...)``; gives ``logits``. Its mode (training or not) is kept.
        windows: (tokens, scored) pairs: the last ``scored`` tokens count, the others are context.
        vocab_size: Of the logits; sets how many windows go through at once.
        device: Of the model.
        precision: Of the products; the softmax is float32.
    """
    total, scored_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), composed_weights(model):
            for batch, scored in _equal_batches(windows, vocab_size):
                tokens = torch.from_numpy(batch).to(device)
                with autocast(precision, device):
                    logits = model(input_ids=tokens[:, :-1]).logits[:, -scored:]
                targets = tokens[:, -scored:].flatten()
                total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
                scored_tokens += targets.numel()
    finally:
        model.train(was_training)
    return total, scored_tokens


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
