"""How ``kalmagrove watch`` shows runs: panels and tables for a terminal, one line a run elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from kalmagrove.training.watching import RunState, Status

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_COARSE = " .:-=+*#@"
_COLOURS: dict[Status, str] = {"running": "green", "stopped": "yellow", "finished": "blue", "diverged": "red"}
_PLOT_ROWS = 6
_CURVE_COLUMNS = 16
_COLUMNS_FOR_CURVES = 100
_RUN_COLUMNS = 16
_LABEL_COLUMNS = 11
_MOST_COLUMNS = 100


def line(state: RunState) -> str:
    """A run in one line."""
    done = f"{100 * state.step // max(1, state.total_steps)} %"
    parts = [f"step {state.step:,}/{state.total_steps:,} ({done})"]
    parts += [f"loss {state.loss:.4f}"] if state.loss is not None else []
    parts += [f"validation {state.valid_loss:.4f}"] if state.valid_loss is not None else []
    if state.status in ("running", "stopped"):
        parts += [f"{state.tokens_per_second:,.0f} tokens/s"] if state.tokens_per_second is not None else []
        parts += [f"elapsed {duration(state.seconds)}"] if state.seconds is not None else []
        parts += [f"left {duration(state.seconds_left)}"] if state.seconds_left is not None else []
        parts += [f"checkpoint at step {state.checkpoint_step:,}"] if state.checkpoint_step is not None else []
    elif state.test_perplexity is not None:
        parts.append(f"test perplexity {state.test_perplexity:.2f}")
    return f"{state.name}, {state.status}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days where there are any."""
    days, rest = divmod(int(seconds), 86400)
    return f"{days:,} day{'' if days == 1 else 's'}, " * (days > 0) + str(timedelta(seconds=rest))


