"""Packed folders hold the text's tokens, are reused only for the same inputs, and are never half-made."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kalmagrove import files
from kalmagrove.data import packing
from kalmagrove.data.packing import PackedText, default_data_folder, open_packed, prepare
from kalmagrove.data.splits import SPLITS, split_documents
from kalmagrove.errors import KalmaGroveError, UsageError

DOCUMENTS = [
    f"document {number} \u00e9\u65e5 says {number * 37 % 101}\nand <|endoftext|> no more\n" for number in range(90)
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return str(path)


@pytest.fixture
def packed(source: str, tmp_path: Path) -> PackedText:
    return prepare(source, tmp_path / "packed", vocab_size=270)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_tokens_are_the_text_with_an_end_after_each_document(packed: PackedText, source: str) -> None:
    tokenizer = packed.load_tokenizer()
    expected: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, document in split_documents(source):
        expected[split].append(document)
    for split, documents in expected.items():
        tokens, info = packed.tokens(split), packed.splits[split]
        ends = np.flatnonzero(tokens == packed.end_of_text_id)
        starts = [0, *(ends[:-1] + 1)]
        decoded = [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
        assert decoded == documents and ends[-1] == len(tokens) - 1
        assert info.tokens == len(tokens) and info.documents == len(documents)
        assert info.bytes == len("".join(documents).encode()) and info.words == len(" ".join(documents).split())
    assert (packed.dtype, packed.vocab_size, packed.end_of_text_id, packed.source) == ("uint16", 270, 0, source)
    assert packed.tokens("train").dtype == np.uint16 and not packed.tokens("train").flags.writeable


def test_batches_do_not_change_the_tokens(
    packed: PackedText, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 100)
    calls: list[tuple[str, int]] = []
    again = prepare(
        source, tmp_path / "again", vocab_size=270, progress=lambda stage, done: calls.append((stage, done))
    )
    assert again.fingerprint == packed.fingerprint and again.splits == packed.splits
    assert {stage for stage, _ in calls} == {"tokenizer", "packing"}
    assert calls[-1] == ("packing", sum(len(document.encode()) for document in DOCUMENTS))
    assert prepare(source, tmp_path / "other", vocab_size=270, seed=1).fingerprint != packed.fingerprint


def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abab abab\n" * 9)
    (tmp_path / "valid.txt").write_text("xyxy xyxy\n" * 99)
    (tmp_path / "test.txt").write_text("zuzu zuzu\n" * 99)
    tokenizer = prepare(str(tmp_path), tmp_path / "packed", vocab_size=300).load_tokenizer()
    assert len(tokenizer.encode("abab").ids) == 1 and len(tokenizer.encode("xyxy").ids) == 4


def test_a_large_vocabulary_is_stored_in_four_bytes(source: str, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"document": 0, "<unk>": 3, "</s>": 65536}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    # Its own template would add a token that the packed text must not hold twice.
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 65536)])
    words.save(str(tmp_path / "tokenizer.json"))
    packed = prepare(source, tmp_path / "packed", tokenizer=str(tmp_path))
    assert (packed.dtype, packed.vocab_size, packed.end_of_text_id) == ("uint32", 65537, 65536)
    assert int((packed.tokens("train") == 65536).sum()) == packed.splits["train"].documents
    assert open_packed(packed.folder) == packed


def test_the_same_inputs_reuse_the_folder_without_reading_the_text(
    packed: PackedText, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "split_documents", None)
    assert prepare(source, packed.folder, vocab_size=270) == packed
    monkeypatch.chdir(Path(source).parent)
    assert prepare("text.jsonl", packed.folder, vocab_size=270) == packed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "seed 0 and not 3"),
        ({"vocab_size": 280}, "vocab_size 270 and not 280"),
        ({"tokenizer": "packed"}, "vocab_size 270 and not left out"),
        ({"source": None}, r"source \S*text\.jsonl and not left out"),
    ],
)
def test_other_inputs_are_refused_and_nothing_is_overwritten(
    packed: PackedText, source: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(packed.folder.parent)
    before = (packed.folder / "manifest.json").read_bytes()
    given = {"source": source, "vocab_size": 270, **options}
    with pytest.raises(KalmaGroveError, match=f"packed was prepared with {message}; choose another folder or delete"):
        prepare(given.pop("source"), packed.folder, **given)
    assert (packed.folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["valid_fraction", "test_fraction"])
def test_a_folder_whose_text_was_divided_otherwise_is_refused(packed: PackedText, source: str, name: str) -> None:
    edit_manifest(packed.folder, lambda manifest: manifest["inputs"].update({name: 0.1}))
    with pytest.raises(KalmaGroveError, match=f"packed was prepared with {name} 0.1 and not 0.02; choose another"):
        prepare(source, packed.folder, vocab_size=270)


def test_a_changed_source_is_noticed(packed: PackedText, source: str) -> None:
    path = Path(source)
    path.write_bytes(path.read_bytes().replace(b"a", b"e", 1))
    with pytest.raises(KalmaGroveError, match=r"prepared with other content of \S*text\.jsonl; choose another folder"):
        prepare(source, packed.folder, vocab_size=270)


def test_a_copy_of_the_source_with_another_time_is_the_same_text(packed: PackedText, source: str) -> None:
    os.utime(source, ns=(0, 1))
    assert prepare(source, packed.folder, vocab_size=270) == packed
    manifest = (packed.folder / "manifest.json").read_bytes()
    assert prepare(source, packed.folder, vocab_size=270) == packed
    assert (packed.folder / "manifest.json").read_bytes() == manifest


def test_a_copy_of_the_source_in_another_folder_is_the_same_text(
    packed: PackedText, source: str, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere" / Path(source).name
    copy.parent.mkdir()
    shutil.copyfile(source, copy)
    os.utime(copy, ns=(0, 1))
    assert prepare(str(copy), packed.folder, vocab_size=270) == packed
    copy.write_bytes(copy.read_bytes().replace(b"a", b"e", 1))
    with pytest.raises(KalmaGroveError, match=r"packed was prepared with other content of \S*elsewhere"):
        prepare(str(copy), packed.folder, vocab_size=270)


def test_a_changed_tokenizer_file_is_noticed(packed: PackedText, source: str, tmp_path: Path) -> None:
    copy = tmp_path / "own.json"
    shutil.copy(packed.folder / "tokenizer.json", copy)
    second = prepare(source, tmp_path / "second", tokenizer=str(copy))
    assert second.fingerprint == packed.fingerprint
    assert prepare(source, tmp_path / "second", tokenizer=str(packed.folder)) == second
    shutil.copy(prepare(source, tmp_path / "third", vocab_size=265).folder / "tokenizer.json", copy)
    with pytest.raises(KalmaGroveError, match="second was prepared with tokenizer sha256:"):
        prepare(source, tmp_path / "second", tokenizer=str(copy))


def test_a_folder_with_other_things_is_left_alone(source: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert prepare(source, tmp_path / "mine", vocab_size=270).splits["train"].documents > 50
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a").write_text("keep")
    with pytest.raises(KalmaGroveError, match="notes holds other files and no packed text; choose a folder that is"):
        prepare(source, tmp_path / "notes", vocab_size=270)
    with pytest.raises(KalmaGroveError, match="a is a file; choose a folder"):
        prepare(source, tmp_path / "notes/a", vocab_size=270)
    assert (tmp_path / "notes/a").read_text() == "keep"


def test_a_failure_on_the_way_leaves_nothing_behind(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_json_atomic", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(source, tmp_path / "out" / "packed", vocab_size=270)
    assert names(tmp_path / "out") == set()


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    rename, sync_file, sync_folder = os.rename, files.fsync_file, files.fsync_folder
    held = {*(f"{split}.bin" for split in SPLITS), "manifest.json", "tokenizer.json", "tokenizer_config.json"}

    def watched_rename(old: Path, new: Path) -> None:
        if new == tmp_path / "packed":
            assert names(old) == held
            calls.append("rename")
        rename(old, new)

    def watched_file(path: Path) -> None:
        calls.append(path.name)
        sync_file(path)

    def watched_folder(path: Path) -> None:
        calls.append(f"folder {path.name}")
        sync_folder(path)

    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(files, "fsync_file", watched_file)
    monkeypatch.setattr(files, "fsync_folder", watched_folder)
    prepare(source, tmp_path / "packed", vocab_size=270)
    named = calls.index("rename")
    assert held <= set(calls[:named]) and f"folder {tmp_path.name}" in calls[named:]


def test_a_folder_that_another_process_made_meanwhile_is_kept(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(source, tmp_path / "first", vocab_size=270)
    write = packing._write_folder

    def write_while_another_finishes(*arguments: Any) -> None:
        write(*arguments)
        shutil.copytree(first.folder, tmp_path / "packed")

    monkeypatch.setattr(packing, "_write_folder", write_while_another_finishes)
    assert prepare(source, tmp_path / "packed", vocab_size=270).splits == first.splits
    assert names(tmp_path) == {"first", "packed", "text.jsonl"}


def test_too_small_a_vocabulary_is_refused_before_anything_is_written(source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vocab_size must be at least 258"):
        prepare(source, tmp_path / "packed", vocab_size=100)
    assert names(tmp_path) == {"text.jsonl"}


def test_opening_gives_what_was_prepared(packed: PackedText) -> None:
    assert open_packed(packed.folder) == packed == open_packed(packed.folder, verify=False)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match=r"gone holds no packed text \(no manifest\.json\); prepare it first"):
        open_packed(tmp_path / "gone")


def test_a_cut_or_missing_token_file_is_named_with_its_sizes(packed: PackedText) -> None:
    path = packed.folder / "valid.bin"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(KalmaGroveError, match=rf"valid\.bin holds {size - 1} bytes, but the manifest says {size};"):
        open_packed(packed.folder, verify=False)
    path.unlink()
    with pytest.raises(KalmaGroveError, match=r"valid\.bin is missing; delete the folder and prepare it again"):
        open_packed(packed.folder)


@pytest.mark.parametrize("name", ["test.bin", "tokenizer.json"])
def test_changed_content_is_noticed_when_verified(packed: PackedText, name: str) -> None:
    path = packed.folder / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"individual_digits": true', b'"individual_digits": false')[:-1] + b"\n")
    open_packed(packed.folder, verify=False)
    with pytest.raises(KalmaGroveError, match=rf"the content of \S*{name} changed; delete the folder"):
        open_packed(packed.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(format=99), "is not of format 1, the one this version reads"),
        (lambda manifest: manifest.pop("vocab_size"), "the field vocab_size of .* is missing or not of type int"),
        (lambda manifest: manifest.update(end_of_text_id=True), "the field end_of_text_id of .* is missing or not of"),
        (lambda manifest: manifest.update(splits=[1]), "the field splits of .* is missing or not of type dict"),
        (lambda manifest: manifest["splits"].pop("test"), "the field test of"),
        (lambda manifest: manifest["splits"]["train"].update(tokens="9"), "the field tokens of .* not of type int"),
        (lambda manifest: manifest["splits"]["train"].update(sha256="0"), "does not match the files it lists"),
        (lambda manifest: manifest.update(dtype="float64"), "names the unknown token type 'float64'"),
        (lambda manifest: manifest.pop("inputs"), "the field inputs of"),
    ],
)
def test_a_damaged_manifest_is_explained(
    packed: PackedText, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(packed.folder, change)
    with pytest.raises(KalmaGroveError, match=message):
        open_packed(packed.folder, verify=False)


@pytest.mark.parametrize("content", [b'{"format": 1', b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_named(packed: PackedText, content: bytes) -> None:
    (packed.folder / "manifest.json").write_bytes(content)
    with pytest.raises(KalmaGroveError, match=r"manifest\.json is not sound JSON; delete the folder"):
        open_packed(packed.folder)


def test_default_folders_are_readable_stable_and_differ_by_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my books").mkdir()
    root = Path("runs/data")
    first = default_data_folder("my books", 4096, None, 0, root)
    assert first.parent == root and first.name.startswith("my-books-bpe4096-") and len(first.name) == 17 + 8
    assert default_data_folder(str(tmp_path / "my books") + "/", 4096, None, 0, root) == first
    others = [
        default_data_folder("my books", 4096, None, 1, root),
        default_data_folder("my books", 512, None, 0, root),
        default_data_folder("my books", 4096, "owner/gpt", 0, root),
        default_data_folder("wikitext:wikitext-103-raw-v1", 4096, None, 0, root),
        default_data_folder("a/text.txt.xz", 4096, None, 0, root),
        default_data_folder("b/text.txt.xz", 4096, None, 0, root),
        default_data_folder(None, 4096, None, 0, root),
    ]
    assert len({first, *others}) == 8
    starts = ["my-books-bpe4096-", "my-books-bpe512-", "my-books-gpt-", "wikitext-wikitext-103-raw-v1-bpe4096-"]
    starts += ["text-bpe4096-", "text-bpe4096-", "python-3."]
    assert all(folder.name.startswith(start) for folder, start in zip(others, starts, strict=True))
    assert default_data_folder("my books", 1, "owner/gpt", 0, root) == others[2]
