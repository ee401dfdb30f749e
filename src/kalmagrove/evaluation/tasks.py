"""Evaluation tasks whose questions are local files: the prompt of each, its scores, and what a row must hold.

They are written as tasks of lm-eval (EleutherAI's evaluation harness), so its code makes the requests and the scores.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from kalmagrove.data.compressed import UNSOUND, is_unicode, json_lines
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import write_text_atomic

SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
NORMALISED = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}


@dataclass(frozen=True)
class Task:
    """How a task asks and scores, in lm-eval's terms.

    Attributes:
        output_type: "multiple_choice": the likeliest of a row's choices is the answer; "loglikelihood": the row's
            continuation is right where greedy decoding would write it.
        doc_to_text: What the model reads: a field of the row, or a template over its fields.
        metrics: What is reported of the answers.
    """

    output_type: str
    doc_to_text: str
    metrics: tuple[dict[str, Any], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """That each row has."""
        return ("query", "choices", "gold") if self.output_type == "multiple_choice" else ("context", "continuation")

    def to_yaml(self, name: str, rows: Path) -> str:
        """The task's file for lm-eval.

        Args:
            name: Of the task.
            rows: Its questions, JSON lines.
        """
        if self.output_type == "multiple_choice":
            answers = {"doc_to_choice": "choices", "doc_to_target": "gold"}
        else:
            answers = {"doc_to_target": "{{' ' + continuation}}"}
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(rows.parent / "cache")},
            "test_split": "test",
            "output_type": self.output_type,
            "doc_to_text": self.doc_to_text,
            **answers,
            "num_fewshot": 0,
            "metric_list": list(self.metrics),
        }
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


TASKS = {
    "arc_easy": Task("multiple_choice", "{{query}}\nAnswer:", (ACCURACY, NORMALISED)),
    "copa": Task("multiple_choice", "query", (ACCURACY,)),
    "lambada_openai": Task("loglikelihood", "context", (PERPLEXITY, ACCURACY)),
}


def task_names(text: str) -> list[str]:
    """The tasks of a comma-separated list.

    Raises:
        UsageError: One is unknown or named twice.
    """
    names = [name.strip() for name in text.split(",")]
    for place, name in enumerate(names):
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=1)
            offered = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise UsageError(f"unknown task {name!r}; {offered}--tasks knows {', '.join(TASKS)}")
        if name in names[:place]:
            raise UsageError(f"--tasks names {name} twice")
    return names


def find_rows(name: str, folder: Path) -> Path:
    """The file of a task's questions, NAME.jsonl, perhaps packed as .xz or .gz.

    Raises:
        UsageError: The folder has none.
    """
    for suffix in SUFFIXES:
        if (folder / (name + suffix)).is_file():
            return folder / (name + suffix)
    raise UsageError(f"--task_data: there is no {folder / name}.jsonl (nor .jsonl.xz, .jsonl.gz) for the task {name}")


def read_rows(name: str, path: Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """The questions of a task, each with the task's fields alone.

    Args:
        name: Of the task.
        path: JSON lines, perhaps packed; empty lines are left out.
        limit: Only the first so many.

    Raises:
        KalmaGroveError: The file cannot be read, holds no row, or a row is not one of the task; the line is named.
    """
    rows = list(islice(_rows(TASKS[name], path), limit))
    if not rows:
        raise KalmaGroveError(f"{path} holds no rows; each is a line of JSON with {', '.join(TASKS[name].fields)}")
    return rows


def write_task_folder(rows: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Writes the files by which lm-eval knows the tasks (its ``--include_path``), and their questions beside them.

    Args:
        rows: By task.
        folder: Exists, and stays where it is as long as the tasks are used.

    Raises:
        OSError: It cannot be written.
    """
    for name, questions in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in questions)
        write_text_atomic(folder / f"{name}.jsonl", lines)
        write_text_atomic(folder / f"{name}.yaml", TASKS[name].to_yaml(name, (folder / f"{name}.jsonl").resolve()))


def _rows(task: Task, path: Path) -> Iterator[dict[str, Any]]:
    for number, row in json_lines(path):
        wrong = "this is not JSON" if row is UNSOUND else _wrong(task, row)
        if wrong is not None:
            raise KalmaGroveError(f"{path}, line {number}: {wrong}; mend or remove it")
        yield {field: row[field] for field in task.fields}


def _wrong(task: Task, row: Any) -> str | None:
    """What a row lacks."""
    if not isinstance(row, dict):
        return "a row must be a JSON object"
    missing = [field for field in task.fields if field not in row]
    if missing:
        return f"the row has no {', '.join(missing)} (a row needs {', '.join(task.fields)})"
    texts = [field for field in task.fields if field not in ("choices", "gold") and not _is_text(row[field])]
    if texts:
        return f"{texts[0]} must be a text that is not empty"
    return _wrong_choices(row["choices"], row["gold"]) if "choices" in task.fields else None


def _wrong_choices(choices: Any, gold: Any) -> str | None:
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(choice) for choice in choices):
        return "choices must be at least two texts that are not empty"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold must be the place of the right choice, 0 to {len(choices) - 1}; it is {json.dumps(gold)[:40]}"
    return None


def _is_text(value: Any) -> bool:
    # A lone surrogate is legal in JSON and in no text.
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)
