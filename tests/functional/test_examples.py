"""The example's data is made as its page says, and can be trained on."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kalmagrove.data.mixed.reading import split_mixed

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "digits_and_wines.py"


@pytest.fixture
def arguments() -> Iterator[list[str]]:
    before = sys.argv
    sys.argv = [str(SCRIPT)]
    yield sys.argv
    sys.argv = before


def test_digits_and_wines(tmp_path: Path, arguments: list[str]) -> None:
    pytest.importorskip("sklearn", reason="the example needs scikit-learn")
    arguments += [str(tmp_path), "--most", "20"]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = list(split_mixed(str(tmp_path), seed=0))
    assert {split for split, _ in rows} == {"train", "valid", "test"}
    kinds = {tuple(piece.kind for piece in row.pieces) for _, row in rows}
    assert kinds == {("image", "text", "text"), ("row", "text", "text")}
    assert all([piece.is_learnt for piece in row.pieces] == [False, False, True] for _, row in rows)
