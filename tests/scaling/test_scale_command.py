"""kalmagrove scale fit: tables in, a page out, and one line for what cannot be used."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.cli import main

ROWS = [
    {"parameters": n, "tokens": d, "family": family, "seed": seed,
     "loss": 1.5 + a * n**-exponent + 40 * d**-0.3 + 0.001 * ((n * 7 + d + seed) % 3)}
    for family, a, exponent in (("llama", 30.0, 0.25), ("kalmagrove", 200.0, 0.42))
    for n in (1e5, 3e5, 1e6, 3e6)
    for d in (1e6, 4e6, 16e6)
    for seed in (0, 1)
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_two_families_are_fitted_and_compared(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, ROWS[0] | {"loss": math.nan}, ROWS[1] | {"loss": -1.0}]
    table = write(tmp_path / f"runs{suffix}", rows)
    words = ["scale", "fit", str(table), "--resamples", "40", "--baseline", "llama", "--out", str(tmp_path / "law")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "kalmagrove - llama" in said and "row 49: it has no loss" in said and "row 50: its loss is -1" in said
    summary = json.loads((tmp_path / "law" / "fit.json").read_text())
    assert summary["runs"] == 48 and len(summary["left_out"]) == 2
    fitted = summary["families"]["kalmagrove"]["laws"]["hoffmann"]
    assert fitted["constants"]["alpha"] == pytest.approx(0.42, abs=0.05)
    low, high = fitted["intervals"]["alpha"]
    assert low <= fitted["constants"]["alpha"] <= high
    difference = summary["differences"]["kalmagrove - llama"]["hoffmann"]
    assert difference["alpha"]["verdict"] == "larger" and difference["beta"]["verdict"] == "undecided"
    assert (tmp_path / "law" / "fit.svg").read_text().lstrip().startswith("<?xml")
    assert (tmp_path / "law" / "fit.md").read_text() == said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary


def test_several_tables_are_fitted_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write(tmp_path / "whole.csv", ROWS)
    first, rest = (
        write(tmp_path / "first.csv", ROWS[:30]),
        write(tmp_path / "rest.jsonl", [*ROWS[30:], {**ROWS[0], "loss": -1}]),
    )
    options = ["--resamples", "20", "--out", str(tmp_path / "law"), "--json"]
    assert main(["scale", "fit", str(whole), *options]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main(["scale", "fit", str(first), str(rest), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["families"] == expected["families"]
    assert found["left_out"] == [f"row 19 of {rest}: its loss is -1, and must be positive"]
    assert found["command"] == f"kalmagrove scale fit {first} {rest} --resamples 20 --out {tmp_path / 'law'}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("runs.csv", "a,b\n1,2\n", "has no column parameters; it needs parameters, tokens, loss"),
        ("runs.csv", "N,D,loss\n1,2,x\n", "row 1 of .* has the loss 'x', which is no number"),
        ("runs.csv", "N,D,loss\n1,2,nan\n", "holds no run that can be used: row 1: it has no loss"),
        ("runs.csv", "N,D,loss\n1,2,3\n", "family all: 1 different runs are too few for the law power"),
        ("runs.csv", "N,D,loss,vocabulary\n1,2,3,a\n1,2,3,b\n", "mixes the vocabularies 'a', 'b'"),
        ("runs.json", "{}", "must hold a list of objects"),
        ("runs.json", "[", "is not a sound table"),
        ("runs.txt", "", r"must be a \.csv, \.json or \.jsonl file"),
    ],
)
def test_an_unusable_table_is_named(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / name).write_text(content)
    assert main(["scale", "fit", str(tmp_path / name), "--out", str(tmp_path / "law")]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "law").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scale"], "needs one of the words sweep, fit, plan, got nothing"),
        (["scale", "plot"], "needs one of the words sweep, fit, plan, got 'plot'"),
        (["scale", "fit", "no.csv"], "no.csv cannot be read"),
        (["scale", "fit", "no.csv", "--resamples", "0"], "--resamples must be at least 1"),
        (["scale", "fit", "no.csv", "--seed", "-1"], "--seed must not be negative"),
    ],
)
def test_wrong_words_are_explained(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) in (1, 2)
    assert message in capsys.readouterr().err


def test_an_unknown_baseline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "runs.csv", ROWS)
    assert main(["scale", "fit", str(table), "--baseline", "gpt"]) == 2
    assert "there is no family 'gpt'; the table has llama, kalmagrove" in capsys.readouterr().err
