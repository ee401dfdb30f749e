"""Times of training steps, measured apart from the training where runs stood side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kalmagrove.comparison.config import CompareConfig
from kalmagrove.data.training_data import TrainingData
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingRun

TIMING_WARMUP = 10
BLOCK = 10
"""Steps whose times are added up: some optimisers do more work every tenth step."""
TIMED_STEPS = 100


def time_in_turns(config: CompareConfig, data: TrainingData, scales: Mapping[str, float]) -> dict[str, Any]:
    """Trains every contestant anew for some steps that alternate in this process, with nothing beside them.

    Args:
        config: The comparison.
        data: Its data.
        scales: Factors on the learning rates by contestant, so that the steps are like those of the runs.

    Returns:
        ``step_seconds``, by contestant those of each step behind the warm-up, and the ``environment`` of the machine.
    """
    steps = TIMING_WARMUP + TIMED_STEPS
    runs = {
        contestant.name: TrainingRun(
            config.train_config(contestant, scale=scales[contestant.name], seed=config.seed_list()[0], steps=steps),
            data,
        )
        for contestant in config.contestants()
    }
    try:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(steps):
            for name, run in runs.items():
                seconds[name].append(run.train_step().seconds)
    finally:
        for run in runs.values():
            run.loss.close()
    return {
        "step_seconds": {name: times[TIMING_WARMUP:] for name, times in seconds.items()},
        "environment": describe_environment(),
    }
