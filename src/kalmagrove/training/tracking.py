"""Follow a training run: one JSON line a record in a file, and a progress bar or plain lines for the reader."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from kalmagrove.files import finite_or_null, fsync_file
from kalmagrove.live_display import LiveDisplay, can_draw

if TYPE_CHECKING:
    from rich.progress import TaskID

DRAWINGS_A_SECOND = 4
"""Of the live bar; at the 10 that are usual, drawing takes a core 1 to 2 % of its time."""

_SECONDS_BETWEEN_LINES = 60.0


class MetricsWriter:
    """Append records to a JSON Lines file, each complete in the file when the call returns."""

    def __init__(self, path: Path) -> None:
        """Create the file's folder, and remove a last line that a crash cut.

        Args:
            path: The file; its records stay, and it is created by the first new one when missing.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_cut_line(path)
        self._bytes = path.stat().st_size if path.exists() else 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            record: JSON values by name; floats that are not finite are written as null.

        Raises:
            OSError: The disk did not take it; the next call removes a part that it took.
        """
        line = json.dumps(finite_or_null(record), allow_nan=False).encode() + b"\n"
        with self._path.open("ab") as file:
            if file.tell() > self._bytes:
                file.truncate(self._bytes)
            file.write(line)
            file.flush()
            size = file.tell()
        self._bytes = size

    def sync(self) -> None:
        """Wait until every record is on the disk, as before a checkpoint that they must not fall behind.

        Raises:
            OSError: The disk did not take them.
        """
        if self._path.exists():
            fsync_file(self._path)


class ProgressBar(LiveDisplay):
    """Show on stderr how far a run is, as a live bar on a terminal and as a plain line a minute elsewhere:
    the first at once, the last at the end.

    Use it as a context manager and call `update` after each step.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        description: str = "training",
        start_step: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display; nothing is shown yet.

        Args:
            total_steps: The step at which the run is complete.
            description: What is under way, in a word or two.
            start_step: The step from which a resumed run goes on.
            quiet: Print plain lines on a terminal too.
            stream: Where to print, stderr when None.
            clock: Seconds from any origin, never going back.
        """
        self._total_steps = total_steps
        self._description = description
        self._start_step = start_step
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._started_at = clock()
        self._last_line_at: float | None = None
        self._unprinted_line: str | None = None
        super().__init__(None)
        self._task: TaskID | None = None
        if not quiet:
            self._prepare_live_display()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the state after a step.

        Args:
            step: How many steps are done.
            loss: The current training loss, in nats per token.
            tokens_per_second: The current training speed.
        """
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{tokens_per_second:,.0f}")
            return
        now = self._clock()
        self._unprinted_line = self._line(step, loss, tokens_per_second, now - self._started_at)
        if self._last_line_at is None or now - self._last_line_at >= _SECONDS_BETWEEN_LINES:
            self._last_line_at = now
            self._print_line()

    def __enter__(self) -> Self:
        self._started_at = self._clock()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._print_line()

    def _print_line(self) -> None:
        if self._unprinted_line is not None:
            print(self._unprinted_line, file=self._stream, flush=True)
            self._unprinted_line = None

    def _line(self, step: int, loss: float, tokens_per_second: float, elapsed: float) -> str:
        steps_done = step - self._start_step
        left = elapsed / steps_done * (self._total_steps - step) if steps_done > 0 else None
        return (
            f"{self._description}: step {step}/{self._total_steps}, loss {loss:.4f}, "
            f"{tokens_per_second:,.0f} tokens/s, elapsed {_duration(elapsed)}, "
            f"left {_duration(left) if left is not None else 'unknown'}"
        )

    def _prepare_live_display(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        console = Console(file=self._stream)
        if not self._stream.isatty() or not can_draw(console):
            return
        self._live = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "loss {task.fields[loss]}",
            "{task.fields[speed]} tokens/s",
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=DRAWINGS_A_SECOND,
            # Stdout is for results, and must not be sent to the bar's stderr.
            redirect_stdout=False,
        )
        self._task = self._live.add_task(
            self._description, total=self._total_steps, completed=self._start_step, loss="-", speed="-"
        )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def _remove_cut_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
