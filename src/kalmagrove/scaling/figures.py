"""Figure 1 and its neighbours: perplexity against parameters, FLOPs and seconds, exponents, and f(r)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmagrove.report.figures import BASELINE_COLOUR, CANDIDATE_COLOUR, OTHER_COLOURS
from kalmagrove.report.table import format_count
from kalmagrove.scaling.laws import predicted_loss, worth_of_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

QUOTED = {"Transformer": ((125e6, 34.5), (355e6, 29.4)), "KAN": ((70e6, 32.1), (180e6, 28.7))}
"""Parameters and validation perplexity of the paper's Table 1 (WikiText-103)."""

MARKERS = ("o", "s", "^", "D", "v")
INK, GRID, CONTEXT = "#22262b", "#e3e5e8", "#8a9099"


def save_figures(summary: Mapping[str, Any], folder: Path) -> None:
    """Writes ``scaling.svg`` and ``scaling.png`` into a folder.

    Raises:
        OSError: They cannot be written.
    """
    from matplotlib import rc_context

    style = {"font.size": 9, "svg.hashsalt": "scaling", "axes.edgecolor": CONTEXT, "axes.labelcolor": INK}
    with rc_context(style | {"xtick.color": INK, "ytick.color": INK, "text.color": INK}):
        figure = draw(summary)
        figure.savefig(folder / "scaling.svg", format="svg", metadata={"Date": None})
        figure.savefig(folder / "scaling.png", format="png", dpi=130, facecolor="white", metadata={"Software": None})


def draw(summary: Mapping[str, Any]) -> Figure:
    """All panels of a fit.

    Args:
        summary: As ``fit.json`` holds it.
    """
    from matplotlib.figure import Figure

    families: Mapping[str, Any] = summary["families"]
    colours = family_colours(list(families))
    has_rank = any(_has_rank(family) for family in families.values())
    figure = Figure(figsize=(12.5, 7.4), layout="constrained")
    axes = figure.subplots(2, 3)
    _against_parameters(axes[0, 0], families, colours)
    _against(axes[0, 1], families, colours, "flops", "FLOPs of the training")
    _against(axes[0, 2], families, colours, "seconds", "seconds of training steps, one worker")
    _quoted(axes[1, 0])
    _exponents(axes[1, 1], families, colours)
    if has_rank:
        _against_rank(axes[1, 2], families, colours)
    else:
        axes[1, 2].set_axis_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False)
    return figure


def family_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each family: the first is the baseline, the last the candidate."""
    middle = [OTHER_COLOURS[place % len(OTHER_COLOURS)] for place in range(len(names))]
    colours = dict(zip(names, middle, strict=True))
    colours[names[0]] = BASELINE_COLOUR
    if len(names) > 1:
        colours[names[-1]] = CANDIDATE_COLOUR
    return colours


def _against_parameters(axes: Axes, families: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Points of every length; the law with its band at the shortest and at the longest."""
    for (name, family), marker in zip(families.items(), MARKERS * 9, strict=False):
        points = [point for point in family["points"] if point["rank_ratio"] == family["points"][0]["rank_ratio"]]
        lengths = sorted({point["tokens"] for point in points})
        fit = family["laws"]["hoffmann"]
        for place, tokens in enumerate(lengths):
            of_length = [point for point in points if point["tokens"] == tokens]
            strength = 0.35 + 0.65 * (place + 1) / len(lengths)
            axes.scatter(
                [point["parameters"] for point in of_length],
                [np.exp(point["loss"]) for point in of_length],
                s=20,
                marker=marker,
                color=colours[name],
                alpha=strength,
                linewidths=0,
                label=name if place == len(lengths) - 1 else None,
            )
        sizes = np.geomspace(min(p["parameters"] for p in points), max(p["parameters"] for p in points), 40)
        for tokens in dict.fromkeys((lengths[0], lengths[-1])):
            unique = min(point["unique_tokens"] or tokens for point in points if point["tokens"] == tokens)
            run = partial(_loss, tokens=tokens, unique_tokens=unique, rank_ratio=points[0]["rank_ratio"])
            line = [np.exp(run(fit["constants"], size)) for size in sizes]
            axes.plot(sizes, line, color=colours[name], linewidth=1.4)
            if fit["draws"]:
                # A resample keeps the worth of repetition that the fit found.
                repetition = {name: fit["constants"][name] for name in ("R*",) if name in fit["constants"]}
                drawn = [[run(draw | repetition, size) for size in sizes] for draw in fit["draws"]]
                low, high = np.exp(np.quantile(drawn, (0.025, 0.975), axis=0))
                axes.fill_between(sizes, low, high, color=colours[name], alpha=0.15, linewidth=0)
            text = f" {format_count(tokens)}"
            axes.annotate(text, (sizes[-1], line[-1]), color=colours[name], fontsize=7, va="center")
    _finish(axes, "parameters (shared ones once)", "a  validation perplexity; lines: fitted law, 95 % band")