def age(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


@dataclass(frozen=True)
class Curve:
    """A curve as lines of text.

    Attributes:
        lines: From the top to the bottom.
        low: The value at the bottom.
        high: The value at the top; what is above it is cut.
    """

    lines: tuple[str, ...]
    low: float
    high: float


def draw(points: Sequence[tuple[int, float]], last_step: int, columns: int, rows: int, *, blocks: bool) -> Curve:
    """Draws a curve of at least one point.

    A loss falls from chance within moments; so that the rest can be seen, the first tenth does not set the scale.

    Args:
        points: (step, value) in the order of the steps.
        last_step: The step of the right edge; what has not come yet stays empty.
        columns: Characters of a line; each shows the mean of its steps.
        rows: Lines.
        blocks: Draw with block characters, for which the terminal needs Unicode.
    """
    means = _means(points, last_step, columns)
    scale = means[len(means) // 10 :]
    low, high, levels = min(scale), max(scale), 8 * rows
    span = high - low or 1.0
    heights = [1 + round((levels - 1) * min(1.0, max(0.0, (mean - low) / span))) for mean in means]
    marks = _EIGHTHS if blocks else _COARSE
    lines = ["".join(marks[min(8, max(0, height - 8 * row))] for height in heights) for row in reversed(range(rows))]
    return Curve(tuple(text.ljust(columns) for text in lines), low, high)


def _means(points: Sequence[tuple[int, float]], last_step: int, columns: int) -> list[float]:
    """The mean of each column up to the newest point's; one without points has that of the column before."""
    bins: list[list[float]] = [[] for _ in range(columns)]
    for step, value in points:
        bins[min(columns - 1, max(0, step - 1) * columns // max(1, last_step))].append(value)
    newest = max(place for place, values in enumerate(bins) if values)
    means, mean = [], points[0][1]
    for values in bins[: newest + 1]:
        mean = sum(values) / len(values) if values else mean
        means.append(mean)
    return means


def view(states: Sequence[RunState], console: Console, *, title: str, is_table: bool) -> RenderableType:
    """What a terminal shows: all about one run, or a row for each run of a comparison."""
    return _table(states, console, title) if is_table else _panel(states[0], console)


def _table(states: Sequence[RunState], console: Console, title: str) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    blocks = _has_blocks(console)
    # Text, since brackets in the name of a folder are no markup.
    table = Table(
        title=Text(title, style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("run", overflow="fold", min_width=_RUN_COLUMNS)
    table.add_column("status", no_wrap=True)
    for heading in ("done", "loss", "valid", "tokens/s", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    has_curves = console.width >= _COLUMNS_FOR_CURVES
    if has_curves:
        table.add_column("loss curve", no_wrap=True)
    for state in states:
        curve = [_small_curve(state, blocks)] if has_curves else []
        table.add_row(Text(state.name), _status(state), *_row(state), *curve)
    return table


def _row(state: RunState) -> tuple[str, ...]:
    is_under_way = state.status in ("running", "stopped") and state.seconds_left is not None
    return (
        f"{100 * state.step // max(1, state.total_steps)} %",
        _number(state.loss, ".4f"),
        _number(state.valid_loss, ".4f"),
        _number(state.tokens_per_second, ",.0f"),
        duration(state.seconds_left or 0.0) if is_under_way else "-",
    )


def _small_curve(state: RunState, blocks: bool) -> str:
    if not state.losses:
        return ""
    return draw(state.losses, state.total_steps, _CURVE_COLUMNS, 1, blocks=blocks).lines[0]


def _panel(state: RunState, console: Console) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    width = min(console.width, _MOST_COLUMNS)
    blocks = _has_blocks(console)
    progress = Table.grid(padding=(0, 1), expand=True)
    progress.add_column(no_wrap=True)
    progress.add_column(ratio=1)
    progress.add_row(
        f"step {state.step:,} of {state.total_steps:,}", ProgressBar(total=state.total_steps, completed=state.step)
    )
    facts = Table.grid(padding=(0, 3))
    for left, middle, right in _facts(state):
        facts.add_row(left, middle, right)
    plots: list[Text] = []
    for name, points, rows in (("loss", state.losses, _PLOT_ROWS), ("validation", state.valid_losses, 2)):
        if len(points) > 1:
            drawn = draw(points, state.total_steps, width - _LABEL_COLUMNS - 5, rows, blocks=blocks)
            plots += [Text(""), *_labelled(name, drawn)]
    # The name may be a long path, of which the end is cut.
    title = Text.assemble(" ", _status(state), f": {state.name} ")
    return Panel(
        Group(progress, Text(""), facts, Text(_last_events(state)), *plots),
        title=title,
        title_align="left",
        width=width,
    )


def _facts(state: RunState) -> list[tuple[str, str, str]]:
    memory = "-" if state.peak_memory_bytes is None else f"{state.peak_memory_bytes / 1e9:,.2f} GB"
    return [
        (
            f"loss {_number(state.loss, '.4f')}",
            f"validation {_number(state.valid_loss, '.4f')}",
            f"gradient norm {_number(state.grad_norm, '.3g')}",
        ),
        (
            f"{_number(state.tokens_per_second, ',.0f')} tokens/s",
            f"learning rate {_number(state.lr, '.3g')}",
            f"peak memory {memory}",
        ),
        (
            f"elapsed {'-' if state.seconds is None else duration(state.seconds)}",
            f"left {'-' if state.seconds_left is None else duration(state.seconds_left)}",
            "",
        ),
    ]


def _last_events(state: RunState) -> str:
    events = ["no checkpoint yet" if state.checkpoint_step is None else f"checkpoint at step {state.checkpoint_step:,}"]
    events[0] += "" if state.checkpoint_age is None else f" {age(state.checkpoint_age)}"
    if state.test_perplexity is not None:
        events.append(f"test perplexity {state.test_perplexity:.2f}")
    elif state.record_age is not None:
        events.append(f"last record {age(state.record_age)}")
    return ", ".join(events)


def _labelled(name: str, curve: Curve) -> list[Text]:
    """A curve with its name above it and its highest and lowest value at its left."""
    from rich.text import Text

    labels = [f"{curve.high:.3f}", *[""] * (len(curve.lines) - 2), f"{curve.low:.3f}"]
    shown = [
        Text.assemble(f"{label:>{_LABEL_COLUMNS}} ", (text, "cyan"))
        for label, text in zip(labels, curve.lines, strict=True)
    ]
    return [Text(name, style="bold"), *shown]


def _status(state: RunState) -> Text:
    from rich.text import Text

    return Text(state.status, style=_COLOURS[state.status])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _has_blocks(console: Console) -> bool:
    return console.encoding.lower().startswith("utf") and not console.legacy_windows
