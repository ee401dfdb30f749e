"""``kalmagrove adapt`` as a user types it, and the adaptor in the other commands."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kalmagrove.adaptors import open_with_adaptor, read_adaptor
from kalmagrove.cli import main
from kalmagrove.models.convert import load_model

SMALL = [
    "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.head_dim", "8", "--loop.batch_size", "4",
    "--loop.context_length", "24", "--loop.device", "cpu", "--data.vocab_size", "300",
]  # fmt: skip
SHORT = ["--loop.batch_size", "4", "--loop.context_length", "24", "--loop.device", "cpu", "--rank", "3"]
CORES_ALONE = ["--bases", "weights", "--core", "dense"]


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    """A text unlike the base's."""
    texts = [
        f"Clause {n}. " + f"The tenant of house {n * 7 % 31} pays {n} pounds to the owner. " * 12 for n in range(50)
    ]
    path = tmp_path / "law.txt"
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture(params=["kalmagrove", "llama", "gpt2"])
def base(request: pytest.FixtureRequest, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "base"
    words = ["train", "--data", str(text_file), "--tokens", "4k", "--preset", request.param, "--out", str(folder)]
    code, _, error = answer(capsys, *words, *SMALL)
    assert code == 0, error
    return folder


def adapt(base: Path, domain: Path, *words: str) -> list[str]:
    read = [] if "weights" in words else ["--gradient_tokens", "1000"]
    return ["adapt", str(base), "--data", str(domain), "--name", "legal", "--tokens", "6k", *SHORT, *read, *words]


@pytest.mark.parametrize("options", [CORES_ALONE, []], ids=["weights", "gradient"])
def test_adapt_then_eval_generate_and_export(
    base: Path, options: list[str], domain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in sorted((base / "model").iterdir())}
    code, out, error = answer(capsys, *adapt(base, domain, "--json", *options))
    assert code == 0, error
    result = json.loads(out)
    assert result["test"]["loss"] < result["base"]["test"]["loss"] - 0.05
    assert before == {path: path.read_bytes() for path in sorted((base / "model").iterdir())}
    run = base / "adaptors" / "legal"
    stored = read_adaptor(run / "adaptor")
    assert stored.parameters == result["parameters"]["trained"]
    assert stored.facts["tokens"] == result["tokens"]
    if "weights" in options:
        assert stored.parameters == 9 * len(stored.cores)
        checkpoint = next((run / "checkpoints").glob("*/model.safetensors"))
        assert checkpoint.stat().st_size < 4 * stored.parameters + 4000

    scored = ["eval", str(base), "--data", str(domain), "--split", "test", "--device", "cpu", "--json"]
    scored += ["--precision", result["precision"], "--context_length", "24"]
    losses = [json.loads(answer(capsys, *scored, *more)[1])["loss"] for more in ([], ["--adaptor", "legal"])]
    assert losses == [pytest.approx(value["test"]["loss"], rel=2e-3) for value in (result["base"], result)]

    said = ["generate", str(base), "The tenant", "--seed", "1", "--max_new_tokens", "12", "--json"]
    texts = [json.loads(answer(capsys, *said, *more)[1])["text"] for more in ([], ["--adaptor", str(run)])]
    assert texts[0] != texts[1]

    code, out, _ = answer(capsys, "info", "--folder", str(base), "--adaptor", "legal", "--json")
    assert code == 0
    facts = json.loads(out)["adaptor"]
    assert facts["parameters"] == stored.parameters and facts["training"] == stored.facts

    code, _, error = answer(capsys, "export", str(base), "--adaptor", "legal", "--out", "dense")
    assert code == 0, error
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = open_with_adaptor(str(base), "legal")(input_ids=tokens).logits
        assert torch.allclose(load_model("dense")(input_ids=tokens).logits, expected, atol=1e-4)
        assert not torch.allclose(load_model(base)(input_ids=tokens).logits, expected, atol=1e-3)


@pytest.mark.parametrize("base", ["kalmagrove"], indirect=True)
def test_a_stopped_adaptation_ends_at_the_same_bits(
    base: Path, domain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = adapt(base, domain, "--tokens", "10k", "--loop.save_every", "20", "--out")
    assert answer(capsys, *words, "whole")[0] == 0
    child = subprocess.Popen([sys.executable, "-m", "kalmagrove", *words, "cut"], stderr=subprocess.DEVNULL)
    while not list(Path("cut/checkpoints").glob("step-*")) and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not Path("cut/result.json").exists()
    code, _, error = answer(capsys, *words, "cut")
    assert code == 0 and "going on from step" in error
    first, second = (read_adaptor(Path(name) / "adaptor") for name in ("whole", "cut"))
    assert first.cores.keys() == second.cores.keys()
    assert all(torch.equal(first.cores[name], second.cores[name]) for name in first.cores)
    losses = [
        [json.loads(line).get("loss") for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    code, _, error = answer(capsys, *words, "cut")
    assert code == 0 and "complete already" in error
    result = json.loads(Path("cut/result.json").read_text())
    Path("cut/result.json").write_text(json.dumps({name: result[name] for name in result if name != "base"}))
    code, _, error = answer(capsys, *words, "cut")
    assert code == 1 and "not an adaptor's result" in error


@pytest.mark.parametrize("base", ["kalmagrove"], indirect=True)
@pytest.mark.parametrize("core", ["diagonal", "dense"])
def test_kalma_trains_an_adaptor_too(base: Path, core: str, domain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = answer(capsys, *adapt(base, domain, "--optim.name", "kalma", "--core", core, "--json"))
    assert code == 0, error
    result = json.loads(out)
    assert result["test"]["loss"] < result["base"]["test"]["loss"] - 0.02


@pytest.mark.parametrize("base", ["kalmagrove"], indirect=True)
def test_mistakes_are_answered_in_one_line(base: Path, domain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        (["--name", "../up"], 2, "an adaptor's name has at most 64"),
        (["--bases", "both"], 2, "--bases must be gradient or weights"),
        (
            ["--bases", "weights", "--gradient_tokens", "9"],
            2,
            "--gradient_tokens is for --bases gradient; leave it out",
        ),
        (["--core", "block"], 2, "--core must be diagonal or dense"),
        (["--rank", "0"], 2, "--rank must be at least 1"),
        (["--loop.context_length", "64"], 2, "longer than the base's context, 24 tokens"),
        (["--optim.name", "muon"], 2, "optim.name must be kalma or adamw for an adaptor"),
        (["--loop.compile", "true"], 2, "unknown flag --loop.compile"),
        (["--data", "nowhere.txt"], 1, "nowhere.txt"),
    ]
    for words, expected, message in wrong:
        code, _, error = answer(capsys, *adapt(base, domain, *words))
        assert (code, error.count("\n")) == (expected, 1), error
        assert message in error
    assert not list(base.glob("adaptors/*/adaptor"))
    code, _, error = answer(capsys, "adapt", "nowhere", "--data", str(domain), "--name", "legal")
    assert code == 2 and "nowhere is no folder here" in error
    for command in (
        ["eval", str(base)],
        ["generate", str(base), "The"],
        ["export", str(base), "--out", "dense"],
        ["info", "--folder", str(base)],
    ):
        code, _, error = answer(capsys, *command, "--adaptor", "tax")
        assert code == 2 and "no adaptor 'tax'" in error
    assert not Path("dense").exists()


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_base_that_changed_is_refused(base: Path, domain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, *adapt(base, domain))[0] == 0
    model = load_model(base)
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    model.save_pretrained(base / "model")
    code, _, error = answer(capsys, *adapt(base, domain))
    assert code == 2 and "belongs to another configuration (model.fingerprint" in error
    code, _, error = answer(capsys, "eval", str(base), "--data", str(domain), "--adaptor", "legal")
    assert code == 1 and "was trained over another base model" in error
