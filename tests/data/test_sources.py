"""Documents are read from every kind of source, and unusable sources are named."""

import gzip
import json
import lzma
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from kalmagrove.data.sources import (
    LONGEST_DOCUMENT,
    cut_at_line_ends,
    is_hub_name,
    iter_documents,
    iter_file,
    source_files,
    source_fingerprint,
)
from kalmagrove.errors import KalmaGroveError

TWO_DOCUMENTS = "one \u00e9\r\nmore\n<|endoftext|>\n\n<|endoftext|>\ntwo <|endoftext|> inside"
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": partial(gzip.compress, mtime=0),
    ".zst": zstandard.ZstdCompressor().compress,
}


class Rows:
    def __init__(self, texts: list[str | None], column: str = "text") -> None:
        self.column_names = [column]
        self._rows = [{column: text} for text in texts]

    def __iter__(self) -> Iterator[dict[str, str | None]]:
        return iter(self._rows)


def as_parquet(texts: list[str | None], column: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), sink)
    return sink.getvalue().to_pybytes()


def error_of(source: str | None) -> str:
    with pytest.raises(KalmaGroveError) as caught:
        list(iter_documents(source))
    return str(caught.value)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".parquet", ".py"])
def test_every_type_is_read_plain_and_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    documents: list[str | None] = ["one \u00e9\r\nmore\n", " \n", "two <|endoftext|> inside"]
    content = {
        ".jsonl": "\n".join(json.dumps({"id": 1, "text": text}) for text in documents).encode() + b"\n\n",
        ".parquet": as_parquet([*documents, None]),
    }.get(suffix, TWO_DOCUMENTS.encode())
    path = tmp_path / f"a.b{suffix}{compression}"
    path.write_bytes(COMPRESSIONS[compression](content))
    expected = [TWO_DOCUMENTS] if suffix == ".py" else [documents[0], documents[2]]
    assert list(iter_documents(str(path))) == expected


def test_several_zstd_frames_are_one_file_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(b"\xef\xbb\xbfa\xc3") + compress(b"\xa9b"))
    assert list(iter_documents(str(path))) == ["a\u00e9b"]


