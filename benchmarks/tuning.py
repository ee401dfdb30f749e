"""Learning rates tuned alike: the same first trials for everyone, and further ones while the best is at the edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from kalmagrove.training.rate_trials import MOST_FURTHER_TRIALS, best_scale, further_trial

Job = TypeVar("Job")
Key = TypeVar("Key")
Record = dict[str, Any]


class Tuned(NamedTuple):
    """The best factor, and whether no worse one was tried on one of its sides."""

    factor: float
    is_at_edge: bool


def tune(
    run_all: Callable[[list[Job]], list[Record]],
    trials: Mapping[Key, Callable[[float], Job]],
    loss_of: Callable[[Record], float],
    first: Sequence[float],
    *,
    step: float = 2.0,
) -> dict[Key, Tuned]:
    """The best factor of the usual learning rates for each key.

    Args:
        run_all: Runs jobs and returns their records in order.
        trials: Makes the job of each key from a factor.
        loss_of: What is made small, of the validation part; infinity or NaN where a run diverged.
        first: Factors that everyone tries; a best one at the edge is followed by up to `MOST_FURTHER_TRIALS` others.
        step: Between these.
    """
    losses: dict[Key, dict[float, float]] = {key: {} for key in trials}

    def attempt(pairs: list[tuple[Key, float]]) -> None:
        for (key, factor), record in zip(pairs, run_all([trials[k](f) for k, f in pairs]), strict=True):
            loss = loss_of(record)
            losses[key][factor] = math.inf if math.isnan(loss) else loss

    attempt([(key, factor) for key in trials for factor in first])
    for _ in range(MOST_FURTHER_TRIALS):
        found = {key: further_trial(tried, step=step) for key, tried in losses.items()}
        further = [(key, factor) for key, factor in found.items() if factor is not None]
        if not further:
            break
        attempt(further)
    return {key: Tuned(best_scale(tried), further_trial(tried, step=step) is not None) for key, tried in losses.items()}
