"""Tables of a page between marks, so that what people wrote around them stays when they are written again."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kalmagrove.files import write_json_atomic, write_text_atomic


def fill_page(page: Path, tables: Mapping[str, str], *, heading: str) -> None:
    """Writes tables into a page, each between ``<!-- table NAME -->`` and ``<!-- end -->``; new ones at its end.

    Args:
        page: A Markdown file.
        tables: By name.
        heading: Of a page that is not there yet.
    """
    text = page.read_text("utf-8") if page.exists() else heading
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        if begin not in text:
            text += f"\n## {name}\n\n{begin}{end}\n"
        before, _, rest = text.partition(begin)
        text = before + begin + table.rstrip("\n") + "\n" + end + rest.partition(end)[2]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(page, text)


def keep_records(path: Path, records: Sequence[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """Adds records to a JSON file, each in the place of an older one with the same key; returns all of them.

    Args:
        path: The file.
        records: New ones.
        key: Names of the values that tell records apart.
    """
    old = json.loads(path.read_text("utf-8")) if path.exists() else []
    both: dict[Hashable, dict[str, Any]] = {tuple(record[name] for name in key): record for record in [*old, *records]}
    kept = [both[found] for found in sorted(both, key=str)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, kept)
    return kept
