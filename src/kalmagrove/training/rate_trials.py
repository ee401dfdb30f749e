"""Which factors on a learning rate are tried, and which of them is best."""

from __future__ import annotations

from collections.abc import Mapping

MOST_FURTHER_TRIALS = 4
"""Learning rates beyond those that were asked for, while the best is at the edge of what was tried."""


def trial_scales(trials: int) -> list[float]:
    """Factors on the learning rates that are tried: powers of two around one."""
    return [2.0 ** (index - trials // 2) for index in range(trials)]


def best_scale(losses: Mapping[float, float]) -> float:
    """The factor with the lowest loss; where all diverged the smallest, below which others may not."""
    return min(losses, key=lambda scale: (losses[scale], scale))


def further_trial(losses: Mapping[float, float], *, step: float = 2.0, margin: float = 0.0) -> float | None:
    """The factor to try next while the best is the smallest or the largest of those tried; None where it lies inside.

    Args:
        losses: By factor; infinity where the trial diverged.
        step: Between neighbours.
        margin: Nats by which both ends must be worse than the best.
    """
    scales = sorted(losses)
    limit = min(losses.values()) + margin
    if losses[scales[0]] <= limit:
        return scales[0] / step
    return scales[-1] * step if losses[scales[-1]] <= limit else None


def untried_neighbour(losses: Mapping[float, float], step: float) -> float | None:
    """Beside the best factor so far, the lower one first: where it is better, the other one need not be tried."""
    best = best_scale(losses)
    return next((factor for factor in (best / step, best * step) if factor not in losses), None)