def _loss(
    constants: Mapping[str, float], parameters: float, *, tokens: float, unique_tokens: float, rank_ratio: float
) -> float:
    """Of a run whose repeated tokens are worth what the law says."""
    worth = worth_of_tokens(tokens, unique_tokens, constants["R*"]) if "R*" in constants else tokens
    return predicted_loss(constants, parameters, worth, rank_ratio=rank_ratio)


def _against(axes: Axes, families: Mapping[str, Any], colours: Mapping[str, str], key: str, label: str) -> None:
    """Every run, and the best that each family reaches for a price."""
    for (name, family), marker in zip(families.items(), MARKERS * 9, strict=False):
        pairs = sorted((point[key], float(np.exp(point["loss"]))) for point in family["points"] if point[key])
        if not pairs:
            continue
        prices, scores = zip(*pairs, strict=True)
        axes.scatter(prices, scores, s=14, marker=marker, color=colours[name], alpha=0.45, linewidths=0)
        axes.step(prices, np.minimum.accumulate(scores), where="post", color=colours[name], linewidth=1.4)
    letter = "b" if key == "flops" else "c"
    _finish(axes, label, f"{letter}  validation perplexity; steps: the best for the price")


def _quoted(axes: Axes) -> None:
    for (name, points), style in zip(QUOTED.items(), ("--", "-"), strict=True):
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=CONTEXT)
        size, score = points[0]
        axes.annotate(f"{name}  ", (size, score), color=CONTEXT, fontsize=8, ha="right", va="center")
    axes.set_xlim(2.5e7, 6e8)
    _finish(axes, "parameters", "d  quoted from the paper: WikiText-103, 8 GPUs; not our runs")


def _exponents(axes: Axes, families: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Point and interval of each exponent, by law and family."""
    rows = [
        (name, law, exponent)
        for exponent in ("alpha", "beta")
        for law in ("hoffmann", "power")
        for name in reversed(list(families))
    ]
    for place, (name, law, exponent) in enumerate(rows):
        fit = families[name]["laws"][law]
        value, (low, high) = fit["constants"][exponent], fit["intervals"][exponent]
        axes.plot([low, high], [place, place], color=colours[name], linewidth=2, alpha=0.5)
        axes.plot(value, place, "o", color=colours[name], markersize=4)
    axes.set_yticks(range(len(rows)), [f"{exponent}, {law}" for _, law, exponent in rows], fontsize=7)
    # One wild interval must not hide the others.
    highs = sorted(families[name]["laws"][law]["intervals"][exponent][1] for name, law, exponent in rows)
    values = [families[name]["laws"][law]["constants"][exponent] for name, law, exponent in rows]
    axes.set_xlim(0, max(1.15 * max(values), min(1.05 * highs[-1], 2 * highs[len(highs) // 2])))
    axes.set_title("e  exponents with 95 % intervals", loc="left", fontsize=9)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _against_rank(axes: Axes, families: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Loss at a rank less that at full rank, of the same size and tokens."""
    for (name, family), marker in zip(families.items(), MARKERS * 9, strict=False):
        if not _has_rank(family):
            continue
        full = {
            (point["parameters_at_full_rank"], point["tokens"], point["seed"]): point["loss"]
            for point in _with_size(family["points"])
            if point["rank_ratio"] == 1
        }
        for point in _with_size(family["points"]):
            key = (point["parameters_at_full_rank"], point["tokens"], point["seed"])
            if point["rank_ratio"] < 1 and key in full:
                axes.scatter(
                    point["rank_ratio"], point["loss"] - full[key], s=18, marker=marker, color=colours[name], alpha=0.7
                )
    axes.axhline(0, color=CONTEXT, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank, as a part of the width of attention")
    axes.set_title("f  loss above that of full rank, nats a token", loc="left", fontsize=9)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _with_size(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points with the parameters that their size has at full rank; those of unnamed sizes follow one another."""
    found, full = [], None
    by_size = {point["size"]: point["parameters"] for point in points if point["rank_ratio"] == 1 and point.get("size")}
    for point in points:
        full = point["parameters"] if point["rank_ratio"] == 1 else full
        found.append({**point, "parameters_at_full_rank": by_size.get(point.get("size"), full)})
    return found


def _has_rank(family: Mapping[str, Any]) -> bool:
    return len({point["rank_ratio"] for point in family["points"]}) > 1


def _finish(axes: Axes, label: str, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_title(title, loc="left", fontsize=9)
    _label_few_ticks(axes.xaxis, axes.get_xlim())
    _label_few_ticks(axes.yaxis, axes.get_ylim())
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _label_few_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Ticks at one, two and five of each decade, or at ones alone where there are many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = limits
    if high < 2 * low:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def _short_number(value: float) -> str:
    if value >= 1e9:
        return f"{value:.0e}".replace("e+", "e")
    number, _, unit = format_count(value).partition(" ")
    return f"{value:g}" if value < 1e3 else f"{float(number):g} {unit}"
