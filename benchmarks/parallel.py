"""Jobs side by side, one thread each, with a line of progress for each result."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from kalmagrove.files import write_json_atomic
from kalmagrove.training.environment import keep_freed_memory
from kalmagrove.training.run import TrainingDiverged, TrainingRun

Job = TypeVar("Job")
Record = TypeVar("Record")


@contextmanager
def workers(
    run: Callable[[Job], Record], describe: Callable[[Record], str], count: int
) -> Iterator[Callable[[list[Job]], list[Record]]]:
    """Gives a function that runs a list of jobs on ``count`` processes and returns their records in order."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn, initializer=_begin) as pool:

        def run_all(jobs: list[Job]) -> list[Record]:
            records = []
            for record in pool.map(run, jobs):
                records.append(record)
                print(describe(record), flush=True)
            return records

        yield run_all


def _begin() -> None:
    """One thread a worker; and a benchmark that is killed leaves none behind that would slow the next one."""
    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stored(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record in a file: read where it exists, else made on one thread and written."""
    if not path.exists():
        torch.set_num_threads(1)
        keep_freed_memory()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, make())
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return record


def diverged_in_training(run: TrainingRun, after_step: Callable[[], None] = lambda: None) -> bool:
    """Trains a run to its end, or until it diverges, and says which."""
    while not run.done:
        try:
            run.train_step()
        except TrainingDiverged:
            after_step()
            return True
        after_step()
    return False
