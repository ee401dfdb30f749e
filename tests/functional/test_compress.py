"""``kalmagrove compress`` as a user types it, and every command that opens what it wrote."""

import json
from pathlib import Path

import pytest

from kalmagrove.cli import main

SMALL = [
    "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.head_dim", "8", "--loop.batch_size", "4",
    "--loop.context_length", "32", "--loop.device", "cpu", "--data.vocab_size", "300",
]  # fmt: skip
CALIBRATION = ["--calibration_tokens", "1k", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("preset", ["llama", "gpt2", "kalmagrove"])
def test_a_run_is_compressed_and_every_command_opens_it(
    preset: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--data", str(text_file), "--tokens", "2k", "--preset", preset, "--out", "run"]
    code, _, error = answer(capsys, *train, *SMALL)
    assert code == 0, error
    words = ["compress", "run", "--keep", "0.7", "--data", str(text_file), "--out", "small", "--dense_out", "dense"]
    code, out, error = answer(capsys, *words, *CALIBRATION, "--json")
    assert code == 0, error
    facts = json.loads(out)
    assert 0.695 < facts["after"]["parameters"] / facts["before"]["parameters"] <= 0.7

    code, out, _ = answer(capsys, "info", "--folder", "small", "--json")
    assert code == 0
    described = json.loads(out)
    assert described["parameters"]["total"] == facts["after"]["parameters"]
    assert described["forward_flops_per_token"] == facts["after"]["flops_per_token"]
    assert "compressed from a" in answer(capsys, "info", "--folder", "small")[1]

    code, out, error = answer(capsys, "export", "small", "--out", "exported")
    assert code == 0, error
    kind = "kalmagrove" if preset == "kalmagrove" else preset
    assert out == f"exported: a dense {kind} model\n"
    scores, texts = [], []
    for folder in ("small", "dense", "exported"):
        options = ["--data", str(text_file), "--device", "cpu", "--precision", "fp32", "--json"]
        code, out, error = answer(capsys, "eval", folder, *options)
        assert code == 0, error
        scores.append(json.loads(out)["loss"])
        code, out, error = answer(
            capsys, "generate", folder, "The river", "--max_new_tokens", "6", "--temperature", "0"
        )
        assert code == 0, error
        texts.append(out)
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)
    assert texts[0].startswith("The river") and texts == [texts[0]] * 3


def test_the_table_shows_what_it_costs_before_and_after(
    llama_run: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", llama_run, "--keep", "0.8", "--data", str(text_file), "--out", "small", *CALIBRATION]
    code, out, error = answer(capsys, *words)
    assert code == 0, error
    for row in ("parameters", "bytes", "flops per token", "perplexity", "tokens per second"):
        assert row in out
    assert "matrices are factors" in out
    code, _, error = answer(capsys, *words)
    assert code == 2 and "small exists and is not empty" in error


@pytest.fixture
def llama_run(text_file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    words = ["train", "--data", str(text_file), "--tokens", "500", "--preset", "llama", "--out", "run", *SMALL]
    assert answer(capsys, *words)[0] == 0
    return "run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--keep", "0.5"], "nowhere is not a folder"),
        (["nowhere", "--keep", "2"], "--keep must be above 0 and at most 1, got 2"),
        (["nowhere", "--keep", "0.5", "--batch_size", "4"], "--batch_size is of --refit; leave it out"),
        (["nowhere", "--keep", "0.5", "--refit", "1m", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["nowhere"], "give one of --keep, --rank and --target_ppl"),
        (["nowhere", "--keep", "0.5", "--calibration_tokens", "few"], "'few' is not a number of tokens"),
        (["nowhere", "--kept", "0.5"], "unknown flag --kept; did you mean --keep?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = answer(capsys, "compress", *words, "--data", "book.txt", "--out", "small")
    assert code in (1, 2) and out == ""
    assert message in error and len(error.strip().splitlines()) == 1
    assert not Path("small").exists() and not Path("small.work").exists()


def test_without_a_text_it_says_that_code_is_a_poor_choice(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = answer(capsys, "compress", "nowhere", "--keep", "0.5", "--out", "small")
    assert code == 1 and "calibrating on the built-in corpus, Python code" in error