def test_a_folder_is_read_sorted_and_recursively_without_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ["b/2.txt", "b/1.txt.gz", "a.py", "c.JSONL", ".hidden/x.txt", "b/.x.txt", "image.png", "__init__.py"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "b/2.txt").write_text("two")
    (tmp_path / "b/1.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "c.JSONL").write_text('{"text": "lines"}')
    assert [file.name for file in source_files(str(tmp_path))] == [
        "__init__.py",
        "a.py",
        "b/1.txt.gz",
        "b/2.txt",
        "c.JSONL",
    ]
    assert list(iter_documents(str(tmp_path))) == ["code", "one", "two", "lines"]


def test_a_long_text_is_cut_at_line_ends_and_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.txt.xz"
    line = "0123456789" * 99 + "\n"
    with lzma.open(path, "wt", preset=0) as file:
        for _ in range(40):
            file.write(line * 1000)
    tracemalloc.start()
    count = total = 0
    for document in iter_documents(str(path)):
        assert LONGEST_DOCUMENT - len(line) < len(document) <= LONGEST_DOCUMENT or total + len(document) == 40_000 * 991
        assert document.endswith("\n")
        count, total = count + 1, total + len(document)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 40_000 * 991 and count == 38
    assert peak < total / 3


def test_a_line_longer_than_a_document_is_cut_inside(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    text = "\u00e9" * (2 * LONGEST_DOCUMENT + 7)
    path.write_text(text, encoding="utf-8")
    documents = list(iter_documents(str(path)))
    assert "".join(documents) == text and max(map(len, documents)) == LONGEST_DOCUMENT


def test_pieces_of_a_text_join_to_the_text() -> None:
    text = "aaa\nbb\n\ncccccccccc\nd"
    assert list(cut_at_line_ends(text, 7)) == ["aaa\nbb\n", "\n", "ccccccc", "ccc\nd"]


def test_the_built_in_corpus_is_library_code_without_tests_and_tables() -> None:
    names = [file.name for file in source_files(None)]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names) and all(name.endswith(".py") for name in names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"}
    assert not [name for name in names if "sysconfigdata" in name]
    first = next(document for document in iter_documents(None) if "Command-line parsing library" in document)
    assert "class ArgumentParser" in first


def test_a_python_without_library_sources_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert "comes without the source files of its standard library; give a file or folder" in error_of(None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty or holds only white space"),
        ("a.md", b" \n<|endoftext|>\n", "a.md is empty or holds only white space"),
        ("a.csv", b"x", "a.csv is of no supported type; use .txt, .md, .py, .jsonl, .parquet"),
        ("a.xz", b"x", "a.xz is of no supported type"),
        ("a.txt", b"a\0b", "a.txt is not text: it holds NUL bytes"),
        ("a.txt", b"caf\xe9 noir", "a.txt is not text in UTF-8"),
        ("a.txt", b"cut \xc3", "a.txt is not text in UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n["text"]\n',
            "line 3 of {}/a.jsonl is not a JSON object with a string field text",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 of {}/a.jsonl is not a JSON object"),
        ("a.jsonl", b'{"text": "a"', "line 1 of {}/a.jsonl is not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 of {}/a.jsonl holds half a surrogate pair"),
        ("a.parquet", b"PAR1 nothing", "a.parquet is not a sound parquet file"),
        ("a.txt.xz", lzma.compress(b"abc" * 99)[:-9], "a.txt.xz is damaged or cut short"),
        ("a.txt.xz", b"no xz", "a.txt.xz is damaged or cut short"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "a.txt.gz is damaged or cut short"),
        ("a.txt.gz", b"no gz", "a.txt.gz is damaged or cut short"),
        ("a.txt.zst", COMPRESSIONS[".zst"](b"abc" * 99)[:-2], "a.txt.zst is damaged or cut short"),
        ("a.txt.zst", b"no zst", "a.txt.zst is damaged or cut short"),
        ("a.parquet.gz", b"no gz", "a.parquet.gz is damaged or cut short"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message.format(tmp_path) in error_of(str(tmp_path / name))


def test_a_parquet_file_needs_a_column_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    assert "a.parquet has no column named text; its columns are body, id" in error_of(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path)
    assert "the column text of" in error_of(str(path)) and "holds int64, not strings" in error_of(str(path))


def test_an_empty_file_in_a_folder_is_wrong_unless_it_is_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("")
    assert "hold no text; give a source with text in it" in error_of(str(tmp_path))
    (tmp_path / "b.txt").write_text("text")
    assert list(iter_documents(str(tmp_path))) == ["text"]
    (tmp_path / "c.txt").write_text("")
    assert "c.txt is empty" in error_of(str(tmp_path))


def test_a_folder_without_usable_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"x")
    assert error_of(str(tmp_path)).startswith(f"the folder {tmp_path} holds no usable file; put .txt")


@pytest.mark.parametrize("source", ["gone", "/gone/a", "./gone/a", "a/b/c", "owner/gone.txt", "gone.jsonl.zst", ""])
def test_a_missing_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("text")
    assert f"there is no file or folder {source!r}; check the path" in error_of(source)


def test_a_missing_file_given_directly_is_named(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match=r"there is no file .*gone\.txt"):
        list(iter_file(tmp_path / "gone.txt"))


def test_only_what_cannot_be_a_path_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("wikitext:wikitext-103-raw-v1") and is_hub_name("owner/name") and is_hub_name("o/n-1.5:default")
    assert not any(map(is_hub_name, ["name", "o/n.txt", "o/n.jsonl.gz", "./o/n", "~/o", "C:\\texts", "a/b/c", "/o/n"]))
    (tmp_path / "owner/name").mkdir(parents=True)
    assert not is_hub_name("owner/name")


def test_a_hub_data_set_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("owner/name:small") == (
        "owner/name:small is no file or folder here; to read it from the Hub, install datasets with: "
        "pip install 'kalmagrove[data]'"
    )


def test_rows_of_a_hub_data_set_are_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments: object) -> dict[str, Rows]:
        calls.append(arguments)
        return {"train": Rows(["a", None, "", "b"]), "test": Rows(["c"])}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(iter_documents("owner/name:small")) == ["a", "b", "c"]
    list(iter_documents("owner/name"))
    assert calls == [("owner/name", "small"), ("owner/name", None)]


def test_the_lines_of_wikitext_are_joined_to_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = One = \n", "", " text \n", " = = Part = = \n", " = Two , a = b = \n", " more \n"]
    data = SimpleNamespace(load_dataset=lambda *_: {"train": Rows(list(lines))})
    monkeypatch.setitem(sys.modules, "datasets", data)
    assert list(iter_documents("Salesforce/wikitext:raw")) == [
        " = One = \n text \n = = Part = = \n",
        " = Two , a = b = \n more \n",
    ]


def test_an_unusable_hub_data_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("not found\nlong story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    assert error_of("o/n").endswith("could not be opened as a Hub data set: not found")
    data = SimpleNamespace(load_dataset=lambda *_: {"train": Rows(["a"], column="body")})
    monkeypatch.setitem(sys.modules, "datasets", data)
    assert error_of("o/n") == "o/n has no column named text; its columns are body"


def test_the_fingerprint_follows_names_sizes_and_times_only(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 5))
    first = source_fingerprint(str(path))
    assert source_fingerprint(f"{tmp_path}/../{tmp_path.name}/a.txt") == first
    os.utime(path, ns=(0, 6))
    assert source_fingerprint(str(path)) != first
    path.write_text("three")
    os.utime(path, ns=(0, 5))
    assert source_fingerprint(str(path)) != first
    assert source_fingerprint("o/n:a") != source_fingerprint("o/n:b")
