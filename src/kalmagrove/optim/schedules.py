"""Learning-rate schedules: the factor of the peak at each step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "wsd", "constant"]


def learning_rate_factor(schedule: Schedule, step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor of the peak learning rate at ``step`` (from 0), between 0 and 1.

    After a linear warm-up: "linear" and "cosine" fall to zero at ``total_steps``; "wsd" stays at the peak and falls
    linearly over the last fifth (warm-up, stable, decay); "constant" stays.

    Raises:
        ValueError: The schedule is unknown.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    remaining = max(0, total_steps - step) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return remaining
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    if schedule == "wsd":
        return min(1.0, max(0, total_steps - step) / max(1, total_steps // 5))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"schedule must be linear, cosine, wsd or constant, got {schedule!r}")
