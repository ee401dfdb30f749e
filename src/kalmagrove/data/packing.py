"""Token files of a source: packed once, checked whenever they are opened, mapped into memory."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kalmagrove.data.batches import batch_at, window_count
from kalmagrove.data.compressed import COMPRESSION_SUFFIXES
from kalmagrove.data.pieces import make_encoder
from kalmagrove.data.sources import (
    TEXT_SUFFIXES,
    content_fingerprint,
    is_hub_name,
    source_fingerprint,
)
from kalmagrove.data.splits import HELD_OUT, SPLITS, split_documents
from kalmagrove.data.synthetic.options import full_name, is_synthetic, parse_synthetic, task_of
from kalmagrove.data.synthetic.source import synthetic_tokenizer
from kalmagrove.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    local_tokenizer_file,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import remove_abandoned, sha256_of, whole_folder, write_json_atomic

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_Value = TypeVar("_Value")
Progress = Callable[[str, int], None]

MANIFEST = "manifest.json"
_FORMAT = 1
_REMEDY = "delete the folder and prepare it again"
_BATCH_CHARACTERS = 1 << 21
_STORED_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class SplitInfo:
    """What one token file holds.

    Attributes:
        tokens: Tokens, the end-of-text ones among them.
        bytes: UTF-8 bytes of the text, without end-of-text tokens.
        words: Words of the text, separated by white space.
        documents: Documents, each with one end-of-text token after it.
        sha256: Of the file.
    """

    tokens: int
    bytes: int
    words: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class PackedText:
    """A folder of token files.

    Attributes:
        folder: Where the files are.
        splits: One entry for each of train, valid and test.
        vocab_size: One more than the largest token of the tokeniser.
        dtype: How tokens are stored: uint16 or uint32.
        fingerprint: SHA-256 over the tokeniser and all tokens.
        tokenizer_fingerprint: SHA-256 of the tokeniser.
        end_of_text_id: Token that stands after each document.
        source: The text's source; None is the built-in corpus.
    """

    folder: Path
    splits: dict[str, SplitInfo]
    vocab_size: int
    dtype: str
    fingerprint: str
    tokenizer_fingerprint: str
    end_of_text_id: int
    source: str | None

    def tokens(self, split: str) -> np.memmap:
        """The tokens of a split, (tokens,), read-only and mapped from the disk.

        Args:
            split: train, valid or test.
        """
        return np.memmap(_token_file(self.folder, split), dtype=_STORED_TYPES[self.dtype], mode="r")

    def model_options(self) -> dict[str, Any]:
        """What a model's configuration takes from its data."""
        return {"vocab_size": self.vocab_size}

    def check_context(self, context_length: int) -> None:
        """That the training text is long enough for one window.

        Raises:
            KalmaGroveError: It is not.
        """
        window_count(self.splits["train"].tokens, context_length)

    def batch(
        self,
        split: str,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        step: int,
        rows: range | None = None,
    ) -> torch.Tensor:
        """The batch of one training step, (rows, context + 1): `batch_at`."""
        import torch

        place: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "step": step, "rows": rows}
        return torch.from_numpy(batch_at(self.tokens(split), context_length=context_length, **place))

    def save_beside_model(self, folder: Path, *, context_length: int) -> None:
        """Writes the tokeniser into a model's folder."""
        save_tokenizer(self.load_tokenizer(), folder, context_length=context_length)

    def load_tokenizer(self) -> Tokenizer:
        """The tokeniser that made the tokens.

        Raises:
            KalmaGroveError: Its file is missing or damaged.
        """
        return load_tokenizer(str(self.folder))


