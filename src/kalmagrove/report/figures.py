"""Charts of a comparison: inline SVG that takes the page's colour and font, and a PNG picture."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kalmagrove.errors import KalmaGroveError
from kalmagrove.report.results import Model, Results, Run
from kalmagrove.report.statistics import median_spread
from kalmagrove.report.table import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

Against = Literal["tokens", "seconds"]

INK = "#123456"
"""Stands for the page's text colour in a chart, and becomes ``currentColor``."""

CANDIDATE_COLOUR, BASELINE_COLOUR = "#2b7cc4", "#d0601c"
OTHER_COLOURS = ("#0f9671", "#b5689b", "#a17a00", "#3d95b5")
OTHER_STYLES = ("--", "-.", ":")
"""After Okabe and Ito, at a contrast of 3 or more on white and on black; others are dashed too."""

LEFT_OUT = 0.05
"""First part of a run that does not count for the range of the loss axis."""

SCORE_LABEL = "test perplexity"
CHART_SIZE = (440.0, 290.0)
ABOVE_AND_BELOW = 72.0
"""Height of a chart that its axes do not take, in points like its size."""

FONT_SIZE = 11.5
LETTER = 0.66
"""Width of a bold letter as a part of the font size; a page's font is not known here."""


@dataclass(frozen=True)
class _Line:
    """How a model is drawn."""

    colour: str
    style: str
    width: float
    order: int


def loss_chart(results: Results, against: Against) -> str:
    """Training loss of every run against tokens or seconds, as inline SVG; empty before any training."""
    if not _has_curves(results):
        return ""
    unit = "training tokens" if against == "tokens" else "seconds of training steps"
    with _plain_style(f"loss-{against}"):
        figure = _new_figure(*CHART_SIZE)
        _draw_loss(figure.add_axes(_area(results)), results, against, INK)
        return _svg(figure, f"loss-{against}", f"Training loss against {unit}", _describe_ends(results, unit))


def ratio_chart(results: Results) -> str:
    """The candidate's costs and test perplexity over the baseline's, as inline SVG."""
    rows = _ratios(results)
    shown = "; ".join(f"{label} {value:.2f}" for label, value, _ in rows)
    title = f"{results.candidate} over {results.baseline}: less than 1 is better"
    with _plain_style("ratios"):
        figure = _new_figure(CHART_SIZE[0], 62 + 34 * len(rows))
        height = 62 + 34 * len(rows)
        axes = figure.add_axes((0.27, 40 / height, 0.62, 1 - 62 / height))
        _draw_ratios(axes, rows)
        return _svg(figure, "ratios", title, shown)


def save_png(results: Results, path: Path) -> None:
    """Writes both loss charts side by side on white, for a README.

    Raises:
        KalmaGroveError: No training is recorded yet.
        OSError: The file cannot be written.
    """
    if not _has_curves(results):
        raise KalmaGroveError(f"{path} cannot be drawn: the comparison has no training steps yet")
    width, height = CHART_SIZE
    with _plain_style("picture"):
        figure = _new_figure(2 * width, height + 24)
        left, bottom, part, tall = _area(results)
        for index, against in enumerate(("tokens", "seconds")):
            area = (index / 2 + left / 2, bottom, part / 2, tall * height / (height + 24))
            _draw_loss(figure.add_axes(area), results, "tokens" if against == "tokens" else "seconds", "#22262b")
        figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def line_colour(results: Results, name: str) -> str:
    """The colour in which a model is drawn, as ``#rrggbb``."""
    return _lines(results)[name].colour


def _has_curves(results: Results) -> bool:
    return any(len(run.curve.tokens) > 1 for model in results.models for run in model.runs)


def _lines(results: Results) -> dict[str, _Line]:
    lines = {
        results.candidate: _Line(CANDIDATE_COLOUR, "-", 2.4, 4),
        results.baseline: _Line(BASELINE_COLOUR, "-", 1.6, 3),
    }
    for index, name in enumerate(model.name for model in results.models if model.name not in lines):
        colour = OTHER_COLOURS[index % len(OTHER_COLOURS)]
        lines[name] = _Line(colour, OTHER_STYLES[index % len(OTHER_STYLES)], 1.5, 2)
    return lines


def _area(results: Results) -> tuple[float, float, float, float]:
    """Where the axes are, with room for the labels right of them."""
    width, height = CHART_SIZE
    longest = max(len(_short(model.name)) for model in results.models)
    right = 38 + longest * FONT_SIZE * LETTER
    return 34 / width, 42 / height, 1 - (34 + right) / width, 1 - ABOVE_AND_BELOW / height


def _short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else name[: longest - 3] + "..."


