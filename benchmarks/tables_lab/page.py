"""The tables of the benchmark's page, from its records."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from kalmagrove.report.statistics import Interval, mean_interval

Record = dict[str, Any]
TITLES = {
    "kalmagrove": "kalmagrove",
    "llama": "llama",
    "trees": "gradient-boosted trees",
    "linear": "logistic or ridge regression",
}
SHOWN = {"log_loss": "log loss", "accuracy": "accuracy", "auc": "AUC", "rmse": "RMSE", "mae": "MAE", "r2": "R2"}
WITHIN = {"log_loss": (0.0, math.inf), "accuracy": (0.0, 1.0), "auc": (0.0, 1.0)}
"""What an interval cannot leave."""
HEADING = """# Tables: any column from any others, against trees

    python benchmarks/tables.py
    python benchmarks/tables.py --page docs/results/tables.md
"""
MARK = re.compile(r"(<!-- table (?P<task>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def task_table(records: Sequence[Record]) -> str:
    """Markdown: a row a method; log loss or RMSE is also compared with the trees', paired by fold."""
    sound = [record for record in records if "test" in record]
    by_method = {name: [r for r in sound if r["method"] == name] for name in TITLES}
    lost = {name: sum(r["method"] == name for r in records) - len(own) for name, own in by_method.items()}
    first = next(iter(sound))
    scores = [name for name in SHOWN if name in first["test"] and not (name == "log_loss" and "rmse" in first["test"])]
    scores = [name for name in scores if "rmse" not in first["test"] or name in ("rmse", "mae", "r2")]
    chief = "rmse" if "rmse" in scores else "log_loss"
    titles = " | ".join(SHOWN[name] for name in scores)
    lines = [
        f"| method | {titles} | {SHOWN[chief]} minus trees' | parameters | seconds |",
        "| :-- |" + " --: |" * (len(scores) + 3),
    ]
    trees = {record["fold"]: record["test"][chief] for record in by_method["trees"]}
    for method, own in by_method.items():
        if not own:
            continue
        cells = [_shown(mean_interval([record["test"][name] for record in own]), WITHIN.get(name)) for name in scores]
        apart = [record["test"][chief] - trees[record["fold"]] for record in own if record["fold"] in trees]
        difference = _shown(mean_interval(apart)) if apart and method != "trees" else ""
        size = f"{own[0]['parameters']:,}" if "parameters" in own[0] else ""
        seconds = mean_interval([record["seconds"] for record in own]).mean
        title = TITLES[method] + (f" ({lost[method]} diverged)" if lost[method] else "")
        lines.append(f"| {title} | {' | '.join(cells)} | {difference} | {size} | {seconds:.1f} |")
    return "\n".join(lines)


def fill(text: str, records: Sequence[Record]) -> str:
    """A page with its tables written again; those that it does not have yet are added at its end."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    for task in tasks:
        if f"<!-- table {task} -->" not in text:
            own = next(record for record in records if record["task"] == task)
            shape = f"{own['rows']:,} rows, {own['columns']} columns"
            text += f"\n## {task}\n\n{shape}, from {own['package']}; `{own['target']}` is predicted.\n\n"
            text += f"<!-- table {task} -->\n<!-- end -->\n"

    def table(match: re.Match[str]) -> str:
        own = [record for record in records if record["task"] == match["task"]]
        return match[1] + task_table(own) + "\n" + match[3] if own else match[0]

    return MARK.sub(table, text)


def _shown(interval: Interval, within: tuple[float, float] | None = None) -> str:
    low, high = within or (-math.inf, math.inf)
    digits = 4 if abs(interval.mean) < 10 else 1
    bounds = interval.bounds and [min(high, max(low, bound)) for bound in interval.bounds]
    spread = "" if bounds is None else f" ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"
    return f"{interval.mean:.{digits}f}{spread}"
