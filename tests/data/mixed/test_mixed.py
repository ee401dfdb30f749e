"""Lines that mix text, images and rows: read, packed, learnt and answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kalmagrove.cli import main
from kalmagrove.data.example_store import prepare_examples
from kalmagrove.data.mixed.codec import open_mixed
from kalmagrove.data.mixed.reading import iter_mixed, split_mixed
from kalmagrove.data.mixed.source import mixed_source
from kalmagrove.data.part_sequences import sequences_of_parts
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.table_files import write_rows
from kalmagrove.modalities.registry import make_modality


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def image_line(folder: Path, number: int, generator: np.random.Generator) -> dict[str, Any]:
    level = int(generator.integers(0, 2))
    pixels = generator.integers(0, 60, size=(8, 8)) + 190 * level
    (folder / "images").mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
    parts = [{"image": f"images/{number}.png"}, {"text": "how bright?"}]
    return {"parts": [*parts, {"text": " bright" if level else " dark", "learn": True}]}


def row_line(generator: np.random.Generator) -> dict[str, Any]:
    size = round(float(generator.uniform(0, 10)), 2)
    parts = [{"row": {"size": size, "colour": str(generator.choice(["red", "blue"]))}}, {"text": "how large?"}]
    return {"parts": [*parts, {"text": " very large" if size > 5 else " small", "learn": True}]}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A folder with train.jsonl, valid.jsonl and test.jsonl."""
    generator = np.random.Generator(np.random.PCG64(0))
    number = 0
    for split, count in (("train", 120), ("valid", 20), ("test", 40)):
        found = []
        for _ in range(count // 2):
            found += [image_line(tmp_path, number, generator), row_line(generator)]
            number += 1
        write_lines(tmp_path / f"{split}.jsonl", found)
    return tmp_path


def test_a_line_becomes_the_sequence_that_is_packed(lines: Path, tmp_path: Path) -> None:
    source = mixed_source(str(lines), seed=0, patch_size=4)
    data = prepare_examples(source, tmp_path / "packed")
    codec = open_mixed(data.schema(), data.load_tokenizer())
    rows = [row for split, row in split_mixed(str(lines), seed=0) if split == "test"]
    sizes = {name: make_modality(name, 8, options).feature_size for name, options in data.modalities.items()}
    placeholders = {name: options["placeholder"] for name, options in data.modalities.items()}
    packed = data.rows("test", range(len(rows)))
    made = sequences_of_parts(
        [codec.parts(row, row.pieces) for row in rows],
        end_token=data.end_of_text_id,
        placeholders=placeholders,
        sizes=sizes,
    )
    width = made.tokens.shape[1]
    assert torch.equal(made.tokens, packed.tokens[:, :width])
    assert packed.axes is not None and made.axes is not None and torch.equal(made.axes, packed.axes[:, :width])
    for name in sizes:
        assert torch.equal(made.features[name], packed.features[name][:, :width])
    # What is only given is not learnt: two tokens or so of an answer, and the end.
    assert (packed.weights.sum(dim=1) <= 4).all() and (packed.weights.sum(dim=1) >= 2).all()


def test_the_short_form_puts_images_into_the_text(tmp_path: Path) -> None:
    line = {"text": "before <image> between <image>", "images": ["a.png", "b.png"]}
    (row,) = iter_mixed(write_lines(tmp_path / "x.jsonl", [line]))
    assert [piece.kind for piece in row.pieces] == ["text", "image", "text", "image"]
    assert all(piece.is_learnt for piece in row.pieces)


def test_it_trains_and_answers(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = f"--data.folder={tmp_path / 'data'} --data.patch_size=4 --preset=kalmagrove-tiny --model.hidden_size=48"
    options += " --model.num_hidden_layers=2 --loop.batch_size=16 --loop.context_length=40 --tokens=180k --out"
    assert main(["train", "--data", str(lines), "--modality", "mixed", *options.split(), str(run)]) == 0
    capsys.readouterr()
    assert main(["predict", str(run), "--data", str(lines / "test.jsonl"), "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert told.err == ""
    assert found["scores"]["rows"] == 40 and found["scores"]["accuracy"] > 0.8
    assert {row["answer"].strip() for row in found["rows"]} >= {"bright", "dark", "very large", "small"}
    whole = [row["answer"] for row in found["rows"]]
    assert main(["predict", str(run), "--data", str(lines / "test.jsonl"), "--max_new_tokens", "1", "--json"]) == 0
    told = capsys.readouterr()
    assert [row["answer"] for row in json.loads(told.out)["rows"]] == [text.removesuffix(" large") for text in whole]
    cut = sum(text.endswith(" large") for text in whole)
    assert told.err == f"{cut} answers were cut, at 1 tokens or where the model's context ends\n"
    for flag, value, reason in (
        ("--target", "x", "is for tables"),
        ("--quantiles", "0.5", "is for tables"),
        ("--orders", "8", "is for tables"),
        ("--seed", "0", "is for tables"),
        ("--batch_size", "64", "is for tables and images"),
    ):
        assert main(["predict", str(run), "--data", str(lines / "test.jsonl"), flag, value]) == 2
        assert capsys.readouterr().err == f"kalmagrove: {flag} {reason}; leave it out\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "either"),
        ([1], "either"),
        ({"text": "a", "parts": []}, "either"),
        ({"parts": []}, "list of objects"),
        ({"parts": ["a"]}, "list of objects"),
        ({"parts": [{"text": "a", "image": "b"}]}, "one of"),
        ({"parts": [{"sound": "a"}]}, "one of"),
        ({"parts": [{"text": "a", "learn": 1}]}, "one of"),
        ({"parts": [{"text": ""}]}, "no text"),
        ({"parts": [{"row": {}}]}, "object with cells"),
        ({"parts": [{"row": {"a": [1]}}]}, "list"),
        ({"parts": [{"image": "../secret.png"}]}, "below"),
        ({"parts": [{"image": "/etc/passwd"}]}, "below"),
        ({"text": "<image>", "images": []}, "1 times"),
        ({"text": "a", "images": "b"}, "list of paths"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = tmp_path / "x.jsonl"
    first = {"parts": [{"text": "sound"}]}
    path.write_text(json.dumps(first) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(KalmaGroveError, match="line 2 of") as error:
        list(iter_mixed(path))
    assert said in str(error.value)


def test_what_the_model_never_saw_is_refused(tmp_path: Path) -> None:
    texts = [{"parts": [{"text": f"line {number}"}]} for number in range(30)]
    source = mixed_source(str(write_lines(tmp_path / "x.jsonl", texts)), seed=0, vocab_size=258)
    codec = open_mixed(source.schema, source.tokenizer)
    line = {"parts": [{"row": {"a": 1}}]}
    (row,) = iter_mixed(write_lines(tmp_path / "y.jsonl", [line]))
    with pytest.raises(KalmaGroveError, match="trained without any"):
        codec.parts(row, row.pieces)


def test_a_missing_cell_says_something_only_where_a_training_row_missed_it(lines: Path, tmp_path: Path) -> None:
    source = mixed_source(str(lines), seed=0, patch_size=4)
    codec = open_mixed(source.schema, source.tokenizer)
    found = []
    for row in ({"size": None, "colour": "red"}, {"colour": "red"}):
        (line,) = iter_mixed(write_lines(tmp_path / "y.jsonl", [{"parts": [{"row": row}]}]))
        found.append([part.tokens.tolist() for part in codec.parts(line, line.pieces)])
    assert found[0] == found[1]


def test_a_split_may_have_several_files(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "valid", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    found = [(split, row.pieces[0].text) for split, row in split_mixed(str(tmp_path), seed=0)]
    assert found == [("train", "train-0"), ("train", "train-1"), ("valid", "valid"), ("test", "test")]


def test_all_lines_about_one_image_are_in_one_split(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    found = []
    for number in range(40):
        (tmp_path / f"scene{number}").mkdir()
        image_line(tmp_path / f"scene{number}", 0, generator)
        image = {"image": f"scene{number}/images/0.png"}
        found += [{"parts": [image, {"text": text}]} for text in ("how bright?", "how dark?")]
    places: dict[str, set[str]] = {}
    for split, row in split_mixed(str(write_lines(tmp_path / "x.jsonl", found)), seed=0):
        places.setdefault(row.pieces[0].image_name, set()).add(split)
    assert len(places) == 40 and all(len(splits) == 1 for splits in places.values())
    assert set.union(*places.values()) == {"train", "valid", "test"}


@pytest.mark.parametrize("edit", ["another text", "another mark"])
def test_edited_lines_are_not_taken_for_what_was_packed(lines: Path, tmp_path: Path, edit: str) -> None:
    folder = tmp_path / "packed"
    prepare_examples(mixed_source(str(lines), seed=0, patch_size=4), folder)
    found = [json.loads(line) for line in (lines / "train.jsonl").read_text().splitlines()]
    if edit == "another text":
        found[0]["parts"][1]["text"] = "how dark?"
    else:
        found[0]["parts"][1]["learn"] = True
    write_lines(lines / "train.jsonl", found)
    with pytest.raises(KalmaGroveError, match="was prepared from something else"):
        prepare_examples(mixed_source(str(lines), seed=0, patch_size=4), folder)


def test_answers_of_some_lines_alone_can_be_written() -> None:
    rows = [{"place": "1", "answer": "a"}, {"place": "2", "answer": "b", "wanted": "c"}]
    assert write_rows(rows, ".csv") == "place,answer,wanted\n1,a,\n2,b,c\n"