def _draw_loss(axes: Axes, results: Results, against: Against, ink: str) -> None:
    lines = _lines(results)
    ends: dict[str, tuple[float, float]] = {}
    for model in results.models:
        line, drawn = lines[model.name], [run for run in model.runs if len(run.curve.tokens) > 1]
        width = line.width if len(drawn) == 1 else line.width * 0.6
        for run in drawn:
            places = getattr(run.curve, against)
            axes.plot(places, _smooth(run.curve.loss), color=line.colour, ls=line.style, lw=width, zorder=line.order)
            if against == "tokens" and len(run.valid_curve.tokens) > 0:
                axes.plot(
                    run.valid_curve.tokens,
                    run.valid_curve.loss,
                    color=line.colour,
                    ls="none",
                    marker="o",
                    ms=3.5,
                    mfc="none",
                    mew=1.1,
                    zorder=5,
                )
        if drawn:
            ends[model.name] = max(getattr(run.curve, against)[-1] for run in drawn), _end(model)
    low, high = _loss_range(results)
    axes.set_ylim(low, high)
    axes.set_xlim(left=0, right=max((place for place, _ in ends.values()), default=1.0) * 1.02)
    _frame(axes, ink, "training tokens" if against == "tokens" else "seconds of training steps")
    axes.text(0, 1.06, "loss, nats a token", transform=axes.transAxes, color=ink, ha="left", va="bottom")
    axes.xaxis.set_major_locator(_few_ticks(5))
    axes.yaxis.set_major_locator(_few_ticks(6))
    axes.xaxis.set_major_formatter(lambda value, _: _round_count(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _label_ends(axes, ends, lines, ink)


def _label_ends(axes: Axes, ends: dict[str, tuple[float, float]], lines: dict[str, _Line], ink: str) -> None:
    """Names at the right border, each joined to its line's end, far enough apart to be read."""
    low, high = axes.get_ylim()
    border = axes.get_xlim()[1]
    # The axes of both pictures have the height of a single chart.
    gap = (high - low) * FONT_SIZE * 1.3 / (CHART_SIZE[1] - ABOVE_AND_BELOW)
    names = sorted(ends, key=lambda name: (ends[name][1], name))
    for name, place in zip(names, _apart([ends[name][1] for name in names], gap, low, high), strict=True):
        line, (end, loss) = lines[name], ends[name]
        weight = "bold" if line.order == 4 else "normal"
        joint = border * 1.035
        path = axes.plot([end, border, joint], [loss, loss, place], color=line.colour, lw=0.8, ls=(0, (1, 1.5)))
        start = joint + border * 0.045
        path += axes.plot([joint, start], [place, place], color=line.colour, lw=2.6, solid_capstyle="butt")
        for part in path:
            part.set_clip_on(False)
        axes.text(start + border * 0.02, place, _short(name), color=ink, ha="left", va="center", weight=weight)


def _apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising values moved as little as one sweep up and one down needs to be a gap apart and within limits."""
    places: list[float] = []
    for value in values:
        wanted = min(max(value, low), high)
        places.append(wanted if not places else max(wanted, places[-1] + gap))
    ceiling = high
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return places


def _loss_range(results: Results) -> tuple[float, float]:
    runs = [run for model in results.models for run in model.runs]
    late = [loss for run in runs for loss in _losses_after(run, LEFT_OUT * results.budget.tokens)]
    losses = late or [loss for run in runs for loss in _losses_after(run, 0)]
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _losses_after(run: Run, tokens: float) -> list[float]:
    smooth = zip(run.curve.tokens, _smooth(run.curve.loss), strict=True)
    valid = zip(run.valid_curve.tokens, run.valid_curve.loss, strict=True)
    return [loss for place, loss in [*smooth, *valid] if place >= tokens]


def _smooth(losses: Sequence[float]) -> list[float]:
    """A centred moving average over a fiftieth of the points."""
    half = len(losses) // 100
    windows = (losses[max(0, index - half) : index + half + 1] for index in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def _end(model: Model) -> float:
    """Mean loss at the end of the runs that got furthest."""
    furthest = max(run.curve.tokens[-1] for run in model.runs if run.curve.tokens)
    losses = [_smooth(run.curve.loss)[-1] for run in model.runs if furthest in run.curve.tokens[-1:]]
    return sum(losses) / len(losses)


def _describe_ends(results: Results, unit: str) -> str:
    ends = []
    for model in results.models:
        if any(run.curve.loss for run in model.runs):
            ends.append(f"{model.name} ends at {_end(model):.3f}")
    return f"Nats a token, against {unit}: {'; '.join(ends)}"


def _ratios(results: Results) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Label, ratio and bounds of what is known of both sides."""
    candidate, baseline = results.model(results.candidate), results.model(results.baseline)
    rows: list[tuple[str, float, tuple[float, float] | None]] = []

    def add(label: str, own: float | None, other: float | None) -> None:
        if own and other:
            rows.append((label, own / other, None))

    add("parameters", candidate.parameters.total, baseline.parameters.total)
    add("FLOPs a token", candidate.flops_per_token, baseline.flops_per_token)
    spread = median_spread(results.time_ratios(candidate.name))
    if spread is not None:
        rows.append(("time a step", spread.median, (spread.low, spread.high)))
    add("training memory", candidate.peak_memory_bytes, baseline.peak_memory_bytes)
    score = _score_ratio(candidate, baseline)
    return rows if score is None else [*rows, score]


def _score_ratio(candidate: Model, baseline: Model) -> tuple[str, float, tuple[float, float] | None] | None:
    ratio = candidate.ratio_to(baseline)
    return None if ratio is None else (SCORE_LABEL, ratio.mean, ratio.bounds)


def _draw_ratios(axes: Axes, rows: Sequence[tuple[str, float, tuple[float, float] | None]]) -> None:
    every = [1.0, *(value for _, ratio, bounds in rows for value in (ratio, *(bounds or ())))]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.5, *every) / 1.12, max(1.25, *every) * 1.12)
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.axvline(1, color=INK, lw=1.2)
    for place, (label, ratio, bounds) in enumerate(rows):
        better = ratio < 1
        axes.plot([1, ratio], [place, place], color=CANDIDATE_COLOUR, lw=2, alpha=0.45)
        if bounds is not None:
            axes.plot(bounds, [place, place], color=CANDIDATE_COLOUR, lw=5, alpha=0.35, solid_capstyle="round")
        fill = CANDIDATE_COLOUR if better else "none"
        axes.plot([ratio], [place], marker="o" if better else "D", ms=8, mfc=fill, mec=CANDIDATE_COLOUR, mew=1.8)
        right = axes.get_yaxis_transform()
        weight = "bold" if label == SCORE_LABEL else "normal"
        axes.text(1.14, place, f"{ratio:.2f}\u00d7", transform=right, ha="right", va="center", color=INK, weight=weight)
    _frame(axes, INK, "")
    axes.grid(False)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.xaxis.set_major_locator(_ratio_ticks(axes.get_xlim()))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}\u00d7")
    axes.xaxis.set_minor_locator(_ratio_ticks((2, 1)))
    axes.text(1, 1.02, "baseline", transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=INK)


