"""Files are replaced whole or not at all."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.errors import KalmaGroveError
from kalmagrove.files import (
    finite_or_null,
    read_json_object,
    temporary_name,
    whole_folder,
    write_json_atomic,
    write_text_atomic,
)


def test_text_replaces_the_old_content_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("a much longer old text")
    write_text_atomic(path, "neu \u00fc\r\n")
    assert path.read_bytes() == "neu \u00fc\r\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content_and_removes_the_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "note.txt"
    write_text_atomic(path, "old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["note.txt"]


def test_content_reaches_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noting(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls.append(name)
            original(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    write_text_atomic(tmp_path / "note.txt", "text")
    assert calls[:2] == ["fsync", "replace"]


def test_json_is_standard_json_with_null_for_numbers_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json_atomic(path, {"loss": math.nan, "nested": [math.inf, (1.5, -math.inf)], "name": "\u00e9", "ok": True})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {
        "loss": None,
        "nested": [None, [1.5, None]],
        "name": "\u00e9",
        "ok": True,
    }
    assert text.endswith("}\n")


def test_a_json_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json_atomic(path, {"name": "\u00e9", "steps": [1]})
    assert read_json_object(path, "remove it") == {"name": "\u00e9", "steps": [1]}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'"text"', b'{"a": "\xff"}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "a list", "a number", "null", "a text", "no UTF-8", "too deep", "too long a number"],
)
def test_what_is_no_json_object_is_named_with_its_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(KalmaGroveError) as caught:
        read_json_object(path, "remove it to write it anew")
    assert str(caught.value) == f"{path} is damaged; remove it to write it anew"


def test_a_json_object_that_is_not_there_is_the_system_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "value.json", "remove it")


def test_finite_or_null_does_not_change_its_argument() -> None:
    value = {"losses": [math.nan, 2.0]}
    assert finite_or_null(value) == {"losses": [None, 2.0]}
    assert math.isnan(value["losses"][0])


def test_a_folder_appears_whole_and_what_a_dead_process_left_goes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with whole_folder(tmp_path / "new" / "folders" / "model") as temporary:
        (temporary / "a").write_text("a")
    assert (tmp_path / "new" / "folders" / "model" / "a").read_text() == "a"
    shutil.rmtree(tmp_path / "new")
    path = tmp_path / "model"
    left = temporary_name(path).with_name(temporary_name(path).name.replace(str(os.getpid()), str(process.pid)))
    left.mkdir()
    (left / "half").write_text("written")
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("a")
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    with pytest.raises(RuntimeError), whole_folder(path) as temporary:
        (temporary / "b").write_text("b")
        raise RuntimeError
    assert [entry.name for entry in path.iterdir()] == ["a"] and [e.name for e in tmp_path.iterdir()] == ["model"]
