"""Trains the runs of a comparison by several workers, each one run at a time; their times say nothing."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalmagrove.comparison.config import CompareConfig
from kalmagrove.comparison.runs import PlannedRun, Say, conclude, open_session
from kalmagrove.data.training_data import TrainingData, open_training_data
from kalmagrove.training.checkpoint import named_steps
from kalmagrove.training.run import StepResult, TrainingDiverged
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.tracking import ProgressBar
from kalmagrove.training.trainer import describe_run
from kalmagrove.training.worker_processes import Send, loop_of_worker, run_workers, train_to_the_end

SECONDS_BETWEEN_MESSAGES = 1.0


def train_side_by_side(
    config: CompareConfig,
    data: TrainingData,
    runs: Sequence[PlannedRun],
    *,
    workers: int,
    description: str,
    describe: bool,
    say: Say,
) -> list[float]:
    """Trains runs, or goes on with them, as many at a time as there are workers.

    Args:
        config: The comparison.
        data: Its data, which each worker opens anew.
        runs: What is trained, of any seeds.
        workers: Processes; each takes the next run when it has done one.
        description: Of the progress bar.
        describe: Whether the models are described, once each.
        say: Told about each run.

    Returns:
        Validation losses in nats a token, infinity for a run that diverged.

    Raises:
        Interrupted: A signal came; every run was saved.
        KalmaGroveError: A run cannot be done, or a worker was killed.
    """
    losses: dict[int, float] = {}
    names = [run.name for run in runs]
    described = frozenset(names.index(name) for name in names) if describe else frozenset()
    counter: Any = multiprocessing.get_context("spawn").Value("i", 0)
    done = {index: _saved_step(run) for index, run in enumerate(runs)}
    total = sum(run.steps for run in runs)
    with ProgressBar(total, description=description, start_step=sum(done.values())) as progress:
        shown = _Progress(progress, done)
        run_workers(
            _work,
            (config, data.folder, list(runs), described, counter),
            workers=min(workers, len(runs)),
            sharing_threads=workers,
            heard={"line": say, "loss": lambda found: losses.update([found]), "step": shown.update},
        )
    return [losses[index] for index in range(len(runs))]


class _Progress:
    """Adds up where the workers are."""

    def __init__(self, progress: ProgressBar, done: dict[int, int]) -> None:
        self._progress, self._steps = progress, done
        self._speeds: dict[int, float] = {}

    def update(self, message: tuple[int, int, float, float]) -> None:
        """A run's index, its step, its loss, and its tokens a second: 0 when it is done."""
        index, step, loss, speed = message
        self._steps[index], self._speeds[index] = step, speed
        if math.isfinite(loss):
            self._progress.update(sum(self._steps.values()), loss, sum(self._speeds.values()))


def _saved_step(run: PlannedRun) -> int:
    return max(named_steps(RunFolder(run.path).checkpoints_path), default=0)


def _work(
    place: int,
    send: Send,
    config: CompareConfig,
    data_folder: Path,
    runs: list[PlannedRun],
    described: frozenset[int],
    counter: Any,
) -> None:
    """Takes the next run until none is left."""
    data = open_training_data(data_folder, verify=False)
    config = replace(config, loop=loop_of_worker(config.loop, place))
    with StopRequest() as stop:
        while stop.number is None and (index := _next(counter)) < len(runs):
            with closing(open_session(config, data, runs[index], say=lambda line: send("line", line))) as session:
                if index in described:
                    send("line", "\n".join(describe_run(session.run)))
                _train(session, index, stop, send)
                loss = conclude(runs[index], session, lambda line: send("line", line))
                send("step", (index, session.run.total_steps, loss, 0.0))
                send("loss", (index, loss))
    if stop.number is not None:
        raise Interrupted(stop.number, "stopped between two runs; the same command goes on from there")


def _next(counter: Any) -> int:
    with counter.get_lock():
        counter.value += 1
        return int(counter.value) - 1


def _train(session: TrainingSession, index: int, stop: StopRequest, send: Send) -> None:
    """All steps that are left, until the last one, a signal, or a loss that is not a number."""
    said = 0.0

    def tell(result: StepResult) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_MESSAGES:
            said = time.monotonic()
            speed = session.run.config.loop.tokens_per_step / result.seconds
            send("step", (index, session.run.step, result.loss, speed))

    with suppress(TrainingDiverged):
        train_to_the_end(session, stop, tell)