def prepare(
    source: str | None,
    folder: Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PackedText:
    """Tokenise a source into a folder, or reuse the folder where it already holds just that.

    The folder takes its name only when all of it is on the disk. Memory does not grow with the text.

    Args:
        source: As for `iter_documents`.
        folder: Receives token files, a manifest and the tokeniser; must not exist, be empty, or come from a call
            with the same inputs.
        vocab_size: Vocabulary of the tokeniser that is trained on the training split; unused with ``tokenizer``, and
            for a synthetic task, which comes with its own.
        tokenizer: A tokenizer.json, a folder that holds one, or a Hub name.
        seed: Divides a source that has no splits.
        progress: Called now and then with ``"tokenizer"`` or ``"packing"`` and the bytes of text read so far.

    Raises:
        KalmaGroveError: The source or tokeniser cannot be used, or the folder holds something else.
        UsageError: The vocabulary is out of range, or a tokeniser is given for a synthetic task.
        OSError: The folder cannot be written.
    """
    if is_synthetic(source):
        if tokenizer is not None:
            raise UsageError(f"{source} comes with its own tokenizer; leave {tokenizer} out")
        source = full_name(parse_synthetic(source))
    inputs = {
        "source": source,
        "source_fingerprint": source_fingerprint(source),
        "vocab_size": vocab_size if tokenizer is None and not is_synthetic(source) else None,
        "tokenizer": None if tokenizer is None else _tokenizer_identity(tokenizer),
        "seed": seed,
        **{f"{split}_fraction": share for split, share in HELD_OUT.items()},
    }
    remove_abandoned(folder)
    if _is_taken(folder):
        return _reuse(folder, inputs)
    content = content_fingerprint(source)

    def documents() -> Iterator[tuple[str, str]]:
        return split_documents(source, seed=seed)

    report = progress or (lambda stage, done: None)
    if is_synthetic(source):
        used = synthetic_tokenizer(source)
    elif tokenizer is None:
        training_text = (document for split, document in documents() if split == "train")
        used = train_tokenizer(_reported(training_text, report), vocab_size)
    else:
        used = load_tokenizer(tokenizer)
    with whole_folder(folder, unless=MANIFEST) as temporary:
        _write_folder(temporary, documents(), used, inputs, content, report)
    return _reuse(folder, inputs)


def is_packed(folder: Path) -> bool:
    """Whether this is a folder that `prepare` wrote, to look at: `open_packed` examines it."""
    return (folder / MANIFEST).is_file() and b"tokenizer_fingerprint" in (folder / MANIFEST).read_bytes()


def open_packed(folder: Path, *, verify: bool = True) -> PackedText:
    """Open a folder that `prepare` wrote.

    Args:
        folder: The folder.
        verify: Whether to read the token files and the tokeniser and compare their SHA-256; sizes always are.

    Raises:
        KalmaGroveError: The folder is missing, its manifest is damaged, or a file is missing, cut or changed.
    """
    packed, _ = _open(folder, verify=verify)
    return packed


def default_data_folder(source: str | None, vocab_size: int, tokenizer: str | None, seed: int, root: Path) -> Path:
    """A readable folder name that is the same for the same choices, such as ``root/textbooks-bpe4096-1a2b3c4d``.

    Args:
        source: As for `prepare`.
        vocab_size: As for `prepare`.
        tokenizer: As for `prepare`.
        seed: As for `prepare`.
        root: Holds the folder.
    """
    if is_synthetic(source):
        options = parse_synthetic(source)
        identity = hashlib.sha256(full_name(options).encode()).hexdigest()[:8]
        return root / f"synthetic-{task_of(options)}-{identity}"
    python = "python-{}.{}.{}".format(*sys.version_info[:3])
    choices = [
        python if source is None else _absolute(source, is_hub_name(source)),
        vocab_size if tokenizer is None else None,
        None if tokenizer is None else _absolute(tokenizer, not Path(tokenizer).expanduser().exists()),
        seed,
    ]
    text = python if source is None else _readable(source)
    tokens = f"bpe{vocab_size}" if tokenizer is None else _readable(tokenizer)
    return root / f"{text}-{tokens}-{hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:8]}"


def _absolute(path_or_name: str, is_name: bool) -> str:
    return path_or_name if is_name else str(Path(path_or_name).expanduser().resolve())


def _readable(path_or_name: str) -> str:
    name = Path(path_or_name).expanduser().resolve().name
    while Path(name).suffix.lower() in (*TEXT_SUFFIXES, *COMPRESSION_SUFFIXES, ".json"):
        name = Path(name).stem
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "text"


def _tokenizer_identity(tokenizer: str) -> str:
    """A Hub name as it is, but the content of a local tokeniser, whose path says little."""
    if local_tokenizer_file(tokenizer) is None:
        return tokenizer
    return f"sha256:{tokenizer_fingerprint(load_tokenizer(tokenizer))}"


def _is_taken(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise KalmaGroveError(f"{folder} is a file; choose a folder that does not exist yet")
    if (folder / MANIFEST).exists():
        return True
    if any(folder.iterdir()):
        raise KalmaGroveError(
            f"{folder} holds other files and no packed text; choose a folder that is empty or does not exist yet"
        )
    return False


def _reuse(folder: Path, inputs: dict[str, Any]) -> PackedText:
    packed, earlier = _open(folder, verify=True)
    differing = [name for name, value in inputs.items() if earlier.get(name) != value]
    # The same files may be reached by another path, so the fingerprint decides about the source.
    if "source" in differing and "source_fingerprint" not in differing:
        differing.remove("source")
    if differing and {"source", "source_fingerprint"}.issuperset(differing) and _has_same_content(folder, inputs):
        return packed
    if not differing:
        return packed
    name = differing[0]
    if name == "source_fingerprint":
        difference = f"other content of {_shown(inputs['source'])}"
    else:
        difference = f"{name} {_shown(earlier.get(name))} and not {_shown(inputs[name])}"
    raise KalmaGroveError(f"{folder} was prepared with {difference}; choose another folder or delete that one")


def _has_same_content(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether only times of the source's files differ, as after a copy; they are then written down, where possible."""
    manifest = _read_manifest(folder / MANIFEST)
    content = manifest.get("source_content")
    if content is None or content_fingerprint(inputs["source"]) != content:
        return False
    with suppress(OSError):
        write_json_atomic(folder / MANIFEST, manifest | {"inputs": inputs})
    return True


def _shown(value: object) -> str:
    return "left out" if value is None else str(value)


def _reported(documents: Iterable[str], report: Progress) -> Iterator[str]:
    done = reported = 0
    for document in documents:
        yield document
        done += len(document.encode())
        if done - reported >= _BATCH_CHARACTERS:
            reported = done
            report("tokenizer", done)


def _write_folder(
    folder: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    inputs: dict[str, Any],
    content: str | None,
    report: Progress,
) -> None:
    vocab_size = vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    save_tokenizer(tokenizer, folder, context_length=None)
    splits = _write_tokens(folder, documents, tokenizer, _STORED_TYPES[dtype], report)
    for split, info in splits.items():
        if info.documents == 0:
            raise KalmaGroveError(f"the split {split} of {_shown(inputs['source'])} holds no text; put text in it")
    identity = tokenizer_fingerprint(tokenizer)
    manifest = {
        "format": _FORMAT,
        "fingerprint": _total_fingerprint(identity, splits),
        "tokenizer_fingerprint": identity,
        "vocab_size": vocab_size,
        "end_of_text_id": end_of_text_id(tokenizer),
        "dtype": dtype,
        "splits": {split: asdict(info) for split, info in splits.items()},
        "inputs": inputs,
        "source_content": content,
    }
    write_json_atomic(folder / MANIFEST, manifest)


def _write_tokens(
    folder: Path, documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, dtype: np.dtype, report: Progress
) -> dict[str, SplitInfo]:
    encode = make_encoder(tokenizer, dtype)
    end = np.array(end_of_text_id(tokenizer), dtype=dtype).tobytes()
    done = 0
    with ExitStack() as stack:
        writers: dict[str, _TokenWriter] = {}
        for split in SPLITS:
            writers[split] = _TokenWriter(_token_file(folder, split), dtype)
            stack.callback(writers[split].close)
        for batch in _batches(documents):
            stored = encode([text for _, text in batch])
            for (split, text), tokens in zip(batch, stored, strict=True):
                done += writers[split].add(text, tokens + end)
            report("packing", done)
    return {split: writer.info() for split, writer in writers.items()}


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for split, document in documents:
        batch.append((split, document))
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _TokenWriter:
    """Appends documents to one token file and counts what it holds."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._tokens = self._bytes = self._words = self._documents = 0

    def add(self, text: str, tokens: bytes) -> int:
        """Append a document with its stored tokens; returns the UTF-8 bytes of its text."""
        self._file.write(tokens)
        self._hash.update(tokens)
        size = len(text.encode())
        self._tokens += len(tokens) // self._dtype.itemsize
        self._bytes += size
        self._words += len(text.split())
        self._documents += 1
        return size

    def close(self) -> None:
        """The file is whole, and its folder brings it to the disk."""
        self._file.close()

    def info(self) -> SplitInfo:
        """What the file holds so far."""
        return SplitInfo(self._tokens, self._bytes, self._words, self._documents, self._hash.hexdigest())


def _open(folder: Path, *, verify: bool) -> tuple[PackedText, dict[str, Any]]:
    if not (folder / MANIFEST).is_file():
        raise KalmaGroveError(f"{folder} holds no packed text (no {MANIFEST}); prepare it first")
    manifest = _read_manifest(folder / MANIFEST)
    packed = _packed_text(folder, manifest)
    for split, info in packed.splits.items():
        _check_token_file(_token_file(folder, split), info, _STORED_TYPES[packed.dtype].itemsize, verify)
    if verify:
        _check_tokens(packed)
    return packed, manifest["inputs"]


def _check_tokens(packed: PackedText) -> None:
    """The tokeniser is the one that made the tokens, and it knows all of them."""
    tokenizer = packed.load_tokenizer()
    if tokenizer_fingerprint(tokenizer) != packed.tokenizer_fingerprint:
        raise KalmaGroveError(f"the content of {packed.folder / 'tokenizer.json'} changed; {_REMEDY}")
    found = {"vocab_size": vocabulary_size(tokenizer), "end_of_text_id": end_of_text_id(tokenizer)}
    for name, value in found.items():
        if getattr(packed, name) != value:
            raise KalmaGroveError(
                f"{packed.folder / MANIFEST} says {name} {getattr(packed, name)}, but its tokeniser's is {value}; "
                f"{_REMEDY}"
            )
    for split in packed.splits:
        if _largest_token(_token_file(packed.folder, split), _STORED_TYPES[packed.dtype]) >= packed.vocab_size:
            raise KalmaGroveError(f"{_token_file(packed.folder, split)} holds tokens that are none; {_REMEDY}")


def _largest_token(path: Path, dtype: np.dtype[Any]) -> int:
    largest = 0
    # In parts: of a mapped file all that was read would count as the process's memory.
    with path.open("rb") as file:
        while len(part := np.fromfile(file, dtype=dtype, count=_BATCH_CHARACTERS)):
            largest = max(largest, int(part.max()))
    return largest


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise KalmaGroveError(f"{path} is not sound JSON; {_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise KalmaGroveError(f"{path} is not of format {_FORMAT}, the one this version reads; {_REMEDY}")
    return manifest


def _packed_text(folder: Path, manifest: dict[str, Any]) -> PackedText:
    path = folder / MANIFEST
    rows = _field(path, manifest, "splits", dict)
    splits = {split: _split_info(path, _field(path, rows, split, dict)) for split in SPLITS}
    source = _field(path, manifest, "inputs", dict).get("source")
    packed = PackedText(
        folder=folder,
        splits=splits,
        vocab_size=_field(path, manifest, "vocab_size", int),
        dtype=_field(path, manifest, "dtype", str),
        fingerprint=_field(path, manifest, "fingerprint", str),
        tokenizer_fingerprint=_field(path, manifest, "tokenizer_fingerprint", str),
        end_of_text_id=_field(path, manifest, "end_of_text_id", int),
        source=None if source is None else str(source),
    )
    if packed.dtype not in _STORED_TYPES:
        raise KalmaGroveError(f"{path} names the unknown token type {packed.dtype!r}; {_REMEDY}")
    if packed.fingerprint != _total_fingerprint(packed.tokenizer_fingerprint, splits):
        raise KalmaGroveError(f"the fingerprint in {path} does not match the files it lists; {_REMEDY}")
    return packed


def _split_info(path: Path, row: dict[str, Any]) -> SplitInfo:
    info = SplitInfo(
        tokens=_field(path, row, "tokens", int),
        bytes=_field(path, row, "bytes", int),
        words=_field(path, row, "words", int),
        documents=_field(path, row, "documents", int),
        sha256=_field(path, row, "sha256", str),
    )
    for name, least in (("tokens", 1), ("bytes", 0), ("words", 0), ("documents", 1)):
        if not least <= getattr(info, name) < 1 << 53:
            raise KalmaGroveError(f"the field {name} of {path} is out of range; {_REMEDY}")
    return info


def _field(path: Path, values: dict[str, Any], name: str, kind: type[_Value]) -> _Value:
    value = values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise KalmaGroveError(f"the field {name} of {path} is missing or not of type {kind.__name__}; {_REMEDY}")
    return value


def _check_token_file(path: Path, info: SplitInfo, item_bytes: int, verify: bool) -> None:
    if not path.is_file():
        raise KalmaGroveError(f"{path} is missing; {_REMEDY}")
    expected, found = info.tokens * item_bytes, path.stat().st_size
    if found != expected:
        raise KalmaGroveError(f"{path} holds {found} bytes, but the manifest says {expected}; {_REMEDY}")
    if verify and sha256_of(path) != info.sha256:
        raise KalmaGroveError(f"the content of {path} changed; {_REMEDY}")


def _token_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.bin"


def _total_fingerprint(tokenizer: str, splits: dict[str, SplitInfo]) -> str:
    parts = [tokenizer, *(f"{split}:{splits[split].sha256}" for split in SPLITS)]
    # A spoiled manifest may hold half a surrogate pair, and then fits no file.
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()
