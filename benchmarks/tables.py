"""Predicts a column of real tables: by our models, which learn all columns, and by trees and linear models.

    python benchmarks/tables.py
    python benchmarks/tables.py --tasks wine diabetes --methods kalmagrove trees
    python benchmarks/tables.py --smoke --out runs/tables
    python benchmarks/tables.py --page docs/results/tables.md

Needs the extra "benchmarks". Five folds; 15 % of a training fold is the validation part. All methods are tuned alike:
on the first fold each tries three settings and keeps the one with the best score of the target on the validation part,
for the other folds too; the validation part also says when to stop (trees: how many; our models: which of five looks).
Our two models have as many parameters and the same optimiser, tokens and settings. A run leaves one JSON file under
--out and is not repeated; with --page nothing is run: the records are added to the .json file beside the page and its
tables, between ``<!-- table TASK -->`` and ``<!-- end -->``, are written again. All of it takes about an hour on one
core.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from kalmagrove.files import write_json_atomic, write_text_atomic
from kalmagrove.training.environment import describe_environment
from parallel import stored
from tables_lab import ours, rivals
from tables_lab.data import MOST_ROWS, TASKS, Task, read_part, write_folds
from tables_lab.page import HEADING, TITLES, fill

Record = dict[str, Any]
SMOKE_TASKS, SMOKE_ROWS = ("wine", "diabetes"), 120


def settings_of(method: str) -> tuple[dict[str, Any], ...]:
    """The settings that a method is tuned over."""
    return rivals.SETTINGS.get(method, ours.SETTINGS)


def run_fold(task: Task, folder: Path, method: str, fold: int, number: int, epochs: float) -> Record:
    """One setting of a method on one fold."""
    setting, place = settings_of(method)[number], folder / f"fold-{fold}"
    if method in rivals.SETTINGS:
        found = rivals.fit(task, place, method, setting)
    else:
        found = ours.fit(task, place, method, setting, epochs=epochs)
    parts = [read_part(place, name) for name in ("train", "valid", "test")]
    return {
        "task": task.name,
        "package": task.package,
        "target": task.target,
        "rows": sum(map(len, parts)),
        "columns": len(parts[0][0]),
        "method": method,
        "fold": fold,
        "setting": setting,
        **found,
        "environment": describe_environment(),
    }


def run_method(task: Task, method: str, options: argparse.Namespace) -> list[Record]:
    """All folds of a method with its best setting."""
    most = SMOKE_ROWS if options.smoke else MOST_ROWS
    folder = options.out / "data" / task.name
    write_folds(task, folder, options.folds, most)
    epochs = 0.5 if options.smoke else task.epochs

    def record(fold: int, number: int) -> Record:
        path = options.out / "runs" / task.name / f"{method}-fold{fold}-setting{number}.json"
        return stored(path, partial(run_fold, task, folder, method, fold, number, epochs))

    tried = [record(0, number) for number in range(len(settings_of(method)))]
    sound = [number for number, own in enumerate(tried) if "valid" in own]
    if not sound:
        return []
    chief = "rmse" if "rmse" in tried[sound[0]]["valid"] else "log_loss"
    best = min(sound, key=lambda number: tried[number]["valid"][chief])
    found = [record(fold, best) for fold in range(options.folds)]
    scores = [own["test"][chief] for own in found if "test" in own]
    mean = sum(scores) / len(scores)
    print(f"{task.name:<14} {TITLES[method]:<30} {chief} {mean:.4f}  setting {found[0]['setting']}", flush=True)
    return found


def run_all(options: argparse.Namespace) -> None:
    """Runs what is missing, writes what a page needs, and prints the page's tables."""
    records = [
        own for name in options.tasks for method in options.methods for own in run_method(TASKS[name], method, options)
    ]
    write_json_atomic(options.out / "records.json", records)
    print(fill("", records))


def fill_page(page: Path, out: Path) -> None:
    """Adds the records of the runs to the file beside the page, and writes the page's tables."""
    kept_path, new_path = page.with_suffix(".json"), out / "records.json"
    files = [path for path in (kept_path, new_path) if path.exists()]
    if not files:
        raise SystemExit(f"there is no {new_path} and no {kept_path}; run the benchmark first")
    read = [record for path in files for record in json.loads(path.read_text("utf-8"))]
    records = {(own["task"], own["method"], own["fold"]): _without_machine(own) for own in read}
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(kept_path, list(records.values()))
    text = page.read_text("utf-8") if page.exists() else HEADING
    write_text_atomic(page, fill(text, list(records.values())))


def _without_machine(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "environment"}


def main() -> None:
    """Runs what is missing, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few rows of two tables and next to no training")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    parser.add_argument("--page", type=Path, help="only write this page from the records")
    options = parser.parse_args()
    if options.smoke:
        options.out /= "smoke"
    if options.page is not None:
        fill_page(options.page, options.out)
        return
    if options.folds < 2:
        parser.error("--folds must be at least 2")
    options.tasks = options.tasks or list(SMOKE_TASKS if options.smoke else TASKS)
    run_all(options)


if __name__ == "__main__":
    main()
