"""`kalmagrove predict` as a user types it, after a training on a table: what it writes, and what mistakes get."""

import csv
import io
import json
from pathlib import Path

import pytest

from kalmagrove.cli import main
from kalmagrove.commands.predict import make_predict_parser
from kalmagrove.evaluation.table_files import write_rows

TRAIN = [
    "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.head_dim", "8", "--loop.batch_size", "8",
    "--loop.context_length", "16", "--loop.device", "cpu",
]  # fmt: skip
NEW = "size,colour,day\n3,,2024-01-05\n,red,\n7,pink,2024-01-09\n5,blue,2024-01-02\n"


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    lines = ["size,colour,day"]
    lines += [f"{number % 10},{['red', 'blue'][number % 2]},2024-01-{number % 20 + 1:02d}" for number in range(60)]
    (folder / "table.csv").write_text("\n".join(lines))
    words = ["--data", str(folder / "table.csv"), "--modality", "table", "--tokens", "2k", "--preset", "llama"]
    folders = ["--data.folder", str(folder / "data"), "--out", str(folder / "run")]
    assert main(["train", *words, *TRAIN, *folders]) == 0
    (folder / "new.csv").write_text(NEW)
    return folder / "run"


def new(run: Path) -> str:
    return str(run.parent / "new.csv")


def test_a_category_is_printed_with_the_probability_of_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = answer(capsys, "predict", str(run), "--data", new(run), "--target", "colour", "--orders", "2")
    assert code == 0, error
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["row"] for row in rows] == ["1", "2", "3", "4"]
    assert list(rows[0]) == ["row", "prediction", "probabilities:blue", "probabilities:red"]
    assert all(float(row["probabilities:blue"]) + float(row["probabilities:red"]) == pytest.approx(1) for row in rows)
    assert "1 rows have a colour that no training row had: they are read, and scored, without it" in error
    assert "accuracy" in error and "log loss" in error


def test_numbers_and_dates_have_quantiles_and_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", str(run), "--data", new(run), "--json", "--quantiles", "0.25,0.75"]
    code, out, error = answer(capsys, *words, "--target", "day")
    assert code == 0, error
    found = json.loads(out)
    assert found["scores"]["rows"] == 3 and set(found["scores"]) >= {"rmse", "mae", "r2"}
    for row in found["rows"]:
        low, high = row["quantiles"].values()
        assert "2024-01-01" <= low <= row["prediction"] <= high <= "2024-01-20"
    code, out, _ = answer(capsys, *words, "--target", "size")
    assert code == 0
    first = json.loads(out)["rows"][0]
    assert list(first) == ["row", "prediction", "mean", "quantiles", "probabilities"]
    assert isinstance(first["prediction"], int) and sum(first["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["complete.csv", "complete.jsonl"])
def test_without_a_target_every_gap_is_filled(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out_file = tmp_path / name
    code, out, error = answer(capsys, "predict", str(run), "--data", new(run), "--out", str(out_file))
    assert code == 0, error
    assert out == f"{out_file}: 4 rows\n" and "3 missing cells of 4 rows were filled in" in error
    text = out_file.read_text()
    rows = list(csv.DictReader(text.splitlines())) if name.endswith("csv") else list(map(json.loads, text.splitlines()))
    assert all(value not in ("", None) for row in rows for value in row.values())
    assert [str(rows[0][name]) for name in ("size", "day")] == ["3", "2024-01-05"]
    assert {type(row["size"]) for row in rows} == {str if name.endswith("csv") else int}
    assert rows[0]["colour"] in ("red", "blue") and rows[1]["colour"] == "red" and rows[2]["colour"] == "pink"
    assert 0 <= int(rows[1]["size"]) <= 9


def test_what_is_left_out_has_the_value_that_the_help_names(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", str(run), "--data", new(run), "--target", "size", "--json"]
    usual = ["--quantiles", "0.1,0.5,0.9", "--orders", "8", "--seed", "0", "--batch_size", "64"]
    assert answer(capsys, *words) == answer(capsys, *words, *usual)
    shown = " ".join(make_predict_parser().format_help().split())
    assert all(f"left out: {value}" in shown for value in usual[1::2])


def test_the_same_words_give_the_same_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", str(run), "--data", new(run), "--target", "size", "--json"]
    assert answer(capsys, *words) == answer(capsys, *words)
    assert answer(capsys, *words, "--seed", "1")[1] != answer(capsys, *words)[1]


MISTAKES: dict[str, tuple[list[str], str, int]] = {
    "an unknown column": (["--target", "color"], "the table has no column 'color'; did you mean 'colour'?", 2),
    "a column unlike all": (["--target", "zzz"], "no column 'zzz'; its columns: size, colour, day", 2),
    "a wrong quantile": (
        ["--target", "size", "--quantiles", "0.5,1"],
        "--quantiles must be numbers between 0 and 1",
        2,
    ),
    "no quantile": (["--target", "size", "--quantiles", "half"], "got 'half'", 2),
    "no order": (["--orders", "0"], "--orders >= 1", 2),
    "no token": (["--max_new_tokens", "0"], "--max_new_tokens >= 1", 2),
    "quantiles of every gap": (["--quantiles", "0.5"], "--quantiles is of one column; name it with --target", 2),
    "tokens of an answer": (["--max_new_tokens", "9"], "--max_new_tokens is for answers to texts with images", 2),
    "another kind of file": (["--out", "x.xlsx"], "x.xlsx must end in .csv or .jsonl", 2),
    "a folder that is not there": (["--out", "none/x.csv"], "there is no folder none; make it first", 2),
    "an unknown device": (["--device", "abacus"], "unknown device 'abacus'", 2),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_named(
    run: Path, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message, expected = MISTAKES[what]
    code, out, error = answer(capsys, "predict", str(run), "--data", new(run), *words)
    assert (code, out) == (expected, "") and message in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = answer(capsys, "predict", str(run), "--data", new(run), "--out", new(run))
    assert code == 2 and "exists already; choose another name or remove it" in error
    assert Path(new(run)).read_text() == NEW


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size,colours\n3,red\n", "has a column 'colours' that the training rows did not have"),
        ("size\nthree\n", "column 'size', line 2 of"),
        ("size\n", "holds no rows"),
    ],
)
def test_rows_that_do_not_fit_are_named(
    run: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.csv").write_text(text)
    code, out, error = answer(capsys, "predict", str(run), "--data", str(tmp_path / "bad.csv"), "--target", "day")
    assert (code, out) == (1, "") and message in error


def test_a_damaged_schema_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = run / "model" / "modality.json"
    sound = schema.read_text()
    try:
        schema.write_text(sound.replace('"number"', '"numeral"'))
        code, _, error = answer(capsys, "predict", str(run), "--data", new(run), "--target", "day")
        assert code == 1 and "kind must be one of number, date, category, text, got 'numeral'" in error
        schema.unlink()
        code, _, error = answer(capsys, "predict", str(run), "--data", new(run), "--target", "day")
        assert code == 1 and "give a model that was trained on tables or images" in error
    finally:
        schema.write_text(sound)


def test_cells_inside_cells_have_columns_of_their_own() -> None:
    rows = [{"row": 1, "prediction": 'a "b", c', "quantiles": {"0.1": 2, "0.9": True}}]
    assert write_rows(rows, ".csv") == 'row,prediction,quantiles:0.1,quantiles:0.9\n1,"a ""b"", c",2,true\n'
    assert json.loads(write_rows(rows, ".jsonl")) == rows[0]
