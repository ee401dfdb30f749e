"""A table is packed as examples whose columns are told from the training rows alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kalmagrove import files
from kalmagrove.data import example_store
from kalmagrove.data.example_store import open_examples, prepare_examples
from kalmagrove.data.tables.codec import open_codec
from kalmagrove.data.tables.columns import NumberColumn
from kalmagrove.data.tables.source import table_source
from kalmagrove.errors import KalmaGroveError, UsageError


def write_table(folder: Path, count: int = 200) -> Path:
    lines = ["x,kind,note"] + [f"{number},{'odd' if number % 2 else 'even'},row {number}" for number in range(count)]
    path = folder / "table.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_table_is_packed_with_its_schema(tmp_path: Path) -> None:
    data = prepare_examples(table_source(str(write_table(tmp_path)), seed=0), tmp_path / "packed")
    assert (data.modality, data.shuffles, data.predicts_end) == ("table", True, False)
    assert sum(info.documents for info in data.splits.values()) == 200
    codec = open_codec(data.schema(), data.load_tokenizer())
    assert [column.kind for column in codec.columns] == ["number", "category", "text"]
    assert data.modalities == codec.modalities() and data.modalities["number"]["placeholder"] == codec.number_token
    rows = data.rows("train", range(20))
    starts = {tuple(token for token in row.tolist() if token in codec.column_tokens) for row in rows.tokens}
    assert len(starts) == 6, "every order of three columns"
    assert all((row == codec.number_token).sum() == 1 for row in rows.tokens)


def test_a_split_with_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("c\n" + "".join(f"known {number % 3}\n" for number in range(30)))
    for split in ("valid", "test"):
        (tmp_path / f"{split}.csv").write_text("c\nnew\nnew\n")
    with pytest.raises(KalmaGroveError, match=r"the split valid of .* has nothing to predict"):
        prepare_examples(table_source(str(tmp_path), seed=0), tmp_path / "packed")


def test_the_same_table_gives_the_same_data_and_another_seed_other_splits(tmp_path: Path) -> None:
    path = str(write_table(tmp_path))
    first = prepare_examples(table_source(path, seed=0), tmp_path / "first")
    again = prepare_examples(table_source(path, seed=0), tmp_path / "again")
    assert first.fingerprint == again.fingerprint
    assert prepare_examples(table_source(path, seed=0), tmp_path / "first") == open_examples(tmp_path / "first")
    with pytest.raises(KalmaGroveError, match="prepared from something else"):
        prepare_examples(table_source(path, seed=1), tmp_path / "first")
    (tmp_path / "table.csv").write_text((tmp_path / "table.csv").read_text() + "\n7,odd,more\n")
    with pytest.raises(KalmaGroveError, match="prepared from something else"):
        prepare_examples(table_source(path, seed=0), tmp_path / "first")


def test_a_folder_that_another_process_packed_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_source(str(write_table(tmp_path)), seed=0)
    first = prepare_examples(table, tmp_path / "first")
    write = example_store._write

    def write_while_another_finishes(*arguments: Any) -> None:
        write(*arguments)
        shutil.copytree(first.folder, tmp_path / "packed")

    monkeypatch.setattr(example_store, "_write", write_while_another_finishes)
    monkeypatch.setattr(files, "replace_folder", lambda *_: pytest.fail("another process may be reading it"))
    assert prepare_examples(table, tmp_path / "packed").splits == first.splits
    assert {path.name for path in tmp_path.iterdir()} == {"first", "packed", "table.csv"}


def test_statistics_come_from_the_training_rows_alone(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "train.csv").write_text("x,kind\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(40)))
    (folder / "valid.jsonl").write_text(json.dumps({"x": 1e6, "kind": "c"}) + "\n")
    (folder / "test.csv").write_text("kind,x\na,-1000\n")
    source = table_source(str(folder), seed=0)
    codec = open_codec(source.schema, source.tokenizer)
    column = codec.columns[0]
    assert isinstance(column, NumberColumn) and (column.scale.lows[0], column.scale.highs[-1]) == (0, 39)
    (valid,) = source.examples("valid")
    assert valid.values == 1, "a category that no training row had is left out"
    (test,) = source.examples("test")
    assert test.values == 2


@pytest.mark.parametrize(("line", "message"), [("many,odd,z", "is no number"), ("1,odd", "has 2 cells")])
def test_a_bad_row_outside_of_train_is_named_and_nothing_is_left(tmp_path: Path, line: str, message: str) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    write_table(folder).rename(folder / "train.csv")
    (folder / "test.csv").write_text(f"x,kind,note\n{line}\n")
    with pytest.raises(KalmaGroveError, match=rf"{message}|line 2 of .*test.csv {message}"):
        prepare_examples(table_source(str(folder), seed=0), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("options", [{"bins": 1}, {"text_vocab_size": 100}])
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 2 bins and a text vocabulary of at least 258"):
        table_source(str(write_table(tmp_path)), seed=0, **options)
