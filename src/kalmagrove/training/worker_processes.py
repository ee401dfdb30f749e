"""Several processes on one machine that each train runs of their own, and the one that waits for them."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.config import LoopConfig
from kalmagrove.training.environment import keep_freed_memory, usable_cores
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest

SECONDS_BETWEEN_LOOKS = 0.5
Send = Callable[[str, Any], None]


class Work(Protocol):
    """What a worker does: a function of a module, so that a new process can find it."""

    def __call__(self, place: int, workers: int, send: Send, /, *arguments: Any) -> None: ...


def default_workers() -> int:
    """One for each GPU, else one for each core, since small models use one core best."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return usable_cores()


def loop_of_worker(loop: LoopConfig, place: int) -> LoopConfig:
    """The same loop on this worker's GPU, where there are several."""
    gpus = torch.cuda.device_count()
    return replace(loop, device=f"cuda:{place % gpus}") if gpus > 1 and loop.device == "auto" else loop


def run_workers(
    work: Work,
    arguments: Sequence[Any],
    *,
    workers: int,
    heard: Mapping[str, Callable[[Any], None]],
    looked: Callable[[], None] = lambda: None,
) -> None:
    """Starts the workers and waits until all have ended.

    Args:
        work: Called in each process with its number, the number of all, and a function that sends this process a
            message of a kind.
        arguments: What else it gets; everything must be picklable.
        workers: How many.
        heard: What to do with a message, by its kind.
        looked: Called now and then while they work.

    Raises:
        Interrupted: A signal came; every worker was asked to save and has ended.
        KalmaGroveError: What a worker raised, or that one was killed.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    processes = [
        context.Process(target=_worker, args=(work, place, workers, messages, arguments)) for place in range(workers)
    ]
    with StopRequest() as stop:
        for process in processes:
            process.start()
        try:
            failure = _wait(processes, messages, heard, looked, stop)
        finally:
            _end(processes)
    if stop.number is not None:
        raise Interrupted(stop.number, "stopped and saved every run; the same command goes on from there")
    if failure is not None:
        raise KalmaGroveError(failure)


def _wait(
    processes: list[Any],
    messages: Any,
    heard: Mapping[str, Callable[[Any], None]],
    looked: Callable[[], None],
    stop: StopRequest,
) -> str | None:
    """Hears what the workers send until all have ended; returns the first error."""
    while True:
        ended = not any(process.is_alive() for process in processes)
        with suppress(queue.Empty):
            while True:
                kind, content = messages.get(timeout=0.0 if ended else SECONDS_BETWEEN_LOOKS)
                if kind == "error":
                    return str(content)
                heard[kind](content)
        killed = next((p for p in processes if p.exitcode is not None and p.exitcode < 0), None)
        if killed is not None and stop.number is None:
            reason = " (out of memory?)" if killed.exitcode == -signal.SIGKILL else ""
            killer = f"a worker was killed by signal {-killed.exitcode}{reason}"
            return f"{killer}; the same command goes on, perhaps with fewer --workers"
        if ended or stop.number is not None:
            return None
        looked()


def _end(processes: list[Any]) -> None:
    """Workers that still run save and end."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join()


def _worker(work: Work, place: int, workers: int, messages: Any, arguments: Sequence[Any]) -> None:
    keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    with _told(messages):
        work(place, workers, lambda kind, content: messages.put((kind, content)), *arguments)


@contextmanager
def _told(messages: Any) -> Iterator[None]:
    """Ends the process as its command would, and sends the error that ended it."""
    try:
        yield
    except Interrupted as error:
        sys.exit(error.exit_code)
    except (KalmaGroveError, OSError) as error:
        messages.put(("error", str(error)))
        sys.exit(1)


def stop_where_asked(session: TrainingSession, stop: StopRequest) -> None:
    """Saves a run that is under way and ends, where a signal came.

    Raises:
        Interrupted: One came.
    """
    if stop.number is not None and not session.run.done:
        session.save()
        session.wait_for_saving()
        raise Interrupted(stop.number, f"stopped and saved {session.folder.path}; the same command goes on")
