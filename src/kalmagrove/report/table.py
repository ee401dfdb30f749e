"""The table of a comparison: one column a model, one row a measure, for Markdown, the terminal and the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kalmagrove.report.results import Metric, Model, Results, Run, Split
from kalmagrove.report.statistics import mean_interval, median_spread
from kalmagrove.report.wording import wording_of

if TYPE_CHECKING:
    import rich.table

Tone = Literal["better", "same", "worse"]
NOTHING = "-"


@dataclass(frozen=True)
class Ratio:
    """A value over the baseline's; less is better in every row.

    Attributes:
        value: The ratio.
        bounds: An interval or spread around it, if there is one to show.
        bounds_name: What the bounds are, such as "95 %".
        decimals: Digits to show.
    """

    value: float
    bounds: tuple[float, float] | None = None
    bounds_name: str = ""
    decimals: int = 2

    @property
    def tone(self) -> Tone:
        """Whether the value is better than the baseline's; the same where a 95 % interval includes 1."""
        if self.bounds_name == "95 %" and self.bounds is not None and self.bounds[0] <= 1 <= self.bounds[1]:
            return "same"
        if round(self.value, self.decimals) == 1:
            return "same"
        return "better" if self.value < 1 else "worse"

    def bounds_text(self, dash: str = "-") -> str:
        """Such as ``10-90 %: 0.58-0.66``; empty where there are no bounds."""
        if self.bounds is None:
            return ""
        low, high = map(self.number, self.bounds)
        return f"{self.bounds_name}: {low}{dash}{high}"

    def number(self, value: float) -> str:
        """A number with the ratio's digits, fewer where it is large."""
        return f"{value:.{self.decimals}f}" if value < 10 else f"{value:.3g}"


@dataclass(frozen=True)
class Cell:
    """What one model has in one row; the ratio is None for the baseline and where a side has no value."""

    value: str
    ratio: Ratio | None = None

    @property
    def text(self) -> str:
        """Value and ratio, such as ``84.2 ms, 0.61x (10-90 %: 0.58-0.66)``."""
        if self.ratio is None:
            return self.value
        value, ratio, *bounds = self.lines
        return " ".join([f"{value}, {ratio}", *(f"({text})" for text in bounds)])

    @property
    def lines(self) -> tuple[str, ...]:
        """Value, ratio and bounds, those that there are."""
        ratio = () if self.ratio is None else (f"{self.ratio.number(self.ratio.value)}x", self.ratio.bounds_text())
        return tuple(text for text in (self.value, *ratio) if text)


@dataclass(frozen=True)
class Column:
    """One model; the role is empty for those that are neither baseline nor candidate."""

    name: str
    optim: str
    role: Literal["baseline", "candidate", ""]


@dataclass(frozen=True)
class Row:
    """One measure; the main row is the one that the verdict judges."""

    label: str
    cells: tuple[Cell, ...]
    main: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows, and what must be known to read them."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def build_table(results: Results) -> Table:
    """The table of a comparison, finished or not."""
    by_value = wording_of(results.data.modality).by_value
    columns = tuple(Column(model.name, model.optim, _role(results, model)) for model in results.models)
    rows = (
        _cost_row(results, "Parameters", lambda m: m.parameters.total, format_count),
        _cost_row(results, "Parameters without embeddings", lambda m: m.parameters.non_embedding, format_count),
        _cost_row(results, "Training FLOPs a token", lambda m: m.flops_per_token, format_flops),
        _time_row(results),
        _cost_row(results, "Peak training memory", lambda m: m.peak_memory_bytes, format_bytes),
        _cost_row(results, "Decoding state at full context", lambda m: m.decode_state_bytes, format_bytes),
        _score_row(results, "Validation perplexity", "valid", "perplexity"),
        _score_row(results, "Test perplexity", "test", "perplexity", main=True),
        _score_row(results, f"Validation {by_value}", "valid", "word_perplexity"),
        _score_row(results, f"Test {by_value}", "test", "word_perplexity"),
        _score_row(results, "Test bits a byte", "test", "bits_per_byte"),
    )
    return Table(results.title, columns, rows, tuple(_notes(results)))


