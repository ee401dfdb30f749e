"""Documents are divided reproducibly, without overlap, and published splits stay as they are."""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kalmagrove.data import splits
from kalmagrove.data.splits import SPLITS, given_splits, split_documents
from kalmagrove.errors import KalmaGroveError


def divided(source: Path | str, **options: Any) -> dict[str, list[str]]:
    result: dict[str, list[str]] = defaultdict(list)
    for split, document in split_documents(str(source), **options):
        result[split].append(document)
    return dict(result)


def documents_of(result: dict[str, list[str]]) -> list[str]:
    return [document for documents in result.values() for document in documents]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("<|endoftext|>\n".join(f"{document}\n" for document in documents))
    return path


def test_documents_are_divided_by_the_fractions_without_overlap_or_loss(tmp_path: Path) -> None:
    documents = [f"document {number}" for number in range(3000)]
    result = divided(write_documents(tmp_path / "a.txt", documents), held_out={"valid": 0.2, "test": 0.1})
    assert sorted(documents_of(result)) == sorted(f"{document}\n" for document in documents)
    assert 520 < len(result["valid"]) < 680 and 240 < len(result["test"]) < 360


def test_a_document_keeps_its_split_when_others_come_and_go(tmp_path: Path) -> None:
    documents = [f"document {number}" for number in range(900)]
    before = divided(write_documents(tmp_path / "a.txt", documents))
    after = divided(write_documents(tmp_path / "b.txt", documents[::-2]))
    assert all(set(after[split]) <= set(before[split]) for split in SPLITS)
    assert divided(tmp_path / "a.txt") == before
    assert divided(tmp_path / "a.txt", seed=1)["valid"] != before["valid"]


def test_exact_duplicates_are_removed(tmp_path: Path) -> None:
    documents = [f"document {number % 70}" for number in range(200)]
    result = divided(write_documents(tmp_path / "a.txt", documents))
    assert sorted(documents_of(result)) == sorted({f"{document}\n" for document in documents})


@pytest.mark.parametrize("count", [3, 4, 9])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.49])
def test_a_few_documents_still_give_every_split_one(tmp_path: Path, count: int, fraction: float) -> None:
    source = write_documents(tmp_path / "a.txt", [f"document {number}" for number in range(count)])
    for seed in range(5):
        result = divided(source, seed=seed, held_out={"valid": fraction, "test": fraction})
        assert set(result) == set(SPLITS) and sum(map(len, result.values())) == count
        if fraction < 0.01:
            assert len(result["valid"]) == len(result["test"]) == 1


def test_one_long_document_is_cut_into_blocks_of_whole_lines(tmp_path: Path) -> None:
    words = random.Random(0)
    text = "".join(f"line {number} {words.random()}\n" for number in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    result = divided(tmp_path / "a.txt", held_out={"valid": 0.1, "test": 0.1})
    assert sorted("".join(documents_of(result)).splitlines()) == sorted(text.splitlines())
    assert all(document in text and document.endswith("\n") for document in documents_of(result))
    sizes = {split: len("".join(result[split])) / len(text) for split in SPLITS}
    assert 0.04 < sizes["valid"] < 0.16 and 0.04 < sizes["test"] < 0.16


def test_a_few_book_length_documents_are_cut_too(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(200_000))
    (tmp_path / "a.txt").write_text(text)
    result = divided(tmp_path / "a.txt")
    assert len("".join(result["train"])) > 0.9 * len(text)


def test_two_short_documents_are_enough_and_three_characters_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a first short line\n<|endoftext|>\nand a second one\n")
    assert set(divided(tmp_path / "a.txt")) == set(SPLITS)
    (tmp_path / "b.txt").write_text("abc")
    assert sorted(documents_of(divided(tmp_path / "b.txt"))) == ["a", "b", "c"]


def test_a_text_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(KalmaGroveError, match="too little text to be divided into train, valid, test; give a longer"):
        divided(tmp_path / "a.txt")


def test_only_a_bounded_amount_waits_for_the_splits_to_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_MOST_WAITING_CHARACTERS", 100)
    read = []

    def documents(_: object) -> Iterator[str]:
        for number in range(1000):
            read.append(number)
            yield f"document {number}"

    monkeypatch.setattr(splits, "iter_documents", documents)
    monkeypatch.setattr(splits, "given_splits", lambda _: {})
    stream = split_documents("any", held_out={"valid": 1e-9, "test": 1e-9})
    first = [next(stream) for _ in range(9)]
    assert len(read) < 12
    assert {split for split, _ in first} == set(SPLITS)
    assert {split for split, _ in stream} == {"train"}


def test_a_first_document_that_is_longer_than_what_waits_does_not_end_the_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(splits, "_MOST_WAITING_CHARACTERS", 50)
    documents = ["a" * 200, "one", "two", "three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    result = divided(tmp_path / "a.jsonl")
    assert set(result) == set(SPLITS) and sorted(documents_of(result)) == sorted(documents)


def test_a_text_that_repeats_itself_is_divided_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the same line\n" * 400)
    assert set(divided(tmp_path / "a.txt")) == set(SPLITS)


def test_given_splits_stay_exactly_as_they_are(tmp_path: Path) -> None:
    write_documents(tmp_path / "train.txt", ["a", "a", "b"])
    write_documents(tmp_path / "test.jsonl", [])
    (tmp_path / "test.jsonl").write_text('{"text": "a"}')
    write_documents(tmp_path / "dev.txt", ["b", "b"])
    (tmp_path / "README.md").write_text("About this text.")
    assert divided(tmp_path) == {"train": ["a\n", "a\n", "b\n"], "valid": ["b\n", "b\n"], "test": ["a"]}


def test_parts_of_a_split_are_joined_in_order(tmp_path: Path) -> None:
    for name in ["train-00001-of-00002", "train-00000-of-00002", "validation", "test_0"]:
        (tmp_path / f"{name}.txt").write_text(name)
    result = divided(tmp_path)
    assert result["train"] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert result["valid"] == ["validation"] and result["test"] == ["test_0"]


def test_a_missing_split_is_taken_out_of_train(tmp_path: Path) -> None:
    documents = [f"document {number}\n" for number in range(300)]
    write_documents(tmp_path / "train.txt", [document.strip() for document in documents])
    (tmp_path / "valid.txt").write_text("held out")
    result = divided(tmp_path, held_out={"valid": 0.1, "test": 0.1})
    assert result["valid"] == ["held out"]
    assert sorted(result["train"] + result["test"]) == sorted(documents) and 10 < len(result["test"]) < 60


def test_code_and_files_further_down_are_no_given_splits(tmp_path: Path) -> None:
    for name in ["train.py", "valid.py", "test.py", "sub/train.txt", "sub/test.txt", "latest.txt", "training.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert given_splits(str(tmp_path)) == {}
    (tmp_path / "test.txt").write_text("no train beside it")
    assert given_splits(str(tmp_path)) == {}
    assert sum(map(len, divided(tmp_path).values())) == 8


def test_an_empty_given_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "valid.txt").write_text("")
    (tmp_path / "test.txt").write_text("a")
    with pytest.raises(KalmaGroveError, match=r"valid\.txt is empty"):
        divided(tmp_path)


def test_splits_of_a_hub_data_set_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, str]]):
        column_names = ("text",)

    loaded = {name: Rows([{"text": f"{name} text"}]) for name in ("test", "train", "validation", "extra")}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_: loaded))
    assert divided("owner/name") == {"train": ["train text"], "valid": ["validation text"], "test": ["test text"]}
