"""Puts the tables of the architecture search into its page, from the files of the runs.

    python benchmarks/architecture_page.py

Records of new runs are added to docs/results/architecture.json, which the page can be built from without the runs. In
the page a table stands between ``<!-- table GROUP:REFERENCE DESIGN ... -->`` and ``<!-- end -->``. GROUP is a folder of
the runs: eight digits of the data's fingerprint, a slash, and optimiser, tokens, batch size and context length, e.g.
96cb7ba5/kalma-1m-8-256. Ratios refer to the design REFERENCE; the designs after it are the rows, else all are. The
rate is chosen on the validation split; what is claimed is the test split's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from kalmagrove.files import write_json_atomic, write_text_atomic
from kalmagrove.report.statistics import Interval, mean_interval, ratio_interval

KEPT = (
    "design",
    "optimizer",
    "lr_scale",
    "seed",
    "loop",
    "parameters",
    "body_parameters",
    "macs_per_token",
    "data_fingerprint",
)
MARK = re.compile(
    r"(<!-- table (?P<name>[\w./-]+):(?P<reference>[\w-]+)(?P<only>(?: [\w-]+)*) -->\n).*?(<!-- end -->)", re.DOTALL
)

Record = dict[str, Any]


def group_of(record: Record) -> str:
    """Data, optimiser, tokens, batch size and context length."""
    return f"{record['data_fingerprint'][:8]}/" + "-".join([record["optimizer"], *(str(v) for _, v in record["loop"])])


def read_runs(folder: Path) -> list[Record]:
    """The records below a folder, without their machines; scores are rounded."""
    records = []
    for path in sorted(folder.rglob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        if "design" in record:
            scores = {name: round(record[name], 5) for name in ("valid", "test") if record[name] is not None}
            records.append({name: record[name] for name in KEPT} | scores)
    return records


def merged(old: list[Record], new: list[Record]) -> list[Record]:
    """Both, the new ones in the place of old ones of the same job."""
    jobs = {(group_of(r), r["design"], r["lr_scale"], r["seed"]): r for r in [*old, *new]}
    return [jobs[key] for key in sorted(jobs)]


def best_rate(records: list[Record]) -> list[Record]:
    """The records of the rate that was best on the validation split with the first seed that all rates have."""
    by_rate: dict[float, list[Record]] = {}
    for record in records:
        by_rate.setdefault(record["lr_scale"], []).append(record)
    return min(by_rate.values(), key=lambda own: min(own, key=lambda r: r["seed"]).get("valid", math.inf))


def table(records: list[Record], reference: str) -> str:
    """Markdown: a row a design, the lowest loss first; ratios of perplexities are paired by seed."""
    designs = {name: best_rate([r for r in records if r["design"] == name]) for name in {r["design"] for r in records}}
    valid, test = (perplexities(designs, split) for split in ("valid", "test"))
    lines = [
        "| design | parameters | MACs a token | seeds | test loss (95 %) | "
        f"test perplexity against {reference} (95 %) | on validation |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, own in sorted(test.items(), key=lambda item: _mean_loss(item[1]).mean):
        first, mean = designs[name][0], _mean_loss(own)
        lines.append(
            f"| {name} | {first['parameters'] / 1e6:.3f} M | {first['macs_per_token'] / 1e6:.2f} M | {len(own)} | "
            f"{mean.mean:.3f}{_bounds(mean.bounds)} | {_ratio(own, test.get(reference, {}))} | "
            f"{_ratio(valid[name], valid.get(reference, {}))} |"
        )
    return "\n".join(lines) + "\n"


def perplexities(designs: dict[str, list[Record]], split: str) -> dict[str, dict[int, float]]:
    """Of every design by seed, without the seeds that were lost."""
    found = {name: {r["seed"]: math.exp(r[split]) for r in own if split in r} for name, own in designs.items()}
    return {name: own for name, own in found.items() if own}


def _mean_loss(own: dict[int, float]) -> Interval:
    return mean_interval([math.log(value) for value in own.values()])


def _ratio(own: dict[int, float], base: dict[int, float]) -> str:
    if own == base:
        return "1"
    ratio = ratio_interval(own, base)
    return "" if ratio is None else f"{ratio.mean:.3f}x{_bounds(ratio.bounds)}"


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.3f}-{bounds[1]:.3f})"


def main() -> None:
    """Collects the records and fills the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/architecture"))
    parser.add_argument("--records", type=Path, default=Path("docs/results/architecture.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/architecture.md"))
    options = parser.parse_args()
    old = json.loads(options.records.read_text("utf-8")) if options.records.exists() else []
    records = merged(old, read_runs(options.runs))
    write_json_atomic(options.records, records)

    def fill(match: re.Match[str]) -> str:
        only = match["only"].split()
        found = [r for r in records if group_of(r) == match["name"] and (not only or r["design"] in only)]
        if not found:
            raise SystemExit(f"{options.page} has a table {match['name']}, but there are no such runs")
        return match[1] + table(found, match["reference"]) + match[5]

    write_text_atomic(options.page, MARK.sub(fill, options.page.read_text("utf-8")))


if __name__ == "__main__":
    main()
