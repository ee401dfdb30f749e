"""The optimum is exact, nothing beats it, trained models come near it; answers are counted as they were given."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kalmagrove.cli import main
from kalmagrove.data.batches import evaluation_windows
from kalmagrove.data.packing import prepare
from kalmagrove.data.synthetic.draws import UniformDraws
from kalmagrove.data.synthetic.markov import MarkovSource
from kalmagrove.data.synthetic.recall import RecallSource
from kalmagrove.data.synthetic.source import open_synthetic
from kalmagrove.data.synthetic.words import END, FIRST_WORD
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.perplexity import describe_optimum, scores_from_nats
from kalmagrove.evaluation.synthetic import (
    RecallOutcome,
    Reference,
    entropy_rate,
    optimum_nats,
    recall_outcomes,
    summarize_recall,
    with_references,
)
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.trainer import score_split

MARKOV = "synthetic:markov,states=8,symbols=13,length=60,tokens=200k"
RECALL = "synthetic:recall,pairs=3,queries=4,keys=7,values=5,distractors=6,length=37,tokens=200k"
BOTH = pytest.mark.parametrize("source", [MARKOV, RECALL], ids=["markov", "recall"])
CPU: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}


def stream_of(source: str, stream: int = 3, tokens: int = 20_000) -> np.ndarray:
    documents = open_synthetic(source).documents(stream, tokens)
    return np.concatenate([np.append(document, END) for document in documents])


def windows_of(stream: np.ndarray, length: int, stride: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
    return evaluation_windows(stream, context_length=length, stride=stride or length)


@BOTH
@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (600, 600), (9, 1)])
def test_the_optimum_is_that_of_exactly_the_scored_tokens(source: str, length: int, stride: int) -> None:
    stream, known = stream_of(source, tokens=500), open_synthetic(source)
    expected, scored = 0.0, 0
    for window, count in windows_of(stream, length, stride):
        expected += float(known.window_nats(window[None])[0, -count:].sum())
        scored += count
    assert scored == len(stream) - 1
    assert optimum_nats(source, windows_of(stream, length, stride)) == pytest.approx(expected, rel=1e-12)


@BOTH
def test_more_context_is_never_worse_on_average(source: str) -> None:
    stream = stream_of(source, tokens=60_000)
    losses = [optimum_nats(source, windows_of(stream, length)) / (len(stream) - 1) for length in (1, 4, 16, 64, 256)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.1


def rivals(source: str, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Nats (windows, tokens) of predictors that know less, or something wrong."""
    known = open_synthetic(source)
    text = stream_of(source, stream=1, tokens=200_000)
    size = int(text.max()) + 1
    pairs = np.full((size, size), 0.1)
    np.add.at(pairs, (text[:-1], text[1:]), 1.0)
    pairs /= pairs.sum(axis=1, keepdims=True)
    triples = np.full((size, size, size), 1.0) * pairs[None]
    np.add.at(triples, (text[:-2], text[1:-1], text[2:]), 1.0)
    triples /= triples.sum(axis=-1, keepdims=True)
    first, second = windows[:, :2], windows[:, 1:]
    found = {
        "bigrams": -np.log(pairs[windows[:, :-1], second]),
        "trigrams": np.concatenate(
            [
                -np.log(pairs[first[:, :1], first[:, 1:]]),
                -np.log(triples[windows[:, :-2], windows[:, 1:-1], windows[:, 2:]]),
            ],
            axis=1,
        ),
    }
    if isinstance(known, MarkovSource):
        wrong = replace(known.model, transition=0.9 * known.model.transition + 0.1 * known.model.stationary)
        found["a wrong chain"] = wrong.window_nats(windows)
        beginning = known.model.predictions(windows, known.model.transition[-1] * 0.99 + known.model.stationary * 0.01)
        found["a wrong start"] = -np.log(np.stack([p for _, p in beginning][1:], axis=1))
    else:
        longer = RecallSource(replace(known.options, length=40))
        found["another gap"] = longer.window_nats(windows)
        found["never recalls"] = known.window_nats(windows) + 1.0 * _answer_places(known, windows)
    return found


def _answer_places(source: RecallSource, windows: np.ndarray) -> np.ndarray:
    places = np.zeros(windows.shape)
    for row, window in enumerate(windows.tolist()):
        places[row, [answer.place for answer in source.answers(window)]] = 1.0
    return places[:, 1:]


@BOTH
def test_no_rival_is_better_on_average(source: str) -> None:
    stream = stream_of(source, tokens=100_000)
    count = (len(stream) - 1) // 50
    windows = stream[np.arange(count)[:, None] * 50 + np.arange(51)]
    best = open_synthetic(source).window_nats(windows)
    for name, nats in rivals(source, windows).items():
        more = (nats - best).mean(axis=1)
        error = more.std(ddof=1) / math.sqrt(count)
        assert more.mean() > 3 * error > 0, name


