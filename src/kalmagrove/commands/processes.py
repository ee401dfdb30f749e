"""Commands that several processes do together: started by ``--nproc`` or torchrun, they speak with one voice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import say
from kalmagrove.errors import UsageError

if TYPE_CHECKING:
    from kalmagrove.world import World


def add_nproc(parser: ArgumentParser) -> None:
    """The flag ``--nproc``."""
    parser.add_argument("--nproc", type=int, default=1, help="processes on this machine, such as one for each GPU")


def started_processes(command: str, words: Sequence[str], nproc: int) -> bool:
    """Whether the command was done by several processes, which this one started and waited for.

    Raises:
        UsageError: ``nproc`` is less than 1.
        ProcessesFailed: One of them failed.
    """
    if nproc < 1:
        raise UsageError(f"--nproc must be at least 1, got {nproc}")
    from kalmagrove.world import world_of_environment

    if nproc == 1 or world_of_environment().size > 1:
        return False
    from kalmagrove.training.launch import run_in_processes

    run_in_processes([command, *words], nproc)
    return True


def check_worker_count(workers: int | None) -> None:
    """Whether ``--workers`` was left out or is a number of processes.

    Raises:
        UsageError: It is less than 1.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")


@contextmanager
def together(device: str) -> Iterator[tuple[World, Callable[[str], None]]]:
    """The processes of this command, and how to speak: only the first of them says anything."""
    from kalmagrove.world import joined_world

    with joined_world(device) as world, _one_voice(world):
        yield world, say if world.is_first else _nothing


def _nothing(line: str) -> None:
    """Says nothing, in the processes beside the first."""


@contextmanager
def _one_voice(world: World) -> Iterator[None]:
    """The first process says for all what happened to all; what only one of them knows, it says in one line."""
    from kalmagrove.training.run import TrainingDiverged
    from kalmagrove.training.signals import Interrupted
    from kalmagrove.training.trainer import ProcessLost
    from kalmagrove.world import is_lost_connection

    try:
        yield
    except (Interrupted, UsageError, TrainingDiverged) as error:
        if world.is_first:
            raise
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise ProcessLost(f"process {world.rank} lost the connection to another one") from error