def to_markdown(table: Table) -> str:
    """A GitHub table with its notes as a list below."""
    heads = [f"{_escape(c.name)}{f' ({c.role})' if c.role else ''}" for c in table.columns]
    lines = [["", *heads], [":--", *("--:" for _ in heads)]]
    for row in table.rows:
        label = f"**{row.label}**" if row.main else row.label
        lines.append([label, *(_escape(cell.text) for cell in row.cells)])
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "\n".join(f"- {_escape(note)}" for note in table.notes)
    return f"{body}\n\n{notes}\n"


def to_rich(table: Table) -> rich.table.Table:
    """The table for a terminal; shades of better and worse come with the ratio, so colour is not needed to read it."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    styles = {"better": "green", "same": "", "worse": "yellow"}
    shown = RichTable(
        title=Text(table.title),
        caption=Text("\n".join(table.notes)),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    # More than two models are too wide for a terminal on one line.
    stacked = len(table.columns) > 2
    shown.add_column("", overflow="fold")
    for column in table.columns:
        role = f"\n{column.role}" if column.role else "\n"
        shown.add_column(Text(column.name + role), justify="right", overflow="fold")
    for row in table.rows:
        cells = [
            Text("\n".join(cell.lines) if stacked else cell.text, style=styles[cell.ratio.tone] if cell.ratio else "")
            for cell in row.cells
        ]
        shown.add_row(Text(row.label), *cells, style="bold" if row.main else "")
    return shown


def format_count(value: float) -> str:
    """Three digits and a thousand, million or billion: ``1.69 M``."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        # Half of the last digit lower, or 999,999 would read 1000 k.
        if value >= limit * 0.9995:
            return _three_digits(value / limit) + unit
    return f"{value:.0f}"


def format_flops(value: float) -> str:
    """Such as ``12.3 MFLOPs``."""
    number, _, unit = format_count(value).partition(" ")
    return f"{number} {unit.replace('B', 'G')}FLOPs"


def format_bytes(value: float) -> str:
    """Decimal units: ``184 MB``."""
    number, _, unit = format_count(value).partition(" ")
    return f"{number} {unit.replace('B', 'G')}B"


def format_seconds(value: float) -> str:
    """Milliseconds below one second: ``84.2 ms``."""
    return f"{_three_digits(value * 1000)} ms" if value < 0.9995 else f"{_three_digits(value)} s"


def format_score(value: float) -> str:
    """About four digits: ``27.65``, ``958.9``, ``1,234``."""
    return f"{value:.{_score_decimals(value)}f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.2e}"


def _score_decimals(value: float) -> int:
    return 2 if value < 99.995 else 1 if value < 999.95 else 0


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    # Rounded first, or 99.96 would get the decimals of a number below 100.
    rounded = float(f"{value:.2e}")
    return f"{rounded:.{min(3, max(0, 2 - math.floor(math.log10(rounded))))}f}"


def _role(results: Results, model: Model) -> Literal["baseline", "candidate", ""]:
    if model.name == results.baseline:
        return "baseline"
    return "candidate" if model.name == results.candidate else ""


def _cost_row(
    results: Results, label: str, measure: Callable[[Model], int | None], shown: Callable[[float], str]
) -> Row:
    reference = measure(results.model(results.baseline))
    cells = []
    for model in results.models:
        value = measure(model)
        compared = model.name != results.baseline and value is not None and reference
        ratio = Ratio(value / reference) if compared and value is not None and reference else None
        cells.append(Cell(NOTHING if value is None else shown(value), ratio))
    return Row(label, tuple(cells))


def _time_row(results: Results) -> Row:
    cells = []
    for model in results.models:
        spread = median_spread(results.time_ratios(model.name))
        ratio = None if spread is None else Ratio(spread.median, (spread.low, spread.high), "10-90 %")
        cells.append(Cell(NOTHING if model.step_seconds is None else format_seconds(model.step_seconds), ratio))
    return Row("Time a step, paired", tuple(cells))


def _score_row(results: Results, label: str, split: Split, metric: Metric, *, main: bool = False) -> Row:
    reference = results.model(results.baseline)
    cells = []
    for model in results.models:
        interval = None if model.name == results.baseline else model.ratio_to(reference, split, metric)
        ratio = None if interval is None else Ratio(interval.mean, interval.bounds, "95 %", decimals=3)
        cells.append(Cell(_score_text(model, split, metric), ratio))
    return Row(label, tuple(cells), main)


