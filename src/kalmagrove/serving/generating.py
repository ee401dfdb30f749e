"""From a request to its pieces: answers take turns in one thread, a token each, and end when nobody reads them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import anyio
from anyio import CapacityLimiter
from starlette.types import Receive

from kalmagrove.evaluation.generation import OpenModel, Piece, Sampling, generate
from kalmagrove.serving.slots import Slots

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """An answer to be generated.

    Attributes:
        opened: By which model.
        prompt: Tokens.
        sampling: How tokens are chosen.
    """

    opened: OpenModel
    prompt: list[int]
    sampling: Sampling


@asynccontextmanager
async def pieces_of(job: Job, slots: Slots, steps: CapacityLimiter) -> AsyncIterator[AsyncIterator[Piece]]:
    """The pieces of an answer, once it is its turn to begin; with the context the generation ends.

    Args:
        job: What is generated.
        slots: Of the server.
        steps: Lets one forward through at a time, in the order in which they come.

    Raises:
        RequestError: The server stops before the last piece.
    """
    await slots.begin()
    try:
        async with aclosing(_pieces(job, slots, steps)) as pieces:
            yield pieces
    finally:
        slots.leave()


async def _pieces(job: Job, slots: Slots, steps: CapacityLimiter) -> AsyncGenerator[Piece, None]:
    generated = generate(job.opened, job.prompt, job.sampling)
    try:
        # A forward that has begun is always waited for, so that the iterator is never closed while it runs.
        while (piece := await anyio.to_thread.run_sync(next, generated, None, limiter=steps)) is not None:
            yield piece
            slots.check()
    finally:
        generated.close()


async def unless_disconnected(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """The result of some work, or None where the client went away, which ends the work.

    Args:
        receive: Of the request, whose body was read.
        work: Is awaited.
    """
    result: T | None = None
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        # Raised here it would leave the group inside another exception.
        try:
            result = await work()
        except Exception as error:
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result
