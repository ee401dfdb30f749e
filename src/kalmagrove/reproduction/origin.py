"""What a folder of studies is of, so that no page mixes two scales or two texts; and its evidence in small files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import finite_or_null, read_json_object, write_json_atomic, write_text_atomic
from kalmagrove.report.results import FILE_NAME, load_results
from kalmagrove.reproduction.evidence import LAW, NOTE, OTHER_TEXT, RANK_LAW, read_note, read_other_text
from kalmagrove.reproduction.plan import LADDER, STUDIES, Plan
from kalmagrove.scaling.plan import read_fit

PLAN = "plan.json"
DIGITS = 8
"""Of kept numbers: more than any of them is known to."""


@dataclass(frozen=True)
class Origin:
    """What a page is of.

    Attributes:
        scale: smoke, laptop or paper, or the name of a file.
        studies: That the scale has, in their order.
        command: Trains them.
    """

    scale: str
    studies: Sequence[str]
    command: str


def claim_folder(plan: Plan, folder: Path, *, command: str) -> None:
    """Writes down what the folder's studies are of.

    Raises:
        UsageError: They are of another scale or text.
        KalmaGroveError: What is written there is damaged.
    """
    sources = {name: config.data.source for name, config in plan.comparisons.items()}
    sources |= {} if plan.ladder is None else {LADDER: plan.ladder.data.source}
    wanted = {"scale": plan.scale, "data": sources}
    if (folder / PLAN).is_file():
        _require_same(folder, wanted, flag="--out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / PLAN, wanted | {"command": command})


def read_origin(folder: Path) -> Origin:
    """What a folder's studies are of.

    Raises:
        KalmaGroveError: It is not a folder of `kalmagrove reproduce`, or damaged.
    """
    if not (folder / PLAN).is_file():
        raise KalmaGroveError(f"{folder} has no {PLAN}; give the --out of kalmagrove reproduce")
    known = _read(folder)
    scale, data, command = known.get("scale"), known.get("data"), known.get("command", "kalmagrove reproduce")
    if not isinstance(scale, str) or not isinstance(data, dict) or not isinstance(command, str):
        raise KalmaGroveError(f"{folder / PLAN} is not of kalmagrove reproduce; give the --out of that command")
    return Origin(scale, [name for name in STUDIES if name in data], command)


def _read(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / PLAN, "remove it to write it anew")


def _require_same(folder: Path, wanted: Mapping[str, Any], *, flag: str) -> None:
    """Refuses a folder whose studies are of another scale or text."""
    known = _read(folder)
    for name, value in wanted.items():
        if known.get(name) != value:
            raise UsageError(
                f"{folder} is of another scale or text: it holds the {name} {known.get(name)}, and this call is for "
                f"{value}; give another {flag}"
            )


def keep_evidence(folder: Path, to: Path) -> None:
    """Copies what a page rests on: the results of every study and the fitted laws, without runs, models and curves.

    Args:
        folder: Of the studies.
        to: A folder of which the page can be written again; studies that it has and ``folder`` has not stay there.

    Raises:
        UsageError: ``to`` is of another scale or text.
        KalmaGroveError: A file is damaged.
    """
    origin = _read(folder)
    if (to / PLAN).is_file():
        _require_same(to, {name: origin.get(name) for name in ("scale", "data")}, flag="--keep")
    to.mkdir(parents=True, exist_ok=True)
    write_json_atomic(to / PLAN, origin)
    for name in STUDIES:
        if (folder / name / FILE_NAME).is_file():
            (to / name).mkdir(exist_ok=True)
            _write_small(to / name / FILE_NAME, _without_curves(load_results(folder / name).to_dict()))
            if other := read_other_text(folder / name):
                _write_small(to / name / OTHER_TEXT, other)
            if note := read_note(folder / name):
                write_text_atomic(to / name / NOTE, note + "\n")
    for law in (LAW, RANK_LAW):
        if (folder / law).is_file():
            (to / law).parent.mkdir(parents=True, exist_ok=True)
            _write_small(to / law, _without_draws(read_fit(folder / law)))


def _without_curves(results: dict[str, Any]) -> dict[str, Any]:
    """Training losses are for figures; those of validation stay."""
    for model in results["models"]:
        for run in model["runs"]:
            run["curve"] = {"tokens": [], "seconds": [], "loss": []}
    return results


def _without_draws(laws: dict[str, Any]) -> dict[str, Any]:
    """Resampled constants are for plans; their intervals stay."""
    for family in laws["families"].values():
        for fit in family["laws"].values():
            fit["draws"] = []
    return laws


def _write_small(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(_rounded(finite_or_null(value)), separators=(",", ":"), allow_nan=False) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
