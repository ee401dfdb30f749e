"""How far a ladder is: a live bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Self

from kalmagrove.errors import KalmaGroveError
from kalmagrove.live_display import LiveDisplay, can_draw
from kalmagrove.scaling.costs import rung_cost
from kalmagrove.scaling.ladder import Rung, SweepConfig, planned_runs
from kalmagrove.scaling.share import Share, run_path
from kalmagrove.scaling.worker import describe_rung, known_losses
from kalmagrove.training.watching import RunState, RunWatch, is_in_use

SECONDS_BETWEEN_LOOKS = 2.0
_MOST_SHOWN = 4


class SweepProgress(LiveDisplay):
    """Shows the part of a ladder's FLOPs that is done; used as a context manager.

    Args:
        config: The ladder.
        folder: Of the sweep; runs of this machine are watched there.
        share: What is known of all workers' runs.
        vocab_size: Of the text.
    """

    def __init__(self, config: SweepConfig, folder: Path, share: Share, vocab_size: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._config, self._folder, self._share, self._vocab_size = config, folder, share, vocab_size
        self._watches: dict[str, RunWatch] = {}
        self._started, self._looked = time.monotonic(), 0.0
        self._part_at_start: float | None = None
        console = Console(stderr=True)
        live: Progress | None = None
        if can_draw(console):
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            live = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, redirect_stdout=False)
        super().__init__(live)
        self._task = None if live is None else live.add_task("runs", total=1.0, left="")

    def say(self, line: str) -> None:
        """A finished run, with how far the whole is."""
        done, total, part = self._look()
        text = f"{done} of {total} runs: {line}; left {self._left(part)}"
        if self._live is not None:
            self._live.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def update(self) -> None:
        """Draws the bar again where some time has passed."""
        if self._live is None or self._task is None or time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        done, total, part = self._look()
        running = "; ".join(list(self._running.values())[:_MOST_SHOWN])
        description = f"{done}/{total} runs" + (f" ({running})" if running else "")
        self._live.update(self._task, completed=part, description=description, left=f"left {self._left(part)}")

    def _look(self) -> tuple[int, int, float]:
        """Runs that are done, all runs, and the part of the FLOPs that is done."""
        losses, done = known_losses(self._config, self._share)
        runs = planned_runs(self._config, losses)
        flops = {rung.key: rung_cost(self._config, rung, self._vocab_size).flops for rung in runs}
        parts = dict.fromkeys(done, 1.0)
        self._running: dict[str, str] = {}
        for rung in runs:
            if rung.key not in done and (state := self._state(rung)) is not None:
                parts[rung.key] = state.step / max(1, state.total_steps)
                loss = "" if state.loss is None else f" {state.loss:.3f}"
                self._running[rung.key] = f"{describe_rung(rung)}:{loss}"
        part = sum(flops[key] * parts.get(key, 0.0) for key in flops) / sum(flops.values())
        if self._part_at_start is None:
            self._part_at_start = part
        return sum(rung.key in done for rung in runs), len(runs), part

    def _state(self, rung: Rung) -> RunState | None:
        """How a run stands that is trained on this machine."""
        path = run_path(self._folder, rung)
        if not is_in_use(path):
            return None
        with suppress(KalmaGroveError, OSError):
            if rung.key not in self._watches:
                self._watches[rung.key] = RunWatch(path, rung.key)
            return self._watches[rung.key].read()
        return None

    def _left(self, part: float) -> str:
        gained = part - (self._part_at_start or 0.0)
        if gained <= 0:
            return "unknown"
        return str(timedelta(seconds=int((time.monotonic() - self._started) * (1 - part) / gained)))

    def __enter__(self) -> Self:
        self._look()
        return super().__enter__()
