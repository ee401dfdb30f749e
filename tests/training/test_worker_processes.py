"""Processes with runs of their own: what they send is heard, and no end of one goes unnoticed."""

import inspect
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.worker_processes import Send, run_workers


def count(place: int, send: Send, most: int) -> None:
    for number in range(most):
        send("number", (place, number))


def chatter(place: int, send: Send) -> None:
    """Sends without a pause that the other side could wait for, until it is told to stop."""
    with StopRequest() as stop:
        while stop.number is None:
            send("number", (place, 0))
            time.sleep(0.01)
    raise Interrupted(stop.number, "stopped")


def fail(place: int, send: Send, kind: str) -> None:
    if place == 1 and kind == "error":
        raise KalmaGroveError("the run folder is gone")
    if place == 1 and kind == "bug":
        raise RuntimeError("a tensor is on the moon")
    if place == 1 and kind == "exit":
        os._exit(3)
    if place == 1 and kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    chatter(place, send)


def hold_the_queue(place: int, send: Send, other_works: Path) -> None:
    """The first is killed in the middle of a message, as far as the others can see."""
    if place == 0:
        while not other_works.exists():
            time.sleep(0.01)
        inspect.getclosurevars(send).nonlocals["messages"]._wlock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    with StopRequest() as stop:
        other_works.touch()
        while stop.number is None:
            send("number", place)
            time.sleep(0.01)


def test_a_worker_that_dies_while_it_sends_does_not_hold_the_others(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match="killed by signal 9"):
        run_workers(hold_the_queue, (tmp_path / "works",), workers=2, heard={"number": lambda _: None})


def threads(place: int, send: Send) -> None:
    send("number", torch.get_num_threads())


def test_threads_are_divided_by_all_workers_where_fewer_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    heard: list[int] = []
    run_workers(threads, (), workers=1, sharing_threads=4, heard={"number": heard.append})
    run_workers(threads, (), workers=1, heard={"number": heard.append})
    assert heard[0] == max(1, heard[1] // 4)


def test_everything_that_workers_send_is_heard() -> None:
    heard: list[Any] = []
    run_workers(count, (3000,), workers=2, heard={"number": heard.append})
    assert sorted(heard) == [(place, number) for place in range(2) for number in range(3000)]


def test_a_signal_is_heard_among_messages_that_never_end() -> None:
    begun = threading.Event()

    def signal_when_begun() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_when_begun, daemon=True).start()
    with pytest.raises(Interrupted, match="the same command goes on"):
        run_workers(chatter, (), workers=3, heard={"number": lambda _: begun.set()})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("error", "^the run folder is gone$"),
        ("bug", "a worker failed: RuntimeError: a tensor is on the moon"),
        ("exit", "a worker ended with exit code 3"),
        ("kill", "killed by signal 9 .out of memory.*fewer --workers"),
    ],
)
def test_the_end_of_one_worker_ends_all(kind: str, message: str) -> None:
    with pytest.raises(KalmaGroveError, match=message):
        run_workers(fail, (kind,), workers=2, heard={"number": lambda _: None})
