"""Spikes of a training loss: steps that lie far above what the steps before them were."""

from __future__ import annotations

from collections.abc import Sequence

SPIKE = 6.0
"""A step's loss is a spike where it lies so many mean deviations above the running mean of the steps before it."""
MEMORY = 0.95
WARMUP = 50
"""Steps whose running mean is not yet one."""


def spikes_in_a_thousand(losses: Sequence[float]) -> float | None:
    """Spikes in a thousand steps behind the warm-up; None where there are no such steps.

    Args:
        losses: Of every step, in nats a token.
    """
    if len(losses) <= WARMUP:
        return None
    mean, deviation, spikes = losses[0], 0.0, 0
    for step, loss in enumerate(losses):
        if step >= WARMUP:
            spikes += loss > mean + SPIKE * deviation
        deviation = MEMORY * deviation + (1 - MEMORY) * abs(loss - mean)
        mean = MEMORY * mean + (1 - MEMORY) * loss
    return 1000 * spikes / (len(losses) - WARMUP)
