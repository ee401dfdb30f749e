"""How many answers are generated at once, how many requests wait, and how both end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from kalmagrove.serving.errors import RequestError
from kalmagrove.serving.options import SECONDS_TO_RETRY


class Slots:
    """The places of a server, all used from its event loop alone.

    Args:
        running: Answers that are generated at once.
        waiting: Requests that may wait for a place among them.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._most, self._present = running + waiting, 0
        self._running = asyncio.Semaphore(running)
        self._is_stopping = self._is_over = False

    @property
    def is_stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._is_stopping

    def stop(self) -> None:
        """From now on no answer begins; those that have begun go on."""
        self._is_stopping = True

    def end(self) -> None:
        """Answers that have begun end with their next token."""
        self._is_stopping = self._is_over = True

    def check(self) -> None:
        """That an answer which has begun may go on.

        Raises:
            RequestError: The server ends.
        """
        if self._is_over:
            raise _stopping("the server stopped before the answer was whole")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for a request, to wait or to run.

        Raises:
            RequestError: There is none, or the server stops.
        """
        if self._is_stopping:
            raise _stopping("the server stops and takes no more requests")
        if self._present >= self._most:
            raise RequestError(
                429,
                f"all {self._most} places are taken; try again in a moment",
                code="rate_limit_exceeded",
                retry_after=SECONDS_TO_RETRY,
            )
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    async def begin(self) -> None:
        """Waits until the answer may begin; :meth:`leave` must follow.

        Raises:
            RequestError: The server stopped meanwhile.
        """
        await self._running.acquire()
        if self._is_stopping:
            self._running.release()
            raise _stopping("the server stopped before the answer began")

    def leave(self) -> None:
        """Lets the next one begin."""
        self._running.release()


def _stopping(message: str) -> RequestError:
    return RequestError(503, message, code="server_stopping", retry_after=SECONDS_TO_RETRY)
