"""Times of training steps, measured apart from the training where runs stood side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kalmagrove.comparison.config import CompareConfig, Rates
from kalmagrove.data.training_data import TrainingData
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingDiverged, TrainingRun
from kalmagrove.training.signals import Interrupted, StopRequest

TIMING_WARMUP = 10
BLOCK = 10
"""Steps whose times are added up: some optimisers do more work every tenth step."""
TIMED_STEPS = 100


def time_in_turns(
    config: CompareConfig, data: TrainingData, rates: Mapping[str, Rates], *, steps: int
) -> dict[str, Any]:
    """Trains every contestant anew for some steps that alternate in this process, with nothing beside them.

    Args:
        config: The comparison.
        data: Its data.
        rates: Factors on the learning rates by contestant.
        steps: Of the comparison's runs, whose first ones are done again.

    Returns:
        ``step_seconds``, by contestant those of each step behind the warm-up, none where it diverged, and the
        ``environment`` of the machine.

    Raises:
        Interrupted: A signal came.
    """
    timed = TIMING_WARMUP + TIMED_STEPS
    runs = {
        contestant.name: TrainingRun(
            config.train_config(
                contestant, rates=rates[contestant.name], seed=config.seed_list()[0], steps=max(steps, timed)
            ),
            data,
        )
        for contestant in config.contestants()
    }
    seconds = _take_turns(runs, timed)
    return {
        "step_seconds": {name: times[TIMING_WARMUP:] for name, times in seconds.items()},
        "environment": describe_environment(),
    }


def _take_turns(runs: Mapping[str, TrainingRun], steps: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    active = dict(runs)
    with StopRequest() as stop:
        for _ in range(steps):
            for name, run in list(active.items()):
                try:
                    seconds[name].append(run.train_step().seconds)
                except TrainingDiverged:
                    del active[name]
                    seconds[name].clear()
                if stop.number is not None:
                    raise Interrupted(stop.number, "stopped while steps were timed; the same command does it again")
    return seconds
