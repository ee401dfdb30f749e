"""The tables of the benchmark's page, from its records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from images_lab import rivals
from images_lab.ours import VARIANTS
from kalmagrove.report.statistics import Interval, mean_interval

Record = dict[str, Any]
TITLES = {name: variant.title for name, variant in VARIANTS.items()} | rivals.TITLES
SHOWN = {"bits_per_dimension": "bits a pixel", "accuracy": "accuracy", "log_loss": "nats a label"}
HEADING = """# Images: bits a pixel and labels

    python benchmarks/images.py
    python benchmarks/images.py --page docs/results/images.md

"""
MARK = re.compile(r"(<!-- images (?P<set>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def set_table(records: Sequence[Record]) -> str:
    """Markdown: a row a method, with the means of its seeds on the test images and their 95 % intervals."""
    scores = [name for name in SHOWN if any(name in record.get("test", {}) for record in records)]
    titles = " | ".join(SHOWN[name] for name in scores)
    lines = [
        f"| method | {titles} | parameters | rate | seconds |",
        "| :-- |" + " --: |" * (len(scores) + 3),
    ]
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method and "test" in record]
        if not own:
            lines.append(f"| {TITLES[method]} | diverged |" + " |" * (len(scores) + 2))
            continue
        cells = [
            _shown(mean_interval([record["test"][name] for record in own])) if name in own[0]["test"] else ""
            for name in scores
        ]
        seconds = mean_interval([record["seconds"] for record in own]).mean
        size, rate = f"{own[0]['parameters']:,}", f"{own[0]['rate']:g}"
        lost = sum(record["method"] == method for record in records) - len(own)
        title = TITLES[method] + (f" ({lost} diverged)" if lost else "")
        lines.append(f"| {title} | {' | '.join(cells)} | {size} | {rate} | {seconds:.0f} |")
    return "\n".join(lines)


def fill(text: str, records: Sequence[Record]) -> str:
    """A page with its tables written again; those that it does not have yet are added at its end."""
    for name in dict.fromkeys(record["set"] for record in records):
        if f"<!-- images {name} -->" not in text:
            origin = next(record["origin"] for record in records if record["set"] == name)
            text += f"\n## {name}\n\nFrom {origin}.\n\n<!-- images {name} -->\n<!-- end -->\n"

    def table(match: re.Match[str]) -> str:
        own = [record for record in records if record["set"] == match["set"]]
        return match[1] + set_table(own) + "\n" + match[3] if own else match[0]

    return MARK.sub(table, text)


def _shown(interval: Interval) -> str:
    bounds = interval.bounds
    spread = "" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})"
    return f"{interval.mean:.3f}{spread}"
