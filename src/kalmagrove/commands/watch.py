"""``kalmagrove watch``."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import json_text, make_parser, parse
from kalmagrove.commands.run_view import line, view
from kalmagrove.live_display import can_draw
from kalmagrove.training.watching import FolderWatch, RunState

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_LINES = 60.0
EXAMPLES = """\
  kalmagrove watch runs/mine
  kalmagrove watch runs/comparison --once  (a comparison or a sweep: all of its runs, once)
  kalmagrove watch runs/mine --once --json

It only reads, so it can begin and end at any time; Ctrl-C ends it and leaves the run alone."""


def make_watch_parser() -> ArgumentParser:
    """The flags of ``kalmagrove watch``."""
    parser = make_parser(
        "watch",
        "Follow a run, or the runs of a comparison or sweep, that other processes train: live on a terminal, a line a "
        "minute elsewhere.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument("folder", type=Path, help="the folder that --out names")
    parser.add_argument("--once", action="store_true", help="show how it stands now and end")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each run in the place of text")
    return parser


def run(words: Sequence[str]) -> None:
    """Follows a run until it is finished or has diverged."""
    from rich.console import Console

    options = parse(make_watch_parser(), words)
    console = Console()
    watch = FolderWatch(options.folder)
    with _ctrl_c() as asked:
        if can_draw(console) and not options.json:
            follow_live(watch, console, once=options.once, wait=asked.wait)
        else:
            follow_in_lines(watch, once=options.once, as_json=options.json, wait=asked.wait)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C: an exception may come where a library swallows it. The second one is an exception."""
    asked = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def follow_live(watch: FolderWatch, console: Console, *, once: bool, wait: Callable[[float], bool]) -> None:
    """Redraws a view until nothing more will come, or ``wait`` for so many seconds says that nothing more is wanted."""
    from rich.live import Live

    def shown(states: list[RunState]) -> None:
        live.update(view(states, console, title=str(watch.folder), is_table=watch.has_many), refresh=True)

    with Live(console=console, auto_refresh=False) as live:
        shown(states := watch.read())
        while not once and not watch.has_ended(states) and not wait(SECONDS_BETWEEN_LOOKS):
            shown(states := watch.read())


def follow_in_lines(
    watch: FolderWatch,
    *,
    once: bool,
    as_json: bool,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], bool],
) -> None:
    """Prints every run at once, then once a minute those that went on, and any whose status changed; `wait` ends it."""
    printed: dict[str, tuple[float, RunState]] = {}
    while True:
        states = watch.read()
        for state in states:
            if _is_due(state, printed.get(state.name), clock()):
                printed[state.name] = clock(), state
                say(json_text(state.to_dict(), indent=None) if as_json else line(state))
        if once or watch.has_ended(states) or wait(SECONDS_BETWEEN_LOOKS):
            return


def _is_due(state: RunState, printed: tuple[float, RunState] | None, now: float) -> bool:
    if printed is None:
        return True
    moment, earlier = printed
    went_on = (state.step, state.valid_loss) != (earlier.step, earlier.valid_loss)
    return state.status != earlier.status or (went_on and now - moment >= SECONDS_BETWEEN_LINES)
