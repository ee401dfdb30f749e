"""Trains several runs step by step in turns, in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from kalmagrove.comparison.config import CompareConfig
from kalmagrove.comparison.runs import PlannedRun, Say, conclude, open_session
from kalmagrove.data.training_data import TrainingData
from kalmagrove.training.run import TrainingDiverged
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.tracking import ProgressBar
from kalmagrove.training.trainer import describe_run
from kalmagrove.world import World


def train_in_turns(
    config: CompareConfig,
    data: TrainingData,
    runs: Sequence[PlannedRun],
    *,
    description: str,
    describe: bool,
    say: Say,
    world: World,
) -> list[float]:
    """Trains runs of one seed, or goes on with them.

    Args:
        config: The comparison.
        data: Its data.
        runs: What is trained.
        description: Of the progress bar.
        describe: Whether the models are described first.
        say: Told about each run.
        world: The processes that train every model together.

    Returns:
        Validation losses in nats a token, infinity for a run that diverged.

    Raises:
        Interrupted: A signal came; every run was saved.
    """
    with ExitStack() as stack:
        sessions = []
        for run in runs:
            session = open_session(config, data, run, say=say, world=world)
            stack.callback(session.close)
            sessions.append(session)
        for session in sessions if describe else []:
            for line in describe_run(session.run):
                say(line)
        _train_together(sessions, description)
        return [conclude(run, session, say) for run, session in zip(runs, sessions, strict=True)]


def _train_together(sessions: Sequence[TrainingSession], description: str) -> None:
    """Interleaves the steps, so that every model meets the same moments of a noisy machine.

    A run whose loss is not finite stays where it is, and the others go on.
    """
    active = [session for session in sessions if not session.run.done and not session.finished]
    if not active:
        return
    total = sum(session.run.total_steps for session in sessions)
    start = sum(session.steps_done for session in sessions)
    first = sessions[0]
    stream = sys.stderr if first.world.is_first else io.StringIO()
    with (
        StopRequest() as stop,
        ProgressBar(total, description=description, start_step=start, stream=stream) as progress,
    ):
        done = start
        while active:
            # The run that is behind goes first; in step, they alternate.
            session = min(active, key=lambda s: s.run.step)
            try:
                result = session.advance()
            except TrainingDiverged:
                active.remove(session)
                continue
            if session.run.done:
                active.remove(session)
            speed = session.run.config.loop.tokens_per_step / result.seconds
            done += 1
            progress.update(done, result.loss, speed)
            number = int(first.world.largest([stop.number or 0], first.run.device)[0])
            if number:
                _save_all(sessions)
                first.world.wait()
                raise Interrupted(number, "stopped and saved every run; the same command goes on from there")


def _save_all(sessions: Sequence[TrainingSession]) -> None:
    for session in sessions:
        if not session.finished and session.run.step != session.saved_step:
            session.save()
            session.wait_for_saving()
