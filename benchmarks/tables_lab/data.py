"""Real tables that Python packages bring with them, in folds with a training, a validation and a test part."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kalmagrove.files import whole_folder

VALID_SHARE = 0.15
MOST_ROWS = 5000
Row = dict[str, str | float]


@dataclass(frozen=True)
class Task:
    """A table and the column that is predicted.

    Attributes:
        name: Of the table.
        target: The column; texts are classes.
        package: Where the table comes from.
        load: Gives its rows.
        epochs: Of the training rows, for our models.
    """

    name: str
    target: str
    package: str
    load: Callable[[], list[Row]]
    epochs: int


def _bundled(name: str, *, is_class: bool) -> Callable[[], list[Row]]:
    def load() -> list[Row]:
        datasets = importlib.import_module("sklearn.datasets")
        data = getattr(datasets, f"load_{name}")()
        names = [str(column) for column in data.feature_names]
        rows: list[Row] = []
        for features, target in zip(data.data.tolist(), data.target.tolist(), strict=True):
            label = str(data.target_names[target]) if is_class else float(target)
            rows.append({**dict(zip(names, features, strict=True)), "target": label})
        return rows

    return load


def _file_of(package: str, *parts: str) -> list[dict[str, str]]:
    """The rows of a CSV inside a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this table comes with {package}: pip install 'kalmagrove[benchmarks]'")
    with Path(spec.origin).parent.joinpath(*parts).open(newline="") as file:
        return list(csv.DictReader(file))


def _statsmodels(name: str) -> list[dict[str, float]]:
    rows = _file_of("statsmodels", "datasets", name, f"{name}.csv")
    return [{column: float(cell) for column, cell in row.items()} for row in rows]


def _randhie() -> list[Row]:
    return [dict(row) for row in _statsmodels("randhie")]


def _fair() -> list[Row]:
    """Whether there was an affair, in the place of how many there were."""
    return [
        {**{name: cell for name, cell in row.items() if name != "affairs"}, "affair": "yes" if row["affairs"] else "no"}
        for row in _statsmodels("fair")
    ]


def _diamonds() -> list[Row]:
    words = ("cut", "color", "clarity")
    rows = _file_of("plotnine", "data", "diamonds.csv")
    return [{name: cell if name in words else float(cell) for name, cell in row.items()} for row in rows]


TASKS = {
    task.name: task
    for task in (
        Task("wine", "target", "scikit-learn", _bundled("wine", is_class=True), epochs=40),
        Task("diabetes", "target", "scikit-learn", _bundled("diabetes", is_class=False), epochs=20),
        Task("breast cancer", "target", "scikit-learn", _bundled("breast_cancer", is_class=True), epochs=20),
        Task("digits", "target", "scikit-learn", _bundled("digits", is_class=True), epochs=7),
        Task("fair", "affair", "statsmodels", _fair, epochs=8),
        Task("randhie", "mdvis", "statsmodels", _randhie, epochs=6),
        Task("diamonds", "price", "plotnine", _diamonds, epochs=8),
    )
}


def is_class(task: Task, rows: list[Row]) -> bool:
    """Whether the target is a class."""
    return isinstance(rows[0][task.target], str)


def write_folds(task: Task, folder: Path, folds: int, most: int = MOST_ROWS) -> None:
    """Writes ``fold-N/{train,valid,test}.jsonl`` under a folder that does not exist yet.

    Of a large table a seeded choice of ``most`` rows is taken. The test parts of the folds divide the rows; classes are
    as frequent in each as in all.
    """
    if folder.exists():
        return
    rows = task.load()
    generator = np.random.Generator(np.random.PCG64(0))
    rows = [rows[place] for place in generator.permutation(len(rows))[:most].tolist()]
    # A stable sort by class before the rows are dealt out keeps each class even over the folds.
    order = sorted(range(len(rows)), key=lambda place: str(rows[place][task.target]) if is_class(task, rows) else "")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as temporary:
        for fold in range(folds):
            rest = [place for number, place in enumerate(order) if number % folds != fold]
            rest = [rest[place] for place in generator.permutation(len(rest)).tolist()]
            valid = max(2, round(VALID_SHARE * len(rest)))
            parts = {"valid": rest[:valid], "train": rest[valid:], "test": order[fold::folds]}
            for name, places in parts.items():
                path = temporary / f"fold-{fold}" / f"{name}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(rows[place]) + "\n" for place in places), encoding="utf-8")


def read_part(folder: Path, name: str) -> list[Row]:
    """The rows of a part of a fold."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
