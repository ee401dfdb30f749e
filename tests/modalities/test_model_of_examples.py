"""Numbers and patches in the decoder: rotary positions on two axes, causality, the cache, and training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from example_data import TinySource

from kalmagrove.data.example_store import SCHEMA, PackedExamples, prepare_examples
from kalmagrove.evaluation.examples import score_examples
from kalmagrove.modalities.sequences import Sequences
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.nn.layers import RotaryEmbedding
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, OptimizerName, TrainConfig
from kalmagrove.training.trainer import train

FAMILIES = ("llama-tiny", "kalmagrove-tiny")


@pytest.fixture
def data(tmp_path: Path) -> PackedExamples:
    return prepare_examples(TinySource(), tmp_path / "packed")


def small_model(data: PackedExamples, family: str) -> KalmaGroveForCausalLM:
    options = {**data.model_options(), "max_position_embeddings": 16, "hidden_size": 32, "num_hidden_layers": 2}
    return build_model(model_config(family, options), seed=0).eval()


def logits(model: KalmaGroveForCausalLM, rows: Sequences) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(rows.tokens, features=rows.features, axes=rows.axes).logits
    return found


def test_the_same_on_both_axes_turns_as_one_line() -> None:
    rotary, x = RotaryEmbedding(16), torch.randn(1, 2, 5, 16)
    line = torch.tensor([0, 1, 2, 5, 9])
    assert torch.equal(rotary(x, line), rotary(x, line[None, :, None].expand(1, 5, 2)))
    other = torch.stack((line, line.flip(0)), dim=-1)[None]
    assert not torch.allclose(rotary(x, line), rotary(x, other))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_a_later_element(data: PackedExamples, family: str) -> None:
    model, rows = small_model(data, family), data.rows("train", range(4))
    before = logits(model, rows)
    for place in range(1, rows.tokens.shape[1] - 1):
        changed = {name: values.clone() for name, values in rows.features.items()}
        changed["patch"][:, place:, :4] += 1
        changed["number"][:, place:, 1:3] += 0.3
        after = logits(model, replace(rows, features=changed))
        assert torch.equal(after[:, :place], before[:, :place])
        # Every row has elements after its first token.
        assert place > 1 or not torch.equal(after[:, 1:], before[:, 1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_elements_and_axes_reach_the_logits(data: PackedExamples, family: str) -> None:
    model, rows = small_model(data, family), data.rows("train", range(4))
    before = logits(model, rows)
    darker = {**rows.features, "patch": rows.features["patch"] * torch.tensor([0.5] * 4 + [1] * 2)}
    assert not torch.allclose(logits(model, replace(rows, features=darker)), before)
    assert rows.axes is not None
    assert not torch.allclose(logits(model, replace(rows, axes=rows.axes.flip(-1))), before, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [(1,) * 8, (5, 3), (3, 1, 4)])
def test_cached_decoding_equals_the_whole(data: PackedExamples, family: str, pieces: tuple[int, ...]) -> None:
    model, rows = small_model(data, family), data.rows("train", range(3))
    whole, cache, at, found = logits(model, rows), model.new_cache(), 0, []
    for size in pieces:
        piece = rows[:, at : at + size]
        with torch.no_grad():
            out = model(piece.tokens, features=piece.features, axes=piece.axes, cache=cache)
        found.append(out.logits)
        at += size
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=2e-5, rtol=1e-4)


def test_words_after_elements_go_on_along_the_diagonal(data: PackedExamples) -> None:
    model = small_model(data, "kalmagrove-tiny")
    flat = prepare_examples(replace(TinySource(), shuffles=False), data.folder.parent / "flat")
    rows = flat.rows("train", range(3))
    begin, end = rows[:, :6], rows[:, 6:]
    whole, cache = logits(model, rows), model.new_cache()
    with torch.no_grad():
        model(begin.tokens, features=begin.features, axes=begin.axes, cache=cache)
        after = model(end.tokens, features=end.features, cache=cache).logits
    torch.testing.assert_close(after, whole[:, 6:], atol=2e-5, rtol=1e-4)


def test_nats_by_kind_are_those_of_the_heads(data: PackedExamples) -> None:
    model, rows = small_model(data, "llama-tiny"), data.rows("train", range(5))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    with torch.no_grad():
        nats = model.nats_by_kind(inputs, targets)
        total = model.token_loss_sum(inputs, targets)
        chances = model(inputs.tokens, features=inputs.features, axes=inputs.axes).logits.log_softmax(-1)
    by_token = chances.gather(-1, targets.tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(nats["token"], -(by_token * targets.weights).sum(), atol=1e-3, rtol=1e-4)
    assert nats["patch"].shape == (20,) and nats["number"].shape == (5,)
    torch.testing.assert_close(total, nats["token"] + nats["patch"].sum() + nats["number"].sum())


def train_config(optimizer: OptimizerName, preset: str, tokens: int) -> TrainConfig:
    loop = LoopConfig(tokens=tokens, batch_size=10, context_length=8, save_every=20, device="cpu", precision="fp32")
    model = ModelConfig(preset=preset, hidden_size=32, num_hidden_layers=2)
    return TrainConfig(model=model, optim=OptimConfig(name=optimizer), loop=loop)


@pytest.mark.parametrize(("optimizer", "preset"), [("kalma", "kalmagrove-tiny"), ("adamw", "llama-tiny")])
def test_a_run_learns_what_one_part_says_of_another(
    data: PackedExamples, tmp_path: Path, optimizer: OptimizerName, preset: str
) -> None:
    config = train_config(optimizer, preset, 80 * 100)
    result = train(config, data, tmp_path / "run", say=lambda line: None)
    kinds = result["test"]["kinds"]
    # Without the other parts, a number costs log 4 and a patch of four pixels at least 4 log 3.
    assert kinds["number"]["nats"] / kinds["number"]["elements"] < 1.2
    assert result["test"]["loss"] < small_loss(data, config)
    model_folder = tmp_path / "run" / "model"
    assert json.loads((model_folder / SCHEMA).read_text()) == data.schema()
    loaded = KalmaGroveForCausalLM.from_pretrained(model_folder)
    scores = score_examples(loaded, data, "test", device=torch.device("cpu"), precision="fp32")
    assert scores.loss == pytest.approx(result["test"]["loss"], abs=1e-5)


def small_loss(data: PackedExamples, config: TrainConfig) -> float:
    """Before training."""
    options = {**data.model_options(), "max_position_embeddings": 8, "hidden_size": 32, "num_hidden_layers": 2}
    fresh = build_model(model_config(config.model.preset, options), seed=0)
    return score_examples(fresh, data, "test", device=torch.device("cpu"), precision="fp32").loss / 1.5


def test_a_resumed_run_gives_the_losses_of_an_unbroken_one(data: PackedExamples, tmp_path: Path) -> None:
    from kalmagrove.training.session import TrainingSession

    config = train_config("kalma", "kalmagrove-tiny", 80 * 30)
    whole = TrainingSession(config, data, tmp_path / "whole")
    losses = [whole.advance().loss for _ in range(30)]
    whole.close()
    broken = TrainingSession(config, data, tmp_path / "broken")
    for _ in range(20):
        broken.advance()
    broken.close()
    resumed = TrainingSession(config, data, tmp_path / "broken")
    assert resumed.run.step == 20
    assert [resumed.advance().loss for _ in range(10)] == losses[20:]
    resumed.close()


def test_micro_batches_give_the_same_gradient(data: PackedExamples, tmp_path: Path) -> None:
    from kalmagrove.training.run import TrainingRun

    config = train_config("adamw", "llama-tiny", 80 * 3)
    whole = TrainingRun(config, data)
    cut = TrainingRun(replace(config, loop=replace(config.loop, micro_batch_size=2)), data)
    for _ in range(3):
        assert whole.train_step().loss == pytest.approx(cut.train_step().loss, rel=1e-5)