def _round_count(value: float) -> str:
    """A tick's number without zeros after the point: ``2 M``."""
    if value < 1000:
        return f"{value:g}"
    number, _, unit = format_count(value).partition(" ")
    return f"{float(number):g} {unit}"


def _frame(axes: Axes, ink: str, label: str) -> None:
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=ink, alpha=0.14, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=ink, alpha=0.5)
    axes.tick_params(colors=ink, length=0, pad=6)
    axes.set_xlabel(label, color=ink, labelpad=6)


def _few_ticks(count: int) -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])


def _ratio_ticks(limits: tuple[float, float]) -> Locator:
    from matplotlib.ticker import FixedLocator

    ticks = (0.03125, 0.0625, 0.125, 0.25, 0.5, 0.7, 1, 1.5, 2, 4, 8, 16, 32, 64)
    return FixedLocator([tick for tick in ticks if limits[0] <= tick <= limits[1]])


def _new_figure(width: float, height: float) -> Figure:
    """A figure of so many points; no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


@contextmanager
def _plain_style(salt: str) -> Iterator[None]:
    """Matplotlib's defaults whatever the user's are, with real text and repeatable names."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": FONT_SIZE}
        )
        yield


def _svg(figure: Figure, prefix: str, title: str, description: str) -> str:
    """The figure as an element for a page: no document head, no addresses, ids that begin with the prefix."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="', f' id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = text.replace(INK, "currentColor")
    # Newer versions of matplotlib write the family by itself, older ones in the font shorthand.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;\"]*", _inherited_font, text)
    view = re.search(r'viewBox="[^"]*"', text)
    head = (
        f'<svg {view[0] if view else ""} role="img" aria-labelledby="{prefix}-title {prefix}-description">\n'
        f'<title id="{prefix}-title">{html.escape(title)}</title>\n'
        f'<desc id="{prefix}-description">{html.escape(description)}</desc>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).rstrip()


def _inherited_font(font: re.Match[str]) -> str:
    weight = "font-weight: bold; " if "bold" in font[1] or "700" in font[1] else ""
    return f"{weight}font-size: {font[2]}"
