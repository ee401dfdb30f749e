"""Whole commands as a user types them, in one process for speed: what they write, and what they answer to mistakes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalmagrove import commands
from kalmagrove.cli import main
from kalmagrove.commands.names import COMMANDS
from kalmagrove.commands.parsing import print_json

SMALL = [
    "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.head_dim", "8", "--loop.batch_size", "4",
    "--loop.context_length", "24", "--loop.device", "cpu", "--data.vocab_size", "300",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(params=["kalmagrove", "llama", "gpt2"])
def trained(
    request: pytest.FixtureRequest, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    folder = tmp_path / "run"
    words = ["train", "--data", str(text_file), "--tokens", "2k", "--preset", request.param, "--out", str(folder)]
    code, _, error = answer(capsys, *words, *SMALL)
    assert code == 0, error
    return folder


def test_train_then_eval_generate_and_info(trained: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((trained / "result.json").read_text())
    code, out, _ = answer(
        capsys, "eval", str(trained), "--data", str(text_file), "--split", "test", "--precision", result["precision"],
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0
    scores = json.loads(out)
    assert scores["loss"] == pytest.approx(result["test"]["loss"], rel=1e-3)
    assert scores["bits_per_byte"] == pytest.approx(result["test"]["bits_per_byte"], rel=1e-3)
    texts = [
        answer(capsys, "generate", str(trained), "The river", "--max_new_tokens", "9", "--seed", seed)[1]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("The river")
    code, out, _ = answer(capsys, "info", "--folder", str(trained), "--json")
    assert code == 0
    assert json.loads(out)["parameters"]["total"] == result["parameters"]["total"]


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_a_score_that_no_float_holds_is_null_in_json(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "one-word.txt"
    text.write_text("x" * 3000)
    code, out, error = answer(capsys, "eval", str(trained), "--data", str(text), "--device", "cpu", "--json")
    assert code == 0, error
    assert json.loads(out, parse_constant=pytest.fail)["word_perplexity"] is None


def test_json_output_is_standard_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": math.nan, "runs": [math.inf, 1.5]})
    assert capsys.readouterr().out == '{\n  "loss": null,\n  "runs": [\n    null,\n    1.5\n  ]\n}\n'
    print_json({"losses": [-math.inf]}, indent=None)
    assert capsys.readouterr().out == '{"losses": [null]}\n'


def test_no_command_writes_json_by_itself() -> None:
    modules = Path(commands.__file__).parent.glob("*.py")
    assert [module.name for module in modules if "json.dump" in module.read_text()] == ["parsing.py"]


def test_a_run_s_own_text_is_divided_as_it_was_for_its_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = tmp_path / "lines.jsonl", tmp_path / "run"
    words = [f"the river number {n} runs past the mill {n * n} times a year and comes to the sea" for n in range(400)]
    text.write_text("".join(json.dumps({"text": f"{line}. " * (1 + n % 3)}) + "\n" for n, line in enumerate(words)))
    given = ["train", "--data", str(text), "--data.seed", "7", "--tokens", "2k", "--out", str(folder), *SMALL]
    assert answer(capsys, *given)[0] == 0
    result = json.loads((folder / "result.json").read_text())
    scored = ["eval", str(folder), "--data", str(text), "--split", "test", "--precision", result["precision"]]
    tokens = [
        json.loads(answer(capsys, *scored, *seed, "--device", "cpu", "--json")[1])["tokens"]
        for seed in ([], ["--data_seed", "7"], ["--data_seed", "0"])
    ]
    assert tokens[0] == tokens[1] == result["test"]["tokens"] != tokens[2]
    assert answer(capsys, "eval", str(folder), "--data", str(text), "--data_seed", "7")[0] == 2


def test_greedy_generation_is_the_argmax_of_the_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from kalmagrove.data.tokenizer import load_tokenizer
    from kalmagrove.models.convert import load_model

    code, out, _ = answer(
        capsys, "generate", str(trained), "The river", "--max_new_tokens", "6", "--temperature", "0", "--json"
    )
    assert code == 0
    model, tokenizer = load_model(trained), load_tokenizer(str(trained / "model"))
    prompt = tokenizer.encode("The river").ids
    ids = list(prompt)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert json.loads(out)["text"] == tokenizer.decode(ids[len(prompt) :])


def test_a_smaller_stride_gives_every_token_more_context(
    trained: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = []
    for stride in ("24", "6"):
        out = answer(capsys, "eval", str(trained), "--data", str(text_file), "--stride", stride, "--json")[1]
        scores.append(json.loads(out))
    assert scores[0]["tokens"] == scores[1]["tokens"]
    assert scores[0]["loss"] != scores[1]["loss"]


def test_info_of_the_papers_base_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "info", "--preset", "kalmagrove-base", "--batch_size", "1", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["parameters"]["total"] == 74067188
    assert sum(v for k, v in facts["parameters"].items() if k != "total") == 74067188
    code, out, _ = answer(capsys, "info", "--preset", "kalmagrove-base", "--batch_size", "1")
    assert "74,067,188" in out and "decoding cache" in out


def test_data_prepare_prints_what_it_packed(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "data", "prepare", "--data", str(text_file), "--vocab_size", "300", "--json")
    assert code == 0
    packed = json.loads(out)
    assert set(packed["splits"]) == {"train", "valid", "test"}
    assert Path(packed["folder"], "train.bin").stat().st_size == 2 * packed["splits"]["train"]["tokens"]


def test_a_packed_folder_is_data_wherever_it_was_made(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "gone.txt"
    source.write_bytes(text_file.read_bytes())
    prepared = json.loads(answer(capsys, "data", "prepare", "--data", str(source), "--vocab_size", "300", "--json")[1])
    Path(prepared["folder"]).rename(tmp_path / "copied")
    source.unlink()
    words = ["train", "--data", "copied", "--tokens", "200", "--preset", "llama", "--out", "run"]
    code, _, error = answer(capsys, *words, *SMALL)
    assert code == 0, error
    code, _, error = answer(capsys, *words[:-1], "other", *SMALL, "--data.tokenizer", "tokenizer.json")
    assert code == 2
    assert "copied is packed already, with its own tokenizer; leave data.tokenizer out" in error
    code, _, error = answer(capsys, *words[:-1], "other", *SMALL[:-1], "301")
    assert code == 2
    assert "copied is packed already, with its own vocab_size; leave data.vocab_size out" in error
    (tmp_path / "copied" / "train.bin").unlink()
    code, _, error = answer(capsys, *words[:-1], "other", *SMALL)
    assert code == 1
    assert "train.bin" in error


def test_a_printed_configuration_is_read_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = None
    try:
        main(["train", "--out", "x", "--model.rank", "16", "--print_config"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    printed = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(printed.replace("out: x", "out: y"))
    with pytest.raises(SystemExit):
        main(["train", "--config", "config.yaml", "--loop.batch_size", "5", "--print_config"])
    again = capsys.readouterr().out
    assert "rank: 16" in again and "batch_size: 5" in again and "out: y" in again


TWO_WORDS = ("data prepare", "scale sweep", "scale fit", "scale plan", "report scaling", "report claims")


@pytest.mark.parametrize("command", [*(c for c in COMMANDS if c not in ("data", "scale")), *TWO_WORDS])
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"kalmagrove {command}" in out and "examples:" in out


def test_the_general_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--help")[0] == 0
    code, out, _ = answer(capsys)
    assert code == 2
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)


USAGE = {
    "unknown command": (["comprae"], "unknown command 'comprae'; did you mean 'compare'?"),
    "unknown flag": (
        ["train", "--out", "r", "--modle.rank", "8"],
        "unknown flag --modle.rank; did you mean --model.rank?",
    ),
    "unknown preset": (
        ["train", "--out", "r", "--preset", "lama-tiny", "--data", "TEXT"],
        "unknown preset 'lama-tiny'; did you mean 'llama-tiny'?",
    ),
    "rank above the width": (
        ["train", "--out", "r", "--data", "TEXT", *SMALL, "--model.rank", "33"],
        "rank 33 must be between 1 and 16",
    ),
    "not a number": (["train", "--out", "r", "--model.rank", "abc"], "--model.rank: 'abc' is not int"),
    "unknown optimiser": (["train", "--out", "r", "--optim.name", "adma"], "--optim.name: 'adma' is not"),
    "no folder": (["train"], "out"),
    "heads that do not divide": (
        ["train", "--out", "r", "--data", "TEXT", *SMALL, "--model.head_dim", "7"],
        "head_dim must be even",
    ),
    "micro-batch": (
        ["train", "--out", "r", *SMALL, "--loop.micro_batch_size", "3"],
        "loop.micro_batch_size 3 does not divide loop.batch_size 4",
    ),
    "fewer tokens than a batch": (["train", "--out", "r", *SMALL, "--tokens", "9"], "less than one batch of 96 tokens"),
    "one model": (["compare", "--out", "r", "--models", "llama"], "at least two presets"),
    "optimisers and models": (
        ["compare", "--out", "r", "--models", "gpt2,llama,slim", "--optim", "adamw,kalma"],
        "optim names 2 optimisers for 3 models",
    ),
    "seeds": (["compare", "--out", "r", "--seeds", "1,1"], "seeds must be different whole numbers"),
    "size": (["compare", "--out", "r", "--size", "huge"], "unknown size 'huge'; sizes: pico, nano, tiny, mini"),
    "budget": (["compare", "--out", "r", "--budget", "soon"], "'soon' is not a duration"),
    "seed": (["train", "--out", "r", "--seed", "-1"], "loop.seed must not be negative, got -1"),
    "momentum": (["train", "--out", "r", "--optim.momentum", "2"], "optim.momentum must be at least 0.0 and below 1.0"),
    "refresh": (["train", "--out", "r", "--optim.refresh_every", "0"], "optim.refresh_every must be at least 1"),
    "band": (
        ["train", "--out", "r", "--data", "TEXT", *SMALL, "--model.sharing", "band", "--model.group_size", "3"],
        "sharing = band cuts",
    ),
    "resolutions": (["info", "--model.resolutions", "[{foo: 1}]"], "foo"),
    "info batch": (["info", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    "info folder": (["info", "--folder", "x", "--vocab_size", "9"], "--folder is a model as it is"),
    "superscript seed": (["compare", "--out", "r", "--seeds", "\u00b2"], "seeds must be different whole numbers"),
    "equal seeds": (["compare", "--out", "r", "--seeds", "0,00"], "seeds must be different whole numbers"),
    "generation seed": (["generate", "RUN", "x", "--seed", "-1"], "--seed must be between 0 and 2**63"),
    "info optimiser": (["info", "--optim", "sgd"], "--optim must be kalma, muon, soap or adamw, got 'sgd'"),
    "data word": (["data", "prepaer"], "needs the word prepare, got 'prepaer'"),
    "sampling": (["generate", "RUN", "x", "--top_p", "1.5"], "0 < --top_p <= 1"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(
    case: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = USAGE[case]
    code, out, error = answer(capsys, *(str(text_file) if word == "TEXT" else word for word in words))
    assert code == 2, error
    assert message in error and out == ""
    assert error.startswith("kalmagrove: ") and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "r").exists()


FAILURES = {
    "missing text": (["train", "--out", "r", "--data", "nowhere.txt"], "nowhere.txt"),
    "empty text": (["train", "--out", "r", "--data", "empty.txt"], "empty.txt"),
    "binary text": (["train", "--out", "r", "--data", "garbage.txt"], "garbage.txt"),
    "too little text": (
        ["train", "--out", "r", "--data", "little.txt", *SMALL, "--loop.context_length", "9000", "--tokens", "1m"],
        "tokens",
    ),
    "no model": (["eval", "nothing-here"], "nothing-here"),
    "no comparison": (["report", "nothing-here"], "nothing-here"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_input_that_cannot_be_used_is_named_and_nothing_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "garbage.txt").write_bytes(os.urandom(3000) + b"\0")
    (tmp_path / "little.txt").write_text("A few words, again and again. " * 300)
    words, message = FAILURES[case]
    code, out, error = answer(capsys, *words)
    assert code in (1, 2), error
    assert message in error and out == ""
    assert error.splitlines()[-1].startswith("kalmagrove: ") and "Traceback" not in error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_token_file_that_was_cut_or_changed_is_an_error_before_step_1(
    damage: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = answer(capsys, "data", "prepare", "--data", str(text_file), "--vocab_size", "300", "--json")[1]
    tokens = Path(json.loads(out)["folder"], "train.bin")
    content = bytearray(tokens.read_bytes())
    content[10] ^= 1
    tokens.write_bytes(content[:-4] if damage == "cut" else content)
    code, _, error = answer(capsys, "train", "--data", str(text_file), "--tokens", "2k", "--out", "r", *SMALL)
    assert code == 1
    assert "train.bin" in error and not (tmp_path / "r").exists()


def test_a_run_folder_of_another_configuration_is_left_alone(
    trained: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    code, _, error = answer(capsys, "train", "--data", str(text_file), "--tokens", "3k", "--out", str(trained), *SMALL)
    assert code == 2
    assert "loop.tokens" in error
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(
    number: signal.Signals, code: int, text_file: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "kalmagrove", "train", "--data", str(text_file), "--tokens", "200k", "--out", "r",
             "--optim.name", "adamw", *SMALL]  # fmt: skip
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (not metrics.exists() or not metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    assert "saved" in error and "Traceback" not in error
    saved = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert len(saved) >= 1
    step = int(saved[-1].name.removeprefix("step-"))
    again = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    lines = iter(again.stderr.readline, "")
    assert any(f"going on from step {step}" in line for line in lines)
    again.kill()
    again.communicate()


@pytest.mark.parametrize("command", ["compare", "train"])
def test_half_a_launcher_is_an_error(
    command: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, error = answer(capsys, command, "--data", str(text_file), "--out", str(tmp_path / "run"))
    assert code == 2 and "MASTER_ADDR expected, but not set; start several processes with torchrun or --nproc" in error
    assert not (tmp_path / "run").exists()


def test_the_model_of_a_checkpoint_is_exported_where_the_run_was_made(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(trained), "--checkpoint", "last", "--out"]
    code, out, error = answer(capsys, *words, str(tmp_path / "last"))
    assert code == 0 and "the model after step" in out, error
    code, _, error = answer(capsys, "generate", str(tmp_path / "last"), "The river", "--max_new_tokens", "3")
    assert code == 0, error
    code, _, error = answer(capsys, *words, str(tmp_path / "other"), "--format", "llama")
    assert code == 2 and "--checkpoint takes the model as it is" in error
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, error = answer(capsys, *words, str(tmp_path / "other"))
    assert code == 2 and "is not here; run this in the folder where it was made" in error
    assert list((tmp_path / "elsewhere").iterdir()) == [] and not (tmp_path / "other").exists()


def test_import_and_help_load_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, kalmagrove, kalmagrove.cli; kalmagrove.cli.main(['--help']); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_documents_are_told_apart_in_training_and_decoding(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--data",
        str(text_file),
        "--tokens",
        "2k",
        "--model.document_mask",
        "true",
        "--out",
        str(tmp_path / "run"),
    ]
    code, _, error = answer(capsys, "train", *words, *SMALL)
    assert code == 0, error
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["document_mask"] is True and config["eos_token_id"] is not None
    code, out, error = answer(capsys, "generate", str(tmp_path / "run"), "The river", "--max_new_tokens", "5")
    assert code == 0 and out.startswith("The river"), error
    code, out, error = answer(capsys, "info", "--model.document_mask", "true", "--json")
    assert code == 0 and json.loads(out)["parameters"]["total"] > 0, error


def test_export_writes_a_dense_folder_that_gives_the_same_text(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    code, out, error = answer(capsys, "export", str(trained), "--out", str(tmp_path / "dense"))
    assert code == 0, error
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    if config["model_type"] == "kalmagrove":
        assert config["projections"] == "dense" and "a dense kalmagrove model" in out
    else:
        assert f"a stock {config['model_type']} model" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense") is not None
    texts = [
        answer(capsys, "generate", str(folder), "The river", "--max_new_tokens", "9", "--temperature", "0")[1]
        for folder in (trained, tmp_path / "dense")
    ]
    assert texts[0] == texts[1]
    # What a killed export has left is not published, and the current folder is a folder like any other.
    (tmp_path / ".here.partial").mkdir()
    (tmp_path / ".here.partial" / "stale.bin").write_text("stale")
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    code, _, error = answer(capsys, "export", str(trained), "--out", ".")
    assert code == 0 and not (tmp_path / "here" / "stale.bin").exists(), error
    os.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, message in (
        (["--out", str(tmp_path / "dense")], "exists and is not empty"),
        (["--out", str(tmp_path / "x"), "--format", "onnx"], "--format must be one of auto, llama, gpt2, dense"),
        (["--out", str(tmp_path / "x"), "--adaptor", "legal"], "--adaptor: "),
    ):
        code, _, error = answer(capsys, "export", str(trained), *words)
        assert code == 2 and message in error and error.count("\n") == 1
    if config["model_type"] == "kalmagrove":
        code, _, error = answer(capsys, "export", str(trained), "--out", str(tmp_path / "x"), "--format", "llama")
        assert code == 2 and "differs in attention, qk_norm" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before
