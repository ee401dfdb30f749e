"""A live display on a terminal, for which something else is printed where there is none."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


class LiveDisplay:
    """Starts and stops a live display, if there is one; used as a context manager.

    Args:
        live: The display; None where lines are printed in its place.
    """

    def __init__(self, live: Progress | None) -> None:
        self._live = live

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
