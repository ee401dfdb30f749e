"""Documents of a text source: files, folders, Hub data sets, synthetic tasks and the built-in corpus, streamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalmagrove.data.compressed import (
    COMPRESSION_SUFFIXES,
    import_data_extra,
    is_unicode,
    iter_lines,
    json_lines,
    open_parquet,
)
from kalmagrove.data.synthetic.options import is_synthetic
from kalmagrove.data.synthetic.source import synthetic_fingerprint, synthetic_splits
from kalmagrove.errors import KalmaGroveError, first_line
from kalmagrove.files import sha256_of

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
SEPARATOR = "<|endoftext|>"
"""A line that holds only this ends a document of a .txt or .md file."""
LONGEST_DOCUMENT = 1 << 20
"""Characters after which a document of a text file is cut at a line end, so that any file can be streamed."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_ARTICLE_TITLE = re.compile(r" = [^=](.*[^=])? = \n?")
_NO_CORPUS_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
_NO_CORPUS_FILES = re.compile(r"_sysconfigdata.*|stringprep\.py|entities\.py|python-config\.py")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: Where it is.
        name: Its path relative to the source, with forward slashes.
    """

    path: Path
    name: str


def iter_documents(source: str | None) -> Iterator[str]:
    """Stream the documents of a source, always in the same order.

    Args:
        source: A file, a folder (all its usable files, sorted), a Hub data set with its config
            (``wikitext:wikitext-103-raw-v1``), a synthetic task (``synthetic:markov,states=64``), or None for the
            built-in corpus.

    Yields:
        Documents that hold more than white space.

    Raises:
        KalmaGroveError: The source does not exist, cannot be read or holds no text.
    """
    if source is not None and (is_synthetic(source) or is_hub_name(source)):
        for documents in (synthetic_splits(source) if is_synthetic(source) else hub_splits(source)).values():
            yield from documents
        return
    one_file = source is not None and _local_path(source).is_file()
    documents_found = False
    for file in source_files(source):
        for document in iter_file(file.path, may_be_empty=not one_file and kind_of_file(file.path) == ".py"):
            documents_found = True
            yield document
    if not documents_found:
        raise KalmaGroveError(f"the files of {source} hold no text; give a source with text in it")


def iter_file(path: Path, *, may_be_empty: bool = False) -> Iterator[str]:
    """Stream the documents of one file.

    Args:
        path: A .txt, .md, .py, .jsonl or .parquet file, perhaps also .xz, .gz or .zst.
        may_be_empty: Whether a file without text, such as an empty ``__init__.py``, is right.

    Yields:
        Documents that hold more than white space.

    Raises:
        KalmaGroveError: The file is missing, of another type, damaged, not text, or empty though it may not be.
    """
    kind = kind_of_file(path)
    if kind is None:
        raise KalmaGroveError(
            f"{path} is of no supported type; use {', '.join(TEXT_SUFFIXES)}, each perhaps with "
            f"{', '.join(COMPRESSION_SUFFIXES)} after it"
        )
    if not path.is_file():
        raise KalmaGroveError(f"there is no file {path}; check the path")
    if kind == ".jsonl":
        documents = _jsonl_documents(path)
    elif kind == ".parquet":
        documents = _parquet_documents(path)
    else:
        documents = _text_documents(path, separator=None if kind == ".py" else SEPARATOR)
    empty = True
    for document in documents:
        if document and not document.isspace():
            empty = False
            yield document
    if empty and not may_be_empty:
        raise KalmaGroveError(f"{path} is empty or holds only white space; remove it or put text in it")


def source_files(source: str | None, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[SourceFile]:
    """The files of a local source or of the built-in corpus, sorted by name.

    Args:
        source: A file, a folder, or None for the built-in corpus.
        suffixes: Of the files that count in a folder, each perhaps with that of a compression after it.

    Raises:
        KalmaGroveError: The path does not exist, or the folder holds no usable file.
    """
    if source is None:
        return _built_in_files(Path(sysconfig.get_path("stdlib")))
    path = _local_path(source)
    if path.is_file():
        return [SourceFile(path, path.name)]
    if not source or not path.is_dir():
        raise KalmaGroveError(
            f"there is no file or folder {source!r}; check the path, or name a Hub data set as name:config"
        )
    files = [file for file in _files_below(path) if kind_of_file(file.path, suffixes) is not None]
    if not files:
        raise KalmaGroveError(f"the folder {source} holds no usable file; put {', '.join(suffixes)} files in it")
    return files


def source_fingerprint(source: str | None) -> str:
    """SHA-256 that changes when a source does: over the names, sizes and times of its files, its Hub name or options.

    Raises:
        KalmaGroveError: As for `source_files`.
        UsageError: As for `open_synthetic`.
    """
    if is_synthetic(source):
        return synthetic_fingerprint(source)
    if source is not None and is_hub_name(source):
        return hashlib.sha256(f"hub:{source}".encode()).hexdigest()
    states = [(file.name, file.path.stat()) for file in source_files(source)]
    rows = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def content_fingerprint(source: str | None, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> str | None:
    """SHA-256 over the names and bytes of a source's files, whatever their times; None where it has no files.

    Args:
        source: As for `iter_documents`.
        suffixes: As for `source_files`.

    Raises:
        KalmaGroveError: As for `source_files`.
        OSError: A file cannot be read.
    """
    if source is not None and (is_synthetic(source) or is_hub_name(source)):
        return None
    whole = hashlib.sha256()
    for item in source_files(source, suffixes):
        whole.update(json.dumps([item.name, sha256_of(item.path)]).encode())
    return whole.hexdigest()


def is_hub_name(source: str) -> bool:
    """Whether a source names a Hub data set: nothing on disk has this name, and it looks like no path."""
    if (
        is_synthetic(source)
        or _local_path(source).exists()
        or Path(source).suffix.lower() in TEXT_SUFFIXES + COMPRESSION_SUFFIXES
    ):
        return False
    return _HUB_NAME.fullmatch(source) is not None and (":" in source or "/" in source)


def hub_splits(source: str) -> dict[str, Iterator[str]]:
    """Documents of each split of a Hub data set, under the data set's own split names.

    Rows are documents, but for WikiText, whose rows are lines: there an article is a document.

    Args:
        source: ``name`` or ``name:config``, where the name may hold an owner.

    Raises:
        KalmaGroveError: ``datasets`` is not installed, the data set cannot be opened, or it has no text column.
    """
    name, _, config = source.partition(":")
    datasets = import_data_extra("datasets", f"{source} is no file or folder here; to read it from the Hub")
    try:
        loaded = datasets.load_dataset(name, config or None)
    # The library raises many unrelated kinds of errors, those of the network among them.
    except Exception as error:
        reason = first_line(error)
        raise KalmaGroveError(
            f"{source} is no file or folder here and could not be opened as a Hub data set: {reason}"
        ) from error
    return {split: _hub_documents(source, rows) for split, rows in loaded.items()}


def cut_at_line_ends(text: str, longest: int) -> Iterator[str]:
    """Cut a text into pieces of at most ``longest`` characters, at line ends where there are any.

    Args:
        text: Any text; the pieces joined give it back.
        longest: Characters of the longest piece.
    """
    return _joined_lines(_bounded(text.splitlines(keepends=True), longest), longest, separator=None)


def _hub_documents(source: str, rows: Any) -> Iterator[str]:
    if "text" not in rows.column_names:
        raise KalmaGroveError(f"{source} has no column named text; its columns are {', '.join(rows.column_names)}")
    texts = (row["text"] for row in rows if row["text"] is not None)
    name = source.partition(":")[0].rpartition("/")[2]
    documents = _articles(texts) if name == "wikitext" else texts
    return (document for document in documents if document and not document.isspace())


def _articles(lines: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if article and _ARTICLE_TITLE.fullmatch(line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def _local_path(source: str) -> Path:
    return Path(source).expanduser()


def kind_of_file(path: Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> str | None:
    """Which of the suffixes a file has, before that of a compression; None is another."""
    own = [suffix.lower() for suffix in path.suffixes]
    if own and own[-1] in COMPRESSION_SUFFIXES:
        own.pop()
    return own[-1] if own and own[-1] in suffixes else None


def _files_below(root: Path, left_out: frozenset[str] = frozenset()) -> list[SourceFile]:
    found = []
    for folder, folder_names, file_names in os.walk(root):
        folder_names[:] = [name for name in folder_names if not name.startswith(".") and name not in left_out]
        paths = [Path(folder, name) for name in file_names if not name.startswith(".")]
        found += [SourceFile(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return sorted(found, key=lambda file: file.name)


def _built_in_files(library: Path) -> list[SourceFile]:
    files = [
        file
        for file in _files_below(library, _NO_CORPUS_FOLDERS)
        if file.path.suffix == ".py" and not _NO_CORPUS_FILES.fullmatch(file.path.name)
    ]
    if not files:
        raise KalmaGroveError(
            "the built-in corpus is empty because this Python comes without the source files of its standard "
            "library; give a file or folder as the source"
        )
    return files


def _text_documents(path: Path, separator: str | None) -> Iterator[str]:
    return _joined_lines(_bounded(iter_lines(path, LONGEST_DOCUMENT), LONGEST_DOCUMENT), LONGEST_DOCUMENT, separator)


def _joined_lines(lines: Iterable[str], longest: int, separator: str | None) -> Iterator[str]:
    """Documents of at most ``longest`` characters from lines that are no longer than that."""
    document: list[str] = []
    size = 0
    for line in lines:
        at_separator = separator is not None and line.rstrip("\r\n") == separator
        if document and (at_separator or size + len(line) > longest):
            yield "".join(document)
            document, size = [], 0
        if not at_separator:
            document.append(line)
            size += len(line)
    if document:
        yield "".join(document)


def _bounded(lines: Iterable[str], longest: int) -> Iterator[str]:
    for line in lines:
        if len(line) <= longest:
            yield line
        else:
            yield from (line[start : start + longest] for start in range(0, len(line), longest))


def _jsonl_documents(path: Path) -> Iterator[str]:
    for number, row in json_lines(path):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise KalmaGroveError(
                f"line {number} of {path} is not a JSON object with a string field text; mend or remove that line"
            )
        if not is_unicode(text):
            raise KalmaGroveError(f"line {number} of {path} holds half a surrogate pair; mend or remove that line")
        yield text


def _parquet_documents(path: Path) -> Iterator[str]:
    with open_parquet(path) as (table, pyarrow):
        schema = table.schema_arrow
        if "text" not in schema.names:
            raise KalmaGroveError(f"{path} has no column named text; its columns are {', '.join(schema.names)}")
        kind = schema.field("text").type
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise KalmaGroveError(f"the column text of {path} holds {kind}, not strings; store text in it")
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