def _score_text(model: Model, split: Split, metric: Metric) -> str:
    values = list(model.by_seed(split, metric).values())
    if not values:
        scored = any((run.valid if split == "valid" else run.test) is not None for run in model.runs)
        diverged = any(run.diverged for run in model.runs)
        return "too large" if scored else "diverged" if diverged else "not finished"
    interval = mean_interval(values)
    decimals = 3 if metric == "bits_per_byte" else _score_decimals(interval.mean)
    shown = f"{interval.mean:.3f}" if metric == "bits_per_byte" else format_score(interval.mean)
    margin = "" if interval.bounds is None else f" +/- {interval.mean - interval.bounds[0]:,.{decimals}f}"
    part = "" if len(values) == len(model.runs) else f" ({len(values)} of {len(model.runs)} runs)"
    return shown + margin + part


def _notes(results: Results) -> list[str]:
    seeds = ", ".join(str(seed) for seed in results.seeds)
    count = len(results.seeds)
    if count >= 3:
        about_seeds = f"{count} seeds ({seeds}): means with 95 % intervals; ratios are paired by seed"
    else:
        plural = "seed" if count == 1 else "seeds"
        about_seeds = f"{count} {plural} ({seeds}): no interval, so a small difference may be chance"
    tuned = _tuning(results)
    length = (
        f"{format_count(results.budget.tokens)} training tokens, {tokens_a_parameter(results)} of {results.baseline}"
    )
    if results.screening:
        length += ": screening, fewer than 20; long training may rank the models differently"
    notes = [f"less is better in every row; ratios are to {results.baseline}", about_seeds, tuned, length]
    return notes + _unusual_runs(results)


def _tuning(results: Results) -> str:
    """How the learning rates were found."""
    if not results.is_tuned:
        return "learning rates not tuned: preset defaults"
    how = []
    if results.trials > 1:
        further = any(len(model.lr_trials) > results.trials for model in results.models)
        is_short = results.trial_tokens is not None and results.trial_tokens < results.budget.tokens
        length = f" of {format_count(results.trial_tokens or 0)} tokens" if is_short else ""
        more = ", more while the best was at the edge" if further else ""
        how.append(f"{results.trials} trials a model{length}{more}")
    if results.rechecks:
        moved = [
            f"{recheck.model} from x{recheck.chosen_before:g} to x{scale:g}"
            for recheck in results.rechecks
            if (scale := results.model(recheck.model).lr_scale) != recheck.chosen_before
        ]
        how.append(f"the rates beside the best at full length ({', '.join(moved) or 'none moved'})")
    if results.auxiliary_trials:
        own = [f"{m.name} x{m.auxiliary_scale:g}" for m in results.models if m.auxiliary_scale != 1]
        how.append(f"the rate of embeddings, head and vectors, a factor 4 apart ({', '.join(own) or 'x1 for all'})")
    seed = results.seeds[0]
    return f"learning rates tuned on the validation split with seed {seed}, which is scored too: {', then '.join(how)}"


def tokens_a_parameter(results: Results) -> str:
    """Such as ``2.4 tokens a parameter``."""
    number = results.tokens_per_parameter
    return f"{number:.1f} tokens a parameter" if number < 9.95 else f"{number:,.0f} tokens a parameter"


def _unusual_runs(results: Results) -> list[str]:
    def listed(wanted: Callable[[Run], bool]) -> str:
        return ", ".join(f"{m.name} seed {run.seed}" for m in results.models for run in m.runs if wanted(run))

    diverged = listed(lambda run: run.diverged)
    missing = listed(lambda run: not run.finished and not run.diverged)
    found = [f"{what}: {runs}" for what, runs in (("diverged", diverged), ("not finished", missing)) if runs]
    sources = Counter(run.source or "unknown" for m in results.models for run in m.runs if run.finished)
    if len(sources) > 1:
        counts = ", ".join(f"{count} by {source}" for source, count in sources.items())
        found.append(f"runs by several versions of the package: {counts}")
    return found


def _escape(text: str) -> str:
    for mark in "\\|<>*_`[]":
        text = text.replace(mark, "\\" + mark)
    return text