def test_the_entropy_rate_lies_between_its_bounds_and_long_windows_reach_it() -> None:
    rate = entropy_rate(MARKOV, windows=200, length=200)
    assert rate.lower <= rate.upper + 3 * rate.upper_error
    assert rate.upper - rate.lower < 0.01 and 0 < rate.upper_error < 0.01
    short = entropy_rate(MARKOV, windows=4000, length=4)
    assert short.lower < rate.lower - 3 * short.lower_error and short.upper > rate.upper + 3 * short.upper_error
    windows, _ = open_synthetic(MARKOV).model.sample_windows(300, 400, UniformDraws(9))
    nats = open_synthetic(MARKOV).window_nats(windows)[:, 200:].mean(axis=1)
    assert abs(nats.mean() - rate.upper) < 4 * (nats.std() / math.sqrt(300) + rate.upper_error)
    assert entropy_rate(MARKOV, windows=50, length=20) == entropy_rate(MARKOV, windows=50, length=20)


def test_the_entropy_rate_of_recall_is_what_endless_context_costs() -> None:
    rate = entropy_rate(RECALL)
    assert rate.lower == rate.upper and rate.lower_error == 0
    source = open_synthetic(RECALL)
    stream = stream_of(RECALL, tokens=80_000)
    length = 4000
    windows = stream[np.arange(len(stream) // length - 1)[:, None] * length + np.arange(length + 1)]
    nats = source.window_nats(windows).mean(axis=1)
    assert abs(nats.mean() - rate.upper) < 4 * nats.std() / math.sqrt(len(nats)) + 0.002


@pytest.mark.parametrize(
    "source", ["synthetic:markov,states=4,levels=1,symbols=8,length=30,tokens=200k"], ids=["markov"]
)
def test_a_trained_model_stays_above_the_optimum_and_comes_near_it(source: str, tmp_path: Path) -> None:
    data = prepare(source, tmp_path / "data")
    config = TrainConfig(
        model=ModelConfig(preset="llama", hidden_size=32, num_hidden_layers=2, head_dim=16),
        optim=OptimConfig(name="adamw", lr=1e-2),
        loop=LoopConfig(tokens="150k", batch_size=32, context_length=32, device="cpu", precision="fp32"),
    )
    run = TrainingRun(config, data)
    before = score_split(run, "test")
    while not run.done:
        run.train_step()
    after = score_split(run, "test")
    assert before.excess is not None and after.excess is not None and after.optimum == before.optimum
    assert before.excess > 0.4
    assert 0 < after.excess < 0.05


class Oracle(nn.Module):
    """Looks the answers up, in the window that it is given."""

    def __init__(self, source: str, *, wrong_beyond: int) -> None:
        super().__init__()
        self.source, self.wrong_beyond = open_synthetic(source), wrong_beyond

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, len(self.source.kinds))
        for row, tokens in enumerate(input_ids.tolist()):
            book: dict[int, tuple[int, int]] = {}
            for place, token in enumerate(tokens):
                if token == END:
                    book = {}
                if self.source.kinds[token] == 3 and place:
                    book[tokens[place - 1]] = place, token
                if token in book and place + 1 - book[token][0] <= self.wrong_beyond:
                    logits[row, place, book[token][1]] = 100.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("stride", [40, 13])
def test_answers_are_right_where_the_model_knows_them(stride: int) -> None:
    stream = stream_of(RECALL, tokens=8000)
    outcomes = recall_outcomes(
        Oracle(RECALL, wrong_beyond=9), RECALL, windows_of(stream, 40, stride), vocab_size=21, **CPU
    )
    near = [outcome for outcome in outcomes if outcome.distance <= 9]
    assert len(outcomes) > 400 and 100 < len(near) < len(outcomes)
    assert all(outcome.is_right and outcome.nats < 1e-6 for outcome in near)
    far = [outcome for outcome in outcomes if outcome.distance > 9]
    assert not any(outcome.is_right for outcome in far)
    assert all(outcome.nats == pytest.approx(math.log(21), rel=1e-5) for outcome in far)
    assert {outcome.pairs for outcome in outcomes} == {1, 2, 3}


def test_each_answer_counts_once_with_overlapping_windows() -> None:
    """With a window over everything there is nothing that only overlapping windows know."""
    stream = stream_of(RECALL, tokens=1500)
    whole = recall_outcomes(Oracle(RECALL, wrong_beyond=99), RECALL, windows_of(stream, 2000), vocab_size=21, **CPU)
    parts = recall_outcomes(Oracle(RECALL, wrong_beyond=99), RECALL, windows_of(stream, 400, 50), vocab_size=21, **CPU)
    assert [outcome.distance for outcome in whole] == [outcome.distance for outcome in parts]


def test_outcomes_are_summed_up_by_powers_of_two() -> None:
    outcomes = [RecallOutcome(2, 1, 1.0, True), RecallOutcome(3, 3, 2.0, False), RecallOutcome(4, 4, 3.0, True)]
    assert summarize_recall(outcomes) == {
        "answers": 3,
        "accuracy": 2 / 3,
        "nats": 2.0,
        "by_distance_below": {
            "4": {"answers": 2, "accuracy": 0.5, "nats": 1.5},
            "8": {"answers": 1, "accuracy": 1.0, "nats": 3.0},
        },
        "by_pairs_up_to": {
            "1": {"answers": 1, "accuracy": 1.0, "nats": 1.0},
            "4": {"answers": 2, "accuracy": 0.5, "nats": 2.5},
        },
    }


def test_scores_tell_the_excess_only_where_the_optimum_is_known() -> None:
    plain = scores_from_nats(30.0, tokens=10, words=9, text_bytes=40)
    assert with_references(plain, []) == plain and plain.excess is None
    assert set(plain.to_dict()) == {"loss", "perplexity", "word_perplexity", "bits_per_byte", "tokens"}
    assert describe_optimum(plain.to_dict()) == []
    outcome = RecallOutcome(5, 2, 0.5, True)
    known = with_references(plain, [Reference(12.0, [outcome]), Reference(8.0, [])])
    assert (known.optimum, known.excess) == (2.0, 1.0)
    assert known.to_dict()["excess"] == 1.0 and known.to_dict()["recall"]["answers"] == 1
    lines = describe_optimum(known.to_dict())
    assert "2.0000 nats a token, the best possible; excess 1.0000" in lines[0]
    assert lines[1:] == ["answers         100.0% of 1 right", "tokens back <   8: 100.0%", "pairs up to     2: 100.0%"]


SMALL = [
    "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.head_dim", "8", "--loop.batch_size", "4",
    "--loop.context_length", "48", "--loop.device", "cpu",
]  # fmt: skip


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@BOTH
def test_train_eval_and_generate_take_a_task_as_any_text(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = answer(
        capsys, "train", "--data", source, "--preset", "llama", "--tokens", "2k", "--out", "run", *SMALL
    )
    assert code == 0, error
    assert "nats a token, the best possible; excess" in error
    result = json.loads(Path("run/result.json").read_text())
    assert 0 < result["test"]["excess"] == pytest.approx(result["test"]["loss"] - result["test"]["optimum"])
    assert ("recall" in result["test"]) == (source == RECALL)
    words = ["eval", "run", "--data", source, "--split", "test", "--device", "cpu", "--precision", result["precision"]]
    code, out, error = answer(capsys, *words, "--json")
    assert code == 0, error
    scores = json.loads(out)
    assert scores["optimum"] == pytest.approx(result["test"]["optimum"], rel=1e-9)
    assert scores["excess"] == pytest.approx(result["test"]["excess"], abs=1e-3)
    assert f"optimum         {scores['optimum']:.4f}" in answer(capsys, *words)[1]
    prompt = " ".join(open_synthetic(source).words[:3])
    code, out, error = answer(capsys, "generate", "run", prompt, "--max_new_tokens", "5", "--seed", "1")
    assert code == 0, error
    assert out.startswith(prompt) and set(out.split()) <= set(open_synthetic(source).words)
    assert len(out.split()) > 3


def test_an_ordinary_model_has_no_optimum_on_a_task(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads the words in other tokens."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", str(text_file), "--preset", "llama", "--tokens", "1k", "--out", "run", *SMALL]
    assert answer(capsys, *words, "--data.vocab_size", "300")[0] == 0
    source = RECALL.replace("200k", "1k")
    code, out, error = answer(capsys, "eval", "run", "--data", source, "--split", "test", "--json")
    assert code == 0, error
    assert "optimum" not in json.loads(out)


def test_a_task_is_prepared_as_any_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = answer(capsys, "data", "prepare", "--data", RECALL.replace("200k", "2k"), "--json")
    assert code == 0
    packed = json.loads(out)
    assert Path(packed["folder"]).parent == Path("runs/data")
    again = json.loads(answer(capsys, "data", "prepare", "--data", packed["folder"], "--json")[1])
    assert again == packed


WRONG = {
    "option": (
        ["--data", "synthetic:markov,state=4"],
        "synthetic:markov has no option 'state'; its options: states=512",
    ),
    "task": (["--data", "synthetic:parity"], "unknown synthetic task 'parity'"),
    "tokeniser": (["--data", RECALL, "--data.tokenizer", "gpt2"], "its own tokenizer; leave data.tokenizer out"),
    "vocabulary": (["--data", RECALL, "--data.vocab_size", "300"], "its own vocab_size; leave data.vocab_size out"),
    "division": (["--data", RECALL, "--data.seed", "3"], "its own seed; leave data.seed out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_task_is_one_line_and_nothing_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = WRONG[case]
    code, out, error = answer(capsys, "train", *words, "--out", "run")
    assert code == 2 and out == "" and message in error
    assert len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_wrong_task_is_an_error_of_eval_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", RECALL, "--preset", "llama", "--tokens", "200", "--out", "run", *SMALL]
    assert answer(capsys, *words)[0] == 0
    code, out, error = answer(capsys, "eval", "run", "--data", "synthetic:recall,pears=3")
    assert code == 2 and out == "" and "synthetic:recall has no option 'pears'" in error


def test_a_text_that_is_not_of_the_source_is_said_to_be_none() -> None:
    source = open_synthetic(RECALL)
    window = np.array([END, source.first_key, FIRST_WORD, FIRST_WORD])
    with pytest.raises(KalmaGroveError, match="cannot come from this synthetic source"):
        optimum_nats(RECALL, [(window, 3)])
