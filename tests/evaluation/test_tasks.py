"""Evaluation tasks of local files: what a row must hold, and scores against sums of the model's own logits."""

import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmagrove.adaptors import Adaptors, save_adaptor
from kalmagrove.cli import main
from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import load_tokenizer, save_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.evaluation.tasks import TASKS, find_rows, read_rows, task_names
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import load_model, save_model

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "evaluate.md"
CONTEXT = 48
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"query": "Question: What turns?", "choices": ["The river", "an engine that follows", "9"], "gold": 1},
        {"query": "Question: Who holds 7 signals?", "choices": ["The teacher.", "A garden", "8", "z"], "gold": 0},
        {"query": "Question: What is found?", "choices": ["gardens", "17 rivers and 3 engines"], "gold": 1},
    ],
    "copa": [
        {"query": "The garden turns, because", "choices": ["the river holds it.", "9."], "gold": 1, "note": "mine"},
        {"query": "The signal finds 4 teachers, therefore", "choices": ["it follows.", "it turns 12."], "gold": 0},
    ],
    "lambada_openai": [
        {"context": "Story 3. The river follows 5", "continuation": "gardens"},
        {"context": "word " * 60 + "The engine", "continuation": "holds"},
    ],
}


@pytest.fixture(scope="module", params=["kalmagrove", "llama"])
def model_folder(request: pytest.FixtureRequest, packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "max_position_embeddings": CONTEXT}
    config = model_config(request.param, sizes | {"vocab_size": packed.vocab_size}, bos_token_id=0, eos_token_id=0)
    model = build_model(config, seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_model(model, folder)
    save_tokenizer(packed.load_tokenizer(), folder, context_length=CONTEXT)
    return folder


def write_rows(folder: Path) -> Path:
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def by_hand(folder: Path, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether greedy decoding writes it; the prompt is cut from the left."""
    tokenizer, model = load_tokenizer(str(folder)), load_model(folder)
    count = len(tokenizer.encode(context + continuation).ids) - len(tokenizer.encode(context).ids)
    ids = tokenizer.encode(context + continuation).ids[-(CONTEXT + 1) :]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -count:].log_softmax(-1)
    targets = torch.tensor(ids[-count:])
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def answers(folder: Path, name: str, prompt: str) -> list[list[float]]:
    return [
        [by_hand(folder, prompt.format(row["query"]), f" {choice}")[0] for choice in row["choices"]]
        for row in ROWS[name]
    ]


def accuracy(scores: list[list[float]], name: str) -> float:
    right = [max(range(len(s)), key=s.__getitem__) == row["gold"] for s, row in zip(scores, ROWS[name], strict=True)]
    return sum(right) / len(right)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_scores_are_those_of_the_models_own_logits(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    words = ["eval", str(model_folder), "--tasks", "arc_easy,copa,lambada_openai", "--precision", "fp32"]
    words += ["--task_data", str(write_rows(tmp_path)), "--device", "cpu"]
    code, out, error = answer(capsys, *words, "--json")
    assert code == 0, error
    found = json.loads(out)
    arc = answers(model_folder, "arc_easy", "{}\nAnswer:")
    lengths = [[len(choice) for choice in row["choices"]] for row in ROWS["arc_easy"]]
    normalised = [
        [s / n for s, n in zip(scores, sizes, strict=True)] for scores, sizes in zip(arc, lengths, strict=True)
    ]
    assert found["arc_easy"]["acc"] == pytest.approx(accuracy(arc, "arc_easy"))
    assert found["arc_easy"]["acc_norm"] == pytest.approx(accuracy(normalised, "arc_easy"))
    assert found["copa"]["acc"] == pytest.approx(accuracy(answers(model_folder, "copa", "{}"), "copa"))
    last = [by_hand(model_folder, row["context"], f" {row['continuation']}") for row in ROWS["lambada_openai"]]
    assert found["lambada_openai"]["acc"] == sum(greedy for _, greedy in last) / 2
    mean = sum(nats for nats, _ in last) / 2
    assert found["lambada_openai"]["perplexity"] == pytest.approx(torch.tensor(-mean).exp().item(), rel=1e-4)
    assert {name: scores["cut"] for name, scores in found.items()} == {"arc_easy": 0, "copa": 0, "lambada_openai": 1}
    code, out, _ = answer(capsys, *words, "--limit", "1")
    assert code == 0 and "over 1 questions" in out and len(out.splitlines()) == 3


def test_an_adaptor_answers_too(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    adaptors = Adaptors(load_model(model_folder))
    with torch.no_grad():
        for core in adaptors.add_adaptor("legal", rank=4).values():
            core.normal_(generator=torch.Generator().manual_seed(2))
    save_adaptor(adaptors, "legal", tmp_path / "legal")
    words = ["eval", str(model_folder), "--tasks", "lambada_openai", "--task_data", str(write_rows(tmp_path)), "--json"]
    found = [json.loads(answer(capsys, *words, *more)[1]) for more in ([], ["--adaptor", str(tmp_path / "legal")])]
    assert found[0]["lambada_openai"]["perplexity"] != found[1]["lambada_openai"]["perplexity"]


def test_lm_eval_itself_opens_the_folder_and_finds_the_same(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the guide says: ours after an import of the package, a stock folder without it."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    data = write_rows(tmp_path)
    (written,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (data / "mine.yaml").write_text(written.replace("tasks/arc_easy.jsonl", str(data / "arc_easy.jsonl")))
    ours = json.loads((model_folder / "config.json").read_text())["model_type"] == "kalmagrove"
    program = ["-c", "import kalmagrove; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"]
    words = ["run", "--model", "hf", "--model_args", f"pretrained={model_folder}", "--tasks", "mine", "--device", "cpu"]
    words += ["--include_path", str(data), "--output_path", str(tmp_path / "out")]
    command = [sys.executable, *(program if ours else ["-m", "lm_eval"]), *words]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["mine"]
    words = [
        "eval",
        str(model_folder),
        "--tasks",
        "arc_easy",
        "--task_data",
        str(data),
        "--precision",
        "fp32",
        "--json",
    ]
    found = json.loads(answer(capsys, *words)[1])["arc_easy"]
    assert found["acc"] == theirs["acc,none"] and found["acc_norm"] == theirs["acc_norm,none"]
    assert found["acc_stderr"] == pytest.approx(theirs["acc_stderr,none"])


def test_an_answer_longer_than_the_context_is_named(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    row = {"query": "Why?", "choices": ["a", "1 " * CONTEXT], "gold": 0}
    (tmp_path / "copa.jsonl").write_text(json.dumps(row))
    code, out, error = answer(capsys, "eval", str(model_folder), "--tasks", "copa", "--task_data", str(tmp_path))
    assert code == 1 and out == "" and error.count("\n") == 1
    assert "copa: the answer ' 1 1" in error and f"between 1 and {CONTEXT}, the context, can be scored" in error


@pytest.mark.parametrize(("suffix", "opener"), [(".jsonl", open), (".jsonl.xz", lzma.open), (".jsonl.gz", gzip.open)])
def test_rows_are_read_packed_or_not(suffix: str, opener: Any, tmp_path: Path) -> None:
    with opener(tmp_path / f"copa{suffix}", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS["copa"]) + "\n\n")
    rows = read_rows("copa", find_rows("copa", tmp_path))
    assert rows == [{name: row[name] for name in ("query", "choices", "gold")} for row in ROWS["copa"]]
    assert len(read_rows("copa", find_rows("copa", tmp_path), limit=1)) == 1


WRONG = {
    "no JSON": ("{", "this is not JSON"),
    "no object": ("[1]", "a row must be a JSON object"),
    "field": ('{"query": "a", "gold": 0}', "the row has no choices (a row needs query, choices, gold)"),
    "empty": ('{"query": " ", "choices": ["a", "b"], "gold": 0}', "query must be a text that is not empty"),
    "number": ('{"query": 1, "choices": ["a", "b"], "gold": 0}', "query must be a text"),
    "one choice": ('{"query": "a", "choices": ["a"], "gold": 0}', "choices must be at least two texts"),
    "no text": ('{"query": "a", "choices": ["a", null], "gold": 0}', "choices must be at least two texts"),
    "text of choices": ('{"query": "a", "choices": "ab", "gold": 0}', "choices must be at least two texts"),
    "gold": ('{"query": "a", "choices": ["a", "b"], "gold": 2}', "gold must be the place of the right choice, 0 to 1"),
    "true": ('{"query": "a", "choices": ["a", "b"], "gold": true}', "gold must be the place of the right choice"),
    "surrogate": ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "query must be a text"),
    "deep": ("[" * 100_000, "this is not JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    line, message = WRONG[case]
    path = tmp_path / "copa.jsonl"
    path.write_text(json.dumps(ROWS["copa"][0]) + "\n" + line + "\n")
    with pytest.raises(KalmaGroveError) as error:
        read_rows("copa", path)
    assert str(error.value).startswith(f"{path}, line 2: ") and message in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "copa.jsonl.xz").write_bytes(lzma.compress(b"{}" * 1000)[:40])
    (tmp_path / "arc_easy.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "lambada_openai.jsonl").write_bytes(b"\xff\xfe{}\n")
    for name, message in {
        "copa": "is damaged or cut short",
        "arc_easy": "is damaged or cut short",
        "lambada_openai": "is not text in UTF-8",
    }.items():
        with pytest.raises(KalmaGroveError, match=message):
            read_rows(name, find_rows(name, tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(KalmaGroveError, match="holds no rows; each is a line of JSON with query, choices, gold"):
        read_rows("copa", tmp_path / "empty.jsonl")


def test_names_of_tasks() -> None:
    assert task_names("arc_easy, copa") == ["arc_easy", "copa"]
    with pytest.raises(UsageError, match="unknown task 'arc_eazy'; did you mean 'arc_easy'"):
        task_names("arc_eazy")
    with pytest.raises(UsageError, match="names copa twice"):
        task_names("copa,copa")


USAGE = {
    "no folder": (["--tasks", "copa"], "--tasks needs --task_data"),
    "no tasks": (["--task_data", "x"], "--task_data is for --tasks; name the tasks too"),
    "limit alone": (["--limit", "3"], "--limit is for --tasks"),
    "text too": (["--tasks", "copa", "--task_data", "x", "--data", "t.txt"], "--data is for a text"),
    "unknown": (["--tasks", "kopa", "--task_data", "x"], "unknown task 'kopa'; did you mean 'copa'?"),
    "not installed": (["--tasks", "copa", "--task_data", "x"], "pip install 'kalmagrove[eval]'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "not installed":
        monkeypatch.setitem(sys.modules, "lm_eval", None)
    words, message = USAGE[case]
    code, out, error = answer(capsys, "eval", "nowhere", *words)
    assert code == 2 and message in error and out == "" and error.count("\n") == 1


def test_a_task_without_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    code, _, error = answer(capsys, "eval", "nowhere", "--tasks", "copa", "--task_data", str(tmp_path))
    assert code == 2 and f"there is no {tmp_path / 'copa'}.jsonl" in error


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared/data/eval of public tasks is not here")
def test_the_public_files_are_read() -> None:
    counts = {name: len(read_rows(name, find_rows(name, SHARED))) for name in TASKS}
    assert counts == {"arc_easy": 2376, "copa": 100, "lambada_openai": 5153}
