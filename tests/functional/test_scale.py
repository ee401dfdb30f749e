"""A ladder from the first run to the plan, by the commands alone."""

import json
from pathlib import Path

import pytest

from kalmagrove.cli import main

LADDER = """
families: llama,kalmagrove
sizes: [16x1, 32x1]
tokens: ["512", "1024", "2048"]
head_dim: 8
loop:
  batch_size: 4
  context_length: 32
  precision: fp32
  device: cpu
"""


def test_sweep_fit_plan_and_report(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ladder.yaml").write_text(LADDER)
    words = ["scale", "sweep", "--config", "ladder.yaml", "--data", str(text_file), "--data.vocab_size", "300"]
    assert main([*words, "--dry_run", "--flops_per_second", "1e9", "--workers", "2"]) == 0
    out = capfd.readouterr().out
    assert "| all | | | 12 | 14.3 k |" in out and "hours with 2 workers" in out and not Path("ladder").exists()
    assert main([*words, "--out", "ladder", "--workers", "2"]) == 0
    out, told = capfd.readouterr()
    assert "12 of 12 runs in ladder/runs.jsonl" in out and "12 of 12 runs: " in told
    before = Path("ladder/runs.jsonl").read_bytes()
    # A ladder that is complete is only read, and another one may not take its folder.
    assert main([*words, "--out", "ladder", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["runs"] == 12
    assert Path("ladder/runs.jsonl").read_bytes() == before
    assert main([*words, "--out", "ladder", "--head_dim", "16"]) == 2
    assert "belongs to another configuration (head_dim: 8 -> 16)" in capfd.readouterr().err
    assert main(["scale", "fit", "ladder", "--resamples", "5"]) == 0
    assert "kalmagrove - llama" in capfd.readouterr().out
    assert main(["scale", "plan", "ladder", "--flops", "1e10"]) == 0
    assert "kalmagrove train --preset llama --optim.name adamw" in capfd.readouterr().out
    assert main(["report", "scaling", "ladder"]) == 0
    assert "| C10 |" in capfd.readouterr().out and Path("ladder/law/scaling.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --out"),
        (["--out", "x", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["--out", "x", "--flops_per_second", "1e9"], "--flops_per_second is for --dry_run; leave it out"),
        (["--dry_run", "--flops_per_second", "0"], "--flops_per_second must be positive, got 0"),
        (["--out", "x", "--sizes", "[16x]"], "size '16x' is not width x layers"),
        (["--out", "x", "--families", "bert"], "unknown family 'bert'"),
    ],
)
def test_a_wrong_sweep_is_named(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scale", "sweep", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x").exists()
