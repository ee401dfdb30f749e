"""Jobs side by side, one thread each, with a line of progress for each result."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Job = TypeVar("Job")
Record = TypeVar("Record")


@contextmanager
def workers(
    run: Callable[[Job], Record], describe: Callable[[Record], str], count: int
) -> Iterator[Callable[[list[Job]], list[Record]]]:
    """Gives a function that runs a list of jobs on ``count`` processes and returns their records in order."""
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:

        def run_all(jobs: list[Job]) -> list[Record]:
            records = []
            for record in pool.map(run, jobs):
                records.append(record)
                print(describe(record), flush=True)
            return records

        yield run_all
