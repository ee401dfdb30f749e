"""The two pictures of an optimiser comparison: training loss against tokens, and against seconds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLOURS = {"adamw": "#8a8f98", "muon": "#d0601c", "soap": "#0f9671", "kalma": "#2b7cc4"}
SIZE = (11.0, 3.9)


def save_pictures(scale: str, records: list[dict[str, Any]], path: Path) -> None:
    """Draws the mean curve of every method's best rate, side by side, ``path`` a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=160, layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        ends = []
        for method in dict.fromkeys(record["method"] for record in records):
            runs = [r for r in records if r["method"] == method and not r["diverged"]]
            if not runs:
                continue
            scaling = runs[0]["tokens_per_step"] / 1e6 if unit == "tokens" else _seconds_per_step(runs)
            places = [point["step"] * scaling for point in runs[0]["curve"]]
            losses = [statistics.fmean(points) for points in zip(*(_losses(r) for r in runs), strict=True)]
            width = 2.4 if method == "kalma" else 1.5
            axes.plot(places, losses, color=COLOURS[method], lw=width, label=method, zorder=3 if width > 2 else 2)
            ends.append(losses[-1])
        # The first tenth is the same for all and would flatten the rest.
        if ends:
            axes.set_ylim(min(ends) - 0.05, max(ends) + 1.2)
        axes.set_xlim(left=0)
        axes.set_xlabel("million training tokens" if unit == "tokens" else "seconds of training steps, one thread")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#e4e6ea", lw=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("training loss, nats a token")
    figure.axes[1].legend(frameon=False)
    figure.suptitle(f"{scale}: each optimiser at its best learning rate", x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _losses(record: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in record["curve"]]


def _seconds_per_step(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(run["step_seconds"] for run in runs)
