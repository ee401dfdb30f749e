"""``kalmagrove report scaling``: the figures and the answered claims of a fitted ladder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalmagrove.files import write_text_atomic
from kalmagrove.report.table import format_count
from kalmagrove.scaling.claims import scaling_claims
from kalmagrove.scaling.figures import save_figures
from kalmagrove.scaling.pages import markdown


def write_scaling_report(summary: Mapping[str, Any], folder: Path) -> str:
    """Writes ``scaling.md``, ``scaling.svg`` and ``scaling.png``, and returns the text.

    Args:
        summary: As ``fit.json`` holds it.
        folder: Where to.

    Raises:
        OSError: They cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = report_text(summary)
    save_figures(summary, folder)
    write_text_atomic(folder / "scaling.md", text)
    return text


def report_text(summary: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Scaling laws", "", "![Perplexity against parameters, FLOPs and seconds](scaling.png)", ""]
    lines += [*_claims(summary), *_range(summary), *_tuning(summary.get("tuning", []))]
    # The fit's own page begins with a title of its own.
    return "\n".join(lines) + "\n" + markdown(summary).split("\n", 2)[2]


def _claims(summary: Mapping[str, Any]) -> list[str]:
    lines = ["| | claim | for | verdict | difference of exponents, or exponent (95 %) |"]
    lines.append("| :-- | :-- | :-- | :-- | :-- |")
    for subject, claims in scaling_claims(summary).items():
        for claim in claims:
            lines.append(f"| {claim.name} | {claim.says} | {subject} | **{claim.verdict}** | {claim.reason} |")
    return [*lines, ""] if len(lines) > 2 else []


def _range(summary: Mapping[str, Any]) -> list[str]:
    lines = ["At this scale, and no further:", ""]
    for name, family in summary["families"].items():
        sizes = [point["parameters"] for point in family["points"]]
        tokens = [point["tokens"] for point in family["points"]]
        lines.append(
            f"- {name}: {len(sizes)} runs, {format_count(min(sizes))} to {format_count(max(sizes))} parameters, "
            f"{format_count(min(tokens))} to {format_count(max(tokens))} tokens"
        )
    return [*lines, ""]


def _tuning(tuning: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for family in tuning:
        tried = ", ".join(
            f"x{trial['lr_scale']:.3g} {trial['valid_loss']:.3f}" for trial in family["trials"] if trial["valid_loss"]
        )
        check = family["check"]
        outcome = "" if check is None else f"; at {check['size']} x{check['best']:g} of it was best"
        lost = ""
        if check is not None and check["best"] != 1:
            lost = " (the chosen one diverged)" if check["lost"] is None else f" (by {check['lost']:.4f} nats)"
        edge = ", at the edge of what was tried" if family["at_the_edge"] else ""
        lines.append(
            f"- {family['family']}: learning rate x{family['chosen']:.3g}{edge} ({tried or 'not tuned'}){outcome}{lost}"
        )
    return ["Learning rates, validation loss of each trial:", "", *lines, ""] if lines else []
