"""Examples packed into a folder: written once, checked whenever they are opened, mapped into memory."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kalmagrove.data.batches import shuffled_order
from kalmagrove.data.example_checks import check_examples
from kalmagrove.data.examples import Example, ExampleSource
from kalmagrove.data.packing import MANIFEST, Progress, SplitInfo
from kalmagrove.data.part_sequences import StoredParts, placed_sequences, store_parts
from kalmagrove.data.splits import SPLITS
from kalmagrove.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import sha256_of, whole_folder, write_json_atomic
from kalmagrove.modalities.registry import make_modality
from kalmagrove.modalities.sequences import Sequences

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = "examples-1"
SCHEMA = "modality.json"
"""Beside a model: what is needed to read further rows."""
_REMEDY = "delete the folder and prepare it again"
_TYPES = {"tokens": "<u4", "weights": "u1", "slots": "<u4", "places": "<u2", "parts": "<u8", "examples": "<u8"}


@dataclass(frozen=True)
class PackedExamples:
    """A folder of examples, in the place of a packed text.

    Attributes:
        folder: Where the files are.
        modality: table, image or mixed.
        splits: One entry for each of train, valid and test; words are values, and documents are examples.
        longest: Tokens of the longest example, its beginning and end among them.
        vocab_size: One more than the largest token of the tokeniser.
        modalities: Options of the modalities, by name.
        shuffles: Whether parts are learnt in any order.
        predicts_end: Whether the end of an example is to be predicted.
        fingerprint: SHA-256 over everything that a model learns from.
        tokenizer_fingerprint: SHA-256 of the tokeniser.
        end_of_text_id: Token before and after each example.
        source: Where the examples come from.
    """

    folder: Path
    modality: str
    splits: dict[str, SplitInfo]
    longest: int
    vocab_size: int
    modalities: dict[str, dict[str, Any]]
    shuffles: bool
    predicts_end: bool
    fingerprint: str
    tokenizer_fingerprint: str
    end_of_text_id: int
    source: str

    def model_options(self) -> dict[str, Any]:
        """What a model's configuration takes from its data.

        Rows of a table are short, and each cell asks for another single one: they are seen token by token.
        """
        attention = {"attention": "full"} if self.modality == "table" else {}
        return {"vocab_size": self.vocab_size, "modalities": self.modalities, **attention}

    def load_tokenizer(self) -> Tokenizer:
        """The tokeniser that has the examples' tokens."""
        return load_tokenizer(str(self.folder))

    def save_beside_model(self, folder: Path, *, context_length: int) -> None:
        """Writes the tokeniser and the schema into a model's folder."""
        save_tokenizer(self.load_tokenizer(), folder, context_length=context_length)
        write_json_atomic(folder / SCHEMA, self.schema())

    @cached_property
    def feature_sizes(self) -> dict[str, int]:
        """Numbers in a feature vector, by modality."""
        return {name: _feature_size(name, options) for name, options in self.modalities.items()}

    def schema(self) -> dict[str, Any]:
        """What is needed to read further rows like these."""
        return read_schema(self.folder)

    def check_context(self, context_length: int) -> None:
        """That every example fits.

        Raises:
            UsageError: One is longer.
        """
        if self.longest - 1 > context_length:
            raise UsageError(
                f"the longest example of {self.source} needs --loop.context_length {self.longest - 1}, got "
                f"{context_length}"
            )

    def batch(
        self,
        split: str,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        step: int,
        rows: range | None = None,
    ) -> Sequences:
        """The batch of one training step; a pure function of its arguments, each epoch in an order of its own.

        Returns:
            (rows, context + 1) tokens, or as many as the longest example has, where these are fewer.
        """
        count = self.splits[split].documents
        numbers = [step * batch_size + row for row in (range(batch_size) if rows is None else rows)]
        chosen = [(int(shuffled_order(count, seed, n // count)[n % count]), n // count) for n in numbers]
        return self._sequences(split, chosen, seed, min(context_length + 1, self.longest))

    def rows(self, split: str, rows: range) -> Sequences:
        """Examples of a split in their order, (rows, longest); the order of shuffled parts is always the same."""
        return self._sequences(split, [(row, 0) for row in rows], 0, self.longest)

    def _sequences(self, split: str, chosen: list[tuple[int, int]], seed: int, width: int) -> Sequences:
        stored, example_ends = _map_split(self, split)
        orders = []
        for example, epoch in chosen:
            first, end = _range(example_ends, example)
            order = shuffled_order(end - first, seed, epoch, example) if self.shuffles else np.arange(end - first)
            orders.append(first + order)
        sequences = placed_sequences(
            stored,
            orders,
            end_token=self.end_of_text_id,
            placeholders=_placeholders(self.modalities),
            width=width,
            predicts_end=self.predicts_end,
        )
        is_flat = not any(_is_square(name) for name in self.modalities)
        return replace(sequences, axes=None) if is_flat else sequences


def _is_square(name: str) -> bool:
    """Whether elements of a modality lie in rows and columns."""
    return name == "patch"


def _feature_size(name: str, options: dict[str, Any]) -> int:
    with torch.device("meta"):
        return make_modality(name, 1, options).feature_size


def _placeholders(modalities: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {name: options["placeholder"] for name, options in modalities.items()}


def _map_split(data: PackedExamples, split: str) -> tuple[StoredParts, np.ndarray]:
    """The mapped files of one split, and behind which part each example ends."""

    def mapped(name: str, kind: str) -> np.ndarray:
        path = _file(data.folder, split, name)
        # An empty file cannot be mapped.
        return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, dtype=kind)

    own = {name: mapped(name, kind) for name, kind in _TYPES.items()}
    stored = StoredParts(
        tokens=own["tokens"],
        weights=own["weights"],
        places=own["places"].reshape(-1, 2),
        slots=own["slots"],
        part_ends=own["parts"],
        features={name: mapped(name, "<f4").reshape(-1, size) for name, size in data.feature_sizes.items()},
    )
    return stored, own["examples"]


def _range(ends: np.ndarray, index: int) -> tuple[int, int]:
    return (int(ends[index - 1]) if index else 0), int(ends[index])


def prepare_examples(source: ExampleSource, folder: Path, *, progress: Progress | None = None) -> PackedExamples:
    """Packs examples into a folder, or opens the folder where it already holds just those.

    Args:
        source: The examples.
        folder: Takes its name only when all of it is on the disk.
        progress: Called now and then with ``"packing"`` and the bytes that were read.

    Raises:
        KalmaGroveError: The source cannot be read, a split has no example, or the folder holds something else.
        OSError: The folder cannot be written.
    """
    if (folder / MANIFEST).is_file():
        packed, inputs = _open(folder, verify=True)
        if inputs != json.loads(json.dumps(source.inputs)):
            raise KalmaGroveError(
                f"{folder} was prepared from something else; choose another folder or delete that one"
            )
        return packed
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KalmaGroveError(f"{folder} holds other files; choose a folder that is empty or does not exist yet")
    with whole_folder(folder, unless=MANIFEST) as temporary:
        _write(source, temporary, progress or (lambda stage, done: None))
    return _open(folder, verify=True)[0]


def open_examples(folder: Path, *, verify: bool = True) -> PackedExamples:
    """Opens a folder that `prepare_examples` wrote.

    Raises:
        KalmaGroveError: It is missing, its manifest is damaged, or a file is missing, cut or changed.
    """
    return _open(folder, verify=verify)[0]


def holds_examples(folder: Path) -> bool:
    """Whether this is a folder that `prepare_examples` wrote, to look at: `open_examples` examines it."""
    path = folder / MANIFEST
    return path.is_file() and FORMAT.encode() in path.read_bytes()


def read_schema(folder: Path) -> dict[str, Any]:
    """What a folder of examples or a model that learnt from them says about its rows.

    Raises:
        KalmaGroveError: There is no such file, or it is damaged.
    """
    try:
        schema = json.loads((folder / SCHEMA).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KalmaGroveError(
            f"{folder} holds no {SCHEMA}; give a model that was trained on tables or images"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise KalmaGroveError(f"{folder / SCHEMA} cannot be read: {error}") from error
    if not isinstance(schema, dict):
        raise KalmaGroveError(f"{folder / SCHEMA} is no JSON object; {_REMEDY}")
    return schema


def _file(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}.{name}.bin"


def _write(source: ExampleSource, folder: Path, progress: Progress) -> None:
    save_tokenizer(source.tokenizer, folder, context_length=None)
    write_json_atomic(folder / SCHEMA, source.schema)
    splits: dict[str, Any] = {}
    longest = 0
    for split in SPLITS:
        with ExitStack() as stack:
            writer = _SplitWriter(folder, split, source.modalities, stack)
            for example in source.examples(split):
                writer.add(example)
                progress("packing", writer.bytes)
        if writer.documents == 0:
            raise KalmaGroveError(f"the split {split} of {source.source} holds no example; give more rows")
        if writer.predicted == 0 and not source.predicts_end:
            raise KalmaGroveError(
                f"the split {split} of {source.source} has nothing to predict: no value there is one that a training "
                "row had; give more rows, or more columns"
            )
        longest = max(longest, writer.longest)
        names = [*_TYPES, *source.modalities]
        digest = hashlib.sha256("".join(_digest(_file(folder, split, name)) for name in names).encode()).hexdigest()
        splits[split] = asdict(SplitInfo(writer.tokens, writer.bytes, writer.words, writer.documents, digest))
    manifest = {
        "format": FORMAT,
        "modality": source.modality,
        "source": source.source,
        "splits": splits,
        "longest": longest,
        "vocab_size": vocabulary_size(source.tokenizer),
        "modalities": source.modalities,
        "shuffles": source.shuffles,
        "predicts_end": source.predicts_end,
        "tokenizer_fingerprint": tokenizer_fingerprint(source.tokenizer),
        "end_of_text_id": end_of_text_id(source.tokenizer),
        "schema_sha256": _digest(folder / SCHEMA),
        "inputs": source.inputs,
    }
    write_json_atomic(folder / MANIFEST, manifest | {"fingerprint": _fingerprint(manifest)})


class _SplitWriter:
    """Appends examples to the files of one split, and counts what they hold."""

    def __init__(self, folder: Path, split: str, modalities: dict[str, dict[str, Any]], stack: ExitStack) -> None:
        names = [*_TYPES, *modalities]
        self._files = {name: stack.enter_context(_file(folder, split, name).open("wb")) for name in names}
        self._placeholders = _placeholders(modalities)
        self._sizes = {name: _feature_size(name, options) for name, options in modalities.items()}
        self._elements = dict.fromkeys(modalities, 0)
        self._parts = 0
        self.tokens = self.bytes = self.words = self.documents = self.longest = self.predicted = 0

    def add(self, example: Example) -> None:
        own = store_parts(example.parts, placeholders=self._placeholders, sizes=self._sizes)
        for name, features in own.features.items():
            own.slots[own.tokens == self._placeholders[name]] += self._elements[name]
            self._elements[name] += len(features)
            self._put(name, features, "<f4")
        for name, values in (
            ("tokens", own.tokens),
            ("weights", own.weights),
            ("slots", own.slots),
            ("places", own.places),
            ("parts", self.tokens + own.part_ends),
            ("examples", np.array([self._parts + len(example.parts)])),
        ):
            self._put(name, values, _TYPES[name])
        self.tokens, self._parts = self.tokens + len(own.tokens), self._parts + len(example.parts)
        self.bytes, self.words = self.bytes + example.size, self.words + example.values
        self.predicted += int((own.weights > 0).sum())
        # Before and after an example stands the end-of-text token.
        self.documents, self.longest = self.documents + 1, max(self.longest, len(own.tokens) + 2)

    def _put(self, name: str, values: np.ndarray, kind: str) -> None:
        self._files[name].write(values.astype(kind).tobytes())


def _open(folder: Path, *, verify: bool) -> tuple[PackedExamples, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}")
        splits = {split: SplitInfo(**manifest["splits"][split]) for split in SPLITS}
        fields = {
            name: manifest[name] for name in PackedExamples.__dataclass_fields__ if name not in ("folder", "splits")
        }
        packed = PackedExamples(folder=folder, splits=splits, **fields)
        _check_fields(packed)
        inputs, own_fingerprint = manifest["inputs"], _fingerprint(manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise KalmaGroveError(f"{path} is no sound manifest of examples ({error}); {_REMEDY}") from error
    if packed.fingerprint != own_fingerprint:
        raise KalmaGroveError(f"the fingerprint in {path} does not match what it lists; {_REMEDY}")
    if verify:
        _verify(packed, manifest)
    return packed, inputs


def _check_fields(packed: PackedExamples) -> None:
    """Raises ValueError where one cannot be what it is said to be; the features' sizes are found here."""
    kinds = {int: ("longest", "vocab_size", "end_of_text_id"), bool: ("shuffles", "predicts_end")}
    kinds[str] = ("modality", "fingerprint", "tokenizer_fingerprint", "source")
    wrong = [name for kind, names in kinds.items() for name in names if type(getattr(packed, name)) is not kind]
    counts = [count for info in packed.splits.values() for name, count in asdict(info).items() if name != "sha256"]
    if wrong or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{wrong[0] if wrong else 'a count'} is of a wrong kind")
    special = {"end_of_text_id": packed.end_of_text_id, **_placeholders(packed.modalities)}
    none = [name for name, token in special.items() if type(token) is not int or not 0 <= token < packed.vocab_size]
    if none or not all(packed.feature_sizes.values()):
        raise ValueError(f"the token of {none[0]} is none" if none else "a modality has no features")


def _verify(packed: PackedExamples, manifest: dict[str, Any]) -> None:
    tokenizer = packed.load_tokenizer()
    if tokenizer_fingerprint(tokenizer) != packed.tokenizer_fingerprint:
        raise KalmaGroveError(f"the content of {packed.folder / 'tokenizer.json'} changed; {_REMEDY}")
    if _digest(packed.folder / SCHEMA) != manifest["schema_sha256"]:
        raise KalmaGroveError(f"the content of {packed.folder / SCHEMA} changed; {_REMEDY}")
    longest = 0
    for split, info in packed.splits.items():
        paths = [_file(packed.folder, split, name) for name in (*_TYPES, *packed.modalities)]
        if hashlib.sha256("".join(map(_digest, paths)).encode()).hexdigest() != info.sha256:
            raise KalmaGroveError(f"the files of {split} in {packed.folder} are missing or changed; {_REMEDY}")
        try:
            stored, example_ends = _map_split(packed, split)
            placeholders = _placeholders(packed.modalities)
            longest = max(
                longest,
                check_examples(stored, example_ends, info, placeholders=placeholders, vocab_size=packed.vocab_size),
            )
        except (OSError, ValueError) as error:
            raise KalmaGroveError(f"{split} of {packed.folder} is damaged: {error}; {_REMEDY}") from error
    found = {"longest": longest, "vocab_size": vocabulary_size(tokenizer), "end_of_text_id": end_of_text_id(tokenizer)}
    for name, value in found.items():
        if getattr(packed, name) != value:
            raise KalmaGroveError(
                f"{packed.folder / MANIFEST} says {name} {getattr(packed, name)}, but it is {value}; {_REMEDY}"
            )


def _digest(path: Path) -> str:
    return sha256_of(path) if path.is_file() else "missing"


def _fingerprint(manifest: dict[str, Any]) -> str:
    """Over all that a model learns from; the source's name is not among it."""
    learnt = {name: value for name, value in manifest.items() if name not in ("source", "inputs", "fingerprint")}
    return hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()
