"""How many steps fit a time budget, measured from warm-up steps of every model."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from kalmagrove.comparison.config import CompareConfig
from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import UsageError
from kalmagrove.quantities import parse_duration
from kalmagrove.training.run import TrainingRun
from kalmagrove.world import ALONE, World

WARMUP_STEPS = 3
MEASURED_STEPS = 10  # One of Kalma's refreshes falls into any ten steps.
TRAINING_PART = 0.8
"""Part of a budget that goes into training steps; the rest is for evaluations, saving and the report."""


def planned_steps(
    config: CompareConfig, data: TrainingData, *, say: Callable[[str], None], world: World = ALONE
) -> int:
    """Steps of each run: those of ``loop.tokens``, or those that the budget is enough for.

    Raises:
        UsageError: The budget is not enough for ten steps, or an option does not fit a model or the data.
    """
    if config.budget is None:
        steps = config.loop.total_steps
        for contestant in config.contestants():
            train_config = config.train_config(contestant, seed=config.seed_list()[0], steps=steps)
            TrainingRun(train_config, data, world).loss.close()
        return steps
    say("measuring the speed of a few steps")
    seconds = seconds_per_round(config, data, world)
    rounds = config.trials + len(config.seed_list()) - 1
    steps = int(parse_duration(config.budget) * TRAINING_PART / seconds / rounds)
    if steps < 10:
        needed = 10 * seconds * rounds / TRAINING_PART
        raise UsageError(f"budget {config.budget} is too short for 10 steps of each model; give at least {needed:.0f}s")
    say(f"a step of all models takes {seconds:.2f} s: {config.budget} is enough for {steps} steps of each")
    return steps


def seconds_per_round(config: CompareConfig, data: TrainingData, world: World = ALONE) -> float:
    """Mean time of one step of every model, one after the other."""
    seed = config.seed_list()[0]
    steps = WARMUP_STEPS + MEASURED_STEPS
    runs = [
        TrainingRun(config.train_config(contestant, seed=seed, steps=steps), data, world)
        for contestant in config.contestants()
    ]
    try:
        rounds = [sum(run.train_step().seconds for run in runs) for _ in range(steps)]
    finally:
        for run in runs:
            run.loss.close()
    return statistics.fmean(rounds[WARMUP_STEPS:])
