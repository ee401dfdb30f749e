"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to stop after the step that is under way; a second one stops at once."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from kalmagrove.errors import KalmaGroveError

# Slurm's --signal sends SIGUSR1 before a job's time is over; Windows has none.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


_SECONDS_OF_ONE_SIGNAL = 1.0


class Interrupted(KalmaGroveError):
    """The run was asked to stop and has saved its state.

    Attributes:
        exit_code: 128 and the number of the signal, as shells expect.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Remembers a stop signal while it is active as a context manager; works in the main thread.

    A second signal ends the process at once, but for the first second: a terminal and a launcher of several processes
    may both pass the same one on.

    Attributes:
        number: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._came_at = 0.0
        self._outlives = False
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._came_at = number, now
        elif now - self._came_at > _SECONDS_OF_ONE_SIGNAL:
            self._restore()
            signal.raise_signal(number)

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._outlives:
            self._restore()

    def outlive(self) -> None:
        """Goes on after the context: the one signal that a launcher sends must not cut a process's last words."""
        self._outlives = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
