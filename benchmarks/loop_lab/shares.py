"""What the parts of the training loop cost beside the step itself, timed in the session that ``kalmagrove train`` runs.

Nothing is copied: functions of the session are replaced by themselves with a clock around them. Parts come more often
than in a usual run, so that there are enough of them to measure; a share is the median cost of one, at its usual rate.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import rich.live

from kalmagrove.data.packing import PackedText
from kalmagrove.training import saving
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.environment import keep_freed_memory
from kalmagrove.training.session import EVALUATIONS, TrainingSession
from kalmagrove.training.tracking import DRAWINGS_A_SECOND, ProgressBar
from kalmagrove.training.trainer import run_to_the_end

WARMUP_STEPS = 5
SAVE_EVERY, EVALUATE_EVERY = 8, 20
"""Steps between savings and evaluations while they are measured."""


@dataclass
class Clock:
    """When the calls of a function began and ended, and the processor time that each took of its thread."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of each call."""
        return [end - start for start, end in self.spans]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with this clock around it."""

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            started, busy = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.spans.append((started, time.perf_counter()))
                self.processor_seconds.append(time.thread_time() - busy)

        return timed


@contextmanager
def clock_on(owner: Any, name: str) -> Iterator[Clock]:
    """A clock around ``owner.name`` for a while."""
    function, clock = getattr(owner, name), Clock()
    setattr(owner, name, clock.around(function))
    try:
        yield clock
    finally:
        setattr(owner, name, function)


@contextmanager
def terminal_as_stderr() -> Iterator[None]:
    """A terminal that nobody looks at in the place of stderr, so that the bar is drawn as it is for a person."""
    reader, writer = os.openpty()

    def drain() -> None:
        try:
            while os.read(reader, 1 << 16):
                pass
        except OSError:
            return

    looked_at, name = sys.stderr, os.environ.get("TERM")
    os.environ["TERM"] = "xterm-256color"
    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    with os.fdopen(writer, "w") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = looked_at
            os.environ.pop("TERM") if name is None else os.environ.update(TERM=name)


@dataclass(frozen=True)
class Parts:
    """Clocks of one run's parts, and the seconds between the end of one step and the start of the next.

    Attributes:
        steps: Whole optimiser steps.
        batches: Making a step's batch, inside the step.
        lines: Lines of metrics.jsonl.
        bar: Telling the progress bar, after each step.
        drawings: Drawing it, in a thread of its own.
        savings: What a checkpoint holds the loop up.
        writings: Writing a checkpoint, in a thread of its own.
        evaluations: Loss on a part of the validation split, with its line.
    """

    steps: Clock
    batches: Clock
    lines: Clock
    bar: Clock
    drawings: Clock
    savings: Clock
    writings: Clock
    evaluations: Clock


def run_with_clocks(config: TrainConfig, data: PackedText, folder: Path) -> Parts:
    """Trains to the end with a clock around every part."""
    session = TrainingSession(config, data, folder)
    try:
        with (
            terminal_as_stderr(),
            clock_on(session.run, "train_step") as steps,
            clock_on(session.run, "batch") as batches,
            clock_on(session.metrics, "write") as lines,
            clock_on(ProgressBar, "update") as bar,
            clock_on(rich.live.Live, "refresh") as drawings,
            clock_on(session, "save") as savings,
            clock_on(saving, "save_checkpoint") as writings,
            clock_on(session, "_evaluate") as evaluations,
        ):
            run_to_the_end(session)
            session.wait_for_saving()
    finally:
        session.close()
    return Parts(steps, batches, lines, bar, drawings, savings, writings, evaluations)


def measure_shares(preset: str, data: PackedText, options: Any) -> dict[str, Any]:
    """Seconds of each part of the loop and its share of a step at its usual rate.

    Args:
        preset: Of the model; llama is trained by AdamW, kalmagrove by Kalma.
        data: The packed text.
        options: ``steps``, ``context_length`` and ``batch_size``.
    """
    usual = LoopConfig()
    config = TrainConfig(
        model=ModelConfig(preset=preset),
        optim=OptimConfig(name="adamw" if preset.startswith("llama") else "kalma"),
        loop=LoopConfig(
            tokens=options.steps * options.batch_size * options.context_length,
            batch_size=options.batch_size,
            context_length=options.context_length,
            log_every=1,
            eval_every=EVALUATE_EVERY,
            save_every=SAVE_EVERY,
        ),
    )
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        parts = run_with_clocks(config, data, Path(scratch) / "run")
        return {"preset": preset, "steps": options.steps, **shares(parts, int(usual.save_every), usual.log_every)}


def shares(parts: Parts, save_every: int, log_every: int) -> dict[str, Any]:
    """Costs and shares of a step from the clocks of a run.

    Args:
        parts: The clocks.
        save_every: Steps between checkpoints of a usual run.
        log_every: Steps between lines of a usual run.
    """
    quiet, beside_writing = _steps_by_writing(parts)
    step = statistics.median(quiet)
    # What the writer's thread takes from the steps beside it, for each checkpoint.
    slowed = sum(beside_writing) - len(beside_writing) * statistics.median(quiet)
    writings = max(1, len(parts.writings.spans))
    drawing = statistics.median(parts.drawings.processor_seconds)
    costs = {
        "data loading": (_middle(parts.batches), 1.0),
        "line of metrics": (_middle(parts.lines), 1 / log_every),
        "progress bar, told": (_middle(parts.bar), 1.0),
        "progress bar, drawn": (drawing, DRAWINGS_A_SECOND * step),
        "saving, loop held up": (_middle(parts.savings), 1 / save_every),
        "saving, steps slowed": (slowed / writings, 1 / save_every),
        "everything else": (statistics.median(_other_seconds(parts)), 1.0),
    }
    rows = [
        {"part": name, "seconds": cost, "times_a_step": rate, "share": cost * rate / step}
        for name, (cost, rate) in costs.items()
    ]
    return {
        "step_seconds": step,
        "rows": rows,
        "beside_the_step": sum(row["share"] for row in rows),
        "evaluation_seconds": _middle(parts.evaluations),
        "evaluations": EVALUATIONS,
        "writing_seconds": _middle(parts.writings),
    }


def _middle(clock: Clock) -> float:
    return statistics.median(clock.seconds[1:])


def _steps_by_writing(parts: Parts) -> tuple[list[float], list[float]]:
    """Seconds of the steps while no checkpoint was written, and of those beside the writing of one."""
    quiet: list[float] = []
    beside: list[float] = []
    for start, end in parts.steps.spans[WARMUP_STEPS:]:
        overlaps = any(start < written and begun < end for begun, written in parts.writings.spans)
        (beside if overlaps else quiet).append(end - start)
    return quiet, beside


def _other_seconds(parts: Parts) -> list[float]:
    """Seconds between two steps that no clock on the training thread counts, for each gap."""
    counted = [span for clock in (parts.lines, parts.bar, parts.savings, parts.evaluations) for span in clock.spans]
    gaps = []
    for (_, ended), (began, _) in pairwise(parts.steps.spans[WARMUP_STEPS:]):
        inside = [(start, end) for start, end in counted if ended <= start and end <= began]
        # A line of an evaluation lies within it.
        outer = [a for a in inside if not any(b[0] <= a[0] and a[1] <= b[1] and a != b for b in inside)]
        gaps.append(began - ended - sum(end - start for start, end in outer))
    return gaps


def show_shares(result: dict[str, Any]) -> None:
    """Prints a table of one model."""
    step = result["step_seconds"]
    print(f"{result['preset']}: a step takes {step * 1e3:.1f} ms")
    for row in result["rows"]:
        print(f"{row['part']:<24}{row['seconds'] * 1e3:>10.3f} ms{row['times_a_step']:>10.4f}x{row['share']:>9.2%}")
    print(f"{'together':<24}{result['beside_the_step']:>33.2%}")
    print(
        f"apart: an evaluation {result['evaluation_seconds'] * 1e3:.0f} ms ({result['evaluations']} in a run), "
        f"a checkpoint {result['writing_seconds'] * 1e3:.0f} ms in the background"
    )
