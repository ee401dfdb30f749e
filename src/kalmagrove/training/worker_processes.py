"""Several processes on one machine that each train runs of their own, and the one that waits for them."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Thread
from typing import Any, Protocol

import torch

from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.config import LoopConfig
from kalmagrove.training.environment import keep_freed_memory, usable_cores
from kalmagrove.training.run import StepResult
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest

SECONDS_BETWEEN_LOOKS = 0.5
MOST_MESSAGES_AT_A_TIME = 1000
"""After so many the processes are looked at again, however fast messages come."""
Send = Callable[[str, Any], None]


class Work(Protocol):
    """What a worker does: a function of a module, so that a new process can find it."""

    def __call__(self, place: int, send: Send, /, *arguments: Any) -> None: ...


def default_workers() -> int:
    """One for each GPU, else one for each core, since small models use one core best."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return usable_cores()


def loop_of_worker(loop: LoopConfig, place: int) -> LoopConfig:
    """The same loop on this worker's GPU, where there are several."""
    gpus = torch.cuda.device_count()
    return replace(loop, device=f"cuda:{place % gpus}") if gpus > 1 and loop.device in ("auto", "cuda") else loop


def run_workers(
    work: Work,
    arguments: Sequence[Any],
    *,
    workers: int,
    heard: Mapping[str, Callable[[Any], None]],
    looked: Callable[[], None] = lambda: None,
    sharing_threads: int | None = None,
) -> None:
    """Starts the workers and waits until all have ended.

    Args:
        work: Called in each process with its number and a function that sends this process a message of a kind.
        arguments: What else it gets; everything must be picklable.
        workers: How many.
        heard: What to do with a message, by its kind.
        looked: Called now and then while they work.
        sharing_threads: Workers that this machine's threads are divided by; None is all of these. More where fewer
            runs are left than there are workers: sums over another number of threads are rounded otherwise.

    Raises:
        Interrupted: A signal came; every worker was asked to save and has ended.
        KalmaGroveError: What a worker raised, or that one ended in another way.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    over = context.Event()
    processes = [
        context.Process(target=_worker, args=(work, place, sharing_threads or workers, messages, over, arguments))
        for place in range(workers)
    ]
    with StopRequest() as stop:
        try:
            for process in processes:
                process.start()
            failure = _wait(processes, messages, heard, looked, stop)
        finally:
            over.set()
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
        # Before the messages are read: what a process sent before its end is then among them.
        ended = not any(process.is_alive() for process in processes)
        lost = next((process for process in processes if process.exitcode not in (None, 0)), None)
        arrived = _arrived(messages, 0.0 if ended or lost else SECONDS_BETWEEN_LOOKS)
        for kind, content in arrived:
            if kind == "error":
                return str(content)
            heard[kind](content)
        if stop.number is not None:
            return None
        if lost is not None:
            return _describe_loss(lost.exitcode)
        if ended and not arrived:
            return None
        looked()


def _arrived(messages: Any, seconds: float) -> list[tuple[str, Any]]:
    """The messages that are there when the first has come; those that come meanwhile might never end."""
    found: list[tuple[str, Any]] = []
    with suppress(queue.Empty):
        found.append(messages.get(timeout=seconds))
        while len(found) < MOST_MESSAGES_AT_A_TIME:
            found.append(messages.get_nowait())
    return found


def _describe_loss(exit_code: int) -> str:
    if exit_code > 0:
        return f"a worker ended with exit code {exit_code}; the same command goes on"
    reason = " (out of memory?)" if exit_code == -signal.SIGKILL else ""
    return f"a worker was killed by signal {-exit_code}{reason}; the same command goes on, perhaps with fewer --workers"


def _end(processes: list[Any]) -> None:
    """Workers that still run save and end."""
    started = [process for process in processes if process.pid is not None]
    for process in started:
        if process.is_alive():
            process.terminate()
    for process in started:
        process.join()


def _worker(work: Work, place: int, sharing_threads: int, messages: Any, over: Any, arguments: Sequence[Any]) -> None:
    keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // sharing_threads))
    Thread(target=_end_without_parent, args=(messages,), daemon=True).start()
    try:
        with _told(messages):
            work(place, lambda kind, content: messages.put((kind, content)), *arguments)
    finally:
        if over.is_set():
            # Nobody hears what is left, and a worker that was killed while it sent may hold the queue for ever.
            messages.cancel_join_thread()


def _end_without_parent(messages: Any) -> None:
    """Saves and ends where nobody waits any more: a worker that trained on would hold its run's folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # Nobody reads them, and a full pipe would hold this process for ever.
        messages.cancel_join_thread()
        signal.raise_signal(signal.SIGTERM)


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
    except torch.OutOfMemoryError as error:
        messages.put(("error", f"a worker ran out of memory, so give fewer --workers: {str(error).splitlines()[0]}"))
        sys.exit(1)
    except Exception as error:
        messages.put(("error", f"a worker failed: {type(error).__name__}: {error}"))
        raise


def train_to_the_end(
    session: TrainingSession, stop: StopRequest, stepped: Callable[[StepResult], None] = lambda _: None
) -> None:
    """All steps of a worker's run that are left.

    Args:
        session: The run.
        stop: Where a signal came, the run is saved after the step that is under way.
        stepped: Told about each step.

    Raises:
        Interrupted: A signal came.
        TrainingDiverged: The loss is not a number.
    """
    while not session.run.done:
        stepped(session.advance())
        if stop.number is not None and not session.run.done:
            session.save()
            session.wait_for_saving()
            raise Interrupted(stop.number, f"stopped and saved {session.folder.path}; the same command goes on")
