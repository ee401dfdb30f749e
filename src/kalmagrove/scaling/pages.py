"""A fit as files: JSON with unrounded numbers, Markdown for a reader, and a picture of losses and residuals."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kalmagrove.files import write_json_atomic, write_text_atomic
from kalmagrove.report.figures import BASELINE_COLOUR, CANDIDATE_COLOUR, OTHER_COLOURS

LAW_FOLDER = "law"
"""Of a sweep: where its fit is."""
FIT = "fit.json"
COLOURS = (BASELINE_COLOUR, CANDIDATE_COLOUR, *OTHER_COLOURS)


def write_pages(summary: Mapping[str, Any], folder: Path) -> None:
    """``fit.json``, ``fit.md`` and ``fit.svg`` in a folder, which is made where it is missing.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / FIT, summary)
    write_text_atomic(folder / "fit.md", markdown(summary))
    write_text_atomic(folder / "fit.svg", picture(summary))


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables and warnings of a fit."""
    lines = [f"# Scaling law of {summary['runs']} runs", ""]
    for family, found in summary["families"].items():
        for fit in found["laws"].values():
            lines += [
                f"## {family}: {fit['formula']}",
                "",
                "| constant | value | 95 % interval |",
                "| :-- | --: | --: |",
            ]
            for name, value in fit["constants"].items():
                within = fit["intervals"].get(name)
                lines.append(f"| {name} | {value:.5g} | {_interval(within)} |")
            held = fit["held_out"]
            lines += ["", f"{len(fit['residuals'])} runs; {_residuals(fit['residuals'])}"]
            if held is not None:
                lines.append(
                    f"Fitted without the largest {held['runs']} runs, it misses their loss by {held['error']:.4f} nats."
                )
            best = f"{fit['agreeing_starts']} of the {fit['finalists']} best"
            lines.append(f"{best} of {fit['starts']} searches ended here.")
            lines += [f"- **Careful:** {warning}." for warning in fit["warnings"]] + [""]
    lines += _difference_lines(summary["differences"], summary.get("paired", {}))
    if summary["left_out"]:
        lines += ["## Left out", "", *(f"- {line}" for line in summary["left_out"]), ""]
    method = summary["method"]
    lines.append(
        f"Huber loss with delta {method['huber_delta']:g} (of log loss; of loss for the power law), L-BFGS; intervals "
        f"from {method['resamples']:,} bootstrap resamples, seed {method['seed']}."
    )
    return "\n".join(lines) + "\n"


def _difference_lines(differences: Mapping[str, Any], paired: Mapping[str, bool]) -> list[str]:
    lines: list[str] = []
    for pair, by_law in differences.items():
        alike = "of the same cells of both" if paired.get(pair) else "drawn for each alone, as their grids differ"
        lines += [
            f"## {pair}",
            "",
            f"At the ranks that both have; resamples {alike}.",
            "",
            "| law | exponent | difference | 95 % interval | |",
            "| :-- | :-- | --: | --: | :-- |",
        ]
        for law, exponents in by_law.items():
            for name, found in exponents.items():
                cells = (law, name, f"{found['difference']:+.4f}", _interval(found["interval"]), found["verdict"])
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _interval(within: Sequence[float] | None) -> str:
    return "-" if within is None else f"{within[0]:.4g} to {within[1]:.4g}"


def _residuals(residuals: Sequence[float]) -> str:
    size = np.abs(residuals)
    return f"residuals of {size.mean():.4f} nats on average, {size.max():.4f} at most."


def picture(summary: Mapping[str, Any]) -> str:
    """SVG: losses against parameters above, residuals of each law below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    laws = list(next(iter(summary["families"].values()))["laws"])
    axes = figure.subplots(1 + len(laws), 1, height_ratios=[2.2, *[1] * len(laws)], sharex=True)
    for colour, (family, found) in zip(COLOURS * 9, summary["families"].items(), strict=False):
        sizes = [point["parameters"] for point in found["points"]]
        axes[0].scatter(
            sizes, [point["loss"] for point in found["points"]], s=14, color=colour, label=family, alpha=0.8
        )
        for axis, law in zip(axes[1:], laws, strict=True):
            axis.scatter(sizes, found["laws"][law]["residuals"], s=10, color=colour, alpha=0.8)
            axis.set_ylabel(f"residual,\n{law}")
            axis.axhline(0, color="gray", linewidth=0.8)
    axes[0].set_ylabel("loss, nats a token")
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("parameters")
    axes[-1].set_xscale("log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()
