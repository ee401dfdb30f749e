"""Ctrl-C and SIGTERM ask a run to stop after the step that is under way; a second one stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from kalmagrove.errors import KalmaGroveError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

    Attributes:
        number: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
