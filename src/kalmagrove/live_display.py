"""A live display on a terminal, for which something else is printed where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 5.0


def can_draw(console: Console) -> bool:
    """Whether something live can be shown there: on a terminal that moves its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


class LiveDisplay:
    """Starts and stops a live display, if there is one; used as a context manager.

    Args:
        live: The display; None where lines are printed in its place.
    """

    def __init__(self, live: Progress | None) -> None:
        self._live = live
        self._last_line = time.monotonic()

    def print_now_and_then(self, line: str) -> None:
        """A line on stderr, unless the last one was a short time ago."""
        if time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
