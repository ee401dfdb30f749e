"""Runs in folders: resumed equals unbroken, accumulation equals the big batch, nothing is lost."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmagrove.data.packing import PackedText, prepare
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.models.convert import load_model
from kalmagrove.training.checkpoint import load_checkpoint
from kalmagrove.training.checkpoint_model import train_config_of
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig, plain_options
from kalmagrove.training.run import TrainingDiverged, TrainingRun
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.trainer import train

STEPS = 7


def config(preset: str = "kalmagrove", optim: str = "kalma", **loop: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "tokens": str(STEPS * 4 * 24),
        "batch_size": 4,
        "context_length": 24,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "eval_every": 3,
        "save_every": 2,
    }
    return TrainConfig(
        data=DataConfig(vocab_size=300),
        model=ModelConfig(preset=preset, hidden_size=32, num_hidden_layers=2, head_dim=8),
        optim=OptimConfig(name=optim, refresh_every=3),  # type: ignore[arg-type]
        loop=LoopConfig(**(options | loop)),
    )


def finish(session: TrainingSession, steps: int | None = None) -> list[float]:
    losses = []
    while not session.run.done and (steps is None or session.run.step < steps):
        losses.append(session.advance().loss)
    return losses


def run_to_the_end(folder: Path, data: PackedText, conf: TrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    session = TrainingSession(conf, data, folder)
    losses = finish(session)
    session.close()
    return losses, session.run.model.state_dict()


@pytest.mark.parametrize("optim", ["kalma", "adamw", "muon", "soap"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(
    optim: str, stop: int, packed: PackedText, tmp_path: Path
) -> None:
    unbroken, weights = run_to_the_end(tmp_path / "unbroken", packed, config(optim=optim))
    first = TrainingSession(config(optim=optim), packed, tmp_path / "broken")
    losses = finish(first, stop)
    first.save()
    first.close()
    second = TrainingSession(config(optim=optim), packed, tmp_path / "broken")
    assert second.resumed_from == stop
    losses += finish(second)
    second.close()
    assert losses == unbroken
    assert all(torch.equal(value, weights[name]) for name, value in second.run.model.state_dict().items())
    steps = [record["step"] for record in second.folder.read_metrics() if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_a_crash_between_checkpoints_goes_back_to_the_last_one_and_repeats_it(
    packed: PackedText, tmp_path: Path
) -> None:
    unbroken, _ = run_to_the_end(tmp_path / "unbroken", packed, config())
    crashed = TrainingSession(config(), packed, tmp_path / "broken")
    finish(crashed, 5)
    crashed.close()
    resumed = TrainingSession(config(), packed, tmp_path / "broken")
    assert resumed.resumed_from == 4
    assert finish(resumed) == unbroken[4:]
    assert [record["loss"] for record in resumed.folder.read_metrics() if "loss" in record] == unbroken
    resumed.close()


def test_a_run_without_a_whole_checkpoint_stops_before_it_writes(packed: PackedText, tmp_path: Path) -> None:
    session = TrainingSession(config(), packed, tmp_path)
    finish(session, 4)
    session.close()
    metrics = session.folder.metrics_path.read_bytes()
    for checkpoint in session.folder.checkpoints_path.iterdir():
        (checkpoint / "model.safetensors").write_bytes(b"")
    told: list[str] = []
    with pytest.raises(KalmaGroveError, match=r"no checkpoint in .* is whole; put one back from a copy, or delete"):
        TrainingSession(config(), packed, tmp_path, warn=told.append)
    assert len(told) == 2 and session.folder.metrics_path.read_bytes() == metrics
    shutil.rmtree(session.folder.checkpoints_path)
    TrainingSession(config(), packed, tmp_path).close()


SITUATIONS: dict[str, tuple[TrainConfig, int]] = {
    "bf16": (config(precision="bf16"), 4),
    "accumulation": (config(micro_batch_size=1), 4),
    "after an evaluation": (config(), 3),
    "before the inputs are looked at": (config(), 5),
    "a later epoch": (config(tokens=12 * 8 * 200, batch_size=8, context_length=200), 10),
    "activations made again": (config(activation_checkpointing=True), 4),
    "saved on the training thread": (config(save_in_background=False), 4),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_resumed_run_is_the_unbroken_one_in_every_situation(name: str, packed: PackedText, tmp_path: Path) -> None:
    conf, stop = SITUATIONS[name]
    unbroken, weights = run_to_the_end(tmp_path / "unbroken", packed, conf)
    first = TrainingSession(conf, packed, tmp_path / "broken")
    losses = finish(first, stop)
    first.save()
    first.close()
    assert name != "a later epoch" or stop * 8 * 200 > packed.splits["train"].tokens
    # Nothing hangs on torch's own random numbers.
    torch.manual_seed(99)
    rest, resumed = run_to_the_end(tmp_path / "broken", packed, conf)
    assert losses + rest == unbroken
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


def test_a_run_goes_on_with_another_micro_batch(packed: PackedText, tmp_path: Path) -> None:
    unbroken, _ = run_to_the_end(tmp_path / "unbroken", packed, config())
    first = TrainingSession(config(), packed, tmp_path / "broken")
    losses = finish(first, 4)
    first.close()
    rest, _ = run_to_the_end(tmp_path / "broken", packed, config(micro_batch_size=1, activation_checkpointing=True))
    assert losses + rest == pytest.approx(unbroken, abs=1e-3)


def test_saving_in_the_background_holds_what_the_step_left(packed: PackedText, tmp_path: Path) -> None:
    session = TrainingSession(config(save_every=100), packed, tmp_path)
    finish(session, 3)
    expected = {name: value.clone() for name, value in session.run.model.state_dict().items()}
    path = session.save()
    finish(session, 6)
    session.wait_for_saving()
    saved = load_checkpoint(path)
    assert saved.step == 3 and saved.progress["step"] == 3
    assert all(torch.equal(saved.model[name], value) for name, value in expected.items())
    assert not torch.equal(expected["model.norm.weight"], session.run.model.state_dict()["model.norm.weight"])
    session.close()


def test_an_error_of_the_disk_in_the_background_stops_the_run(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = TrainingSession(config(save_every=2), packed, tmp_path)
    finish(session, 2)
    session.wait_for_saving()
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    finish(session, 5)
    with pytest.raises(OSError, match="No space left on device"):
        session.advance()
    monkeypatch.undo()
    session.close()
    assert [path.name for path in session.folder.checkpoints_path.iterdir()] == ["step-00000002"]


def test_time_decides_when_to_save(packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kalmagrove.training.session.time.monotonic", lambda: now[0])
    session = TrainingSession(config(save_every="10m", keep_last=9), packed, tmp_path)
    for seconds in (599, 601, 900, 1200, 1201, 1202, 1203):
        now[0] = float(seconds)
        session.advance()
    session.close()
    names = sorted(path.name for path in session.folder.checkpoints_path.iterdir())
    assert names == ["step-00000002", "step-00000005", "step-00000007"]


def test_the_best_checkpoints_stay_beside_the_newest(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: 3.5, 6: 4.5, 7: 4.2}
    monkeypatch.setattr(TrainingRun, "validation_loss", lambda self: losses[self.step])
    conf = config(eval_every=1, save_every=100, keep_last=1, keep_best=2)
    session = TrainingSession(conf, packed, tmp_path)
    finish(session, 4)
    session.close()
    # Only what was better than all before it was saved; a resumed run remembers which these are.
    assert kept_steps(session) == [2, 3]
    session = TrainingSession(conf, packed, tmp_path)
    finish(session)
    session.finish({})
    session.close()
    assert kept_steps(session) == [2, 5, 7]
    result = session.folder.read_result()
    assert result is not None
    assert result["best_checkpoints"] == [{"step": 2, "valid_loss": 3.0}, {"step": 5, "valid_loss": 3.5}]


def kept_steps(session: TrainingSession) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in session.folder.checkpoints_path.iterdir())


@pytest.mark.parametrize("save_every", ["0", 0, "0s", "soon", -1])
def test_a_wrong_time_between_checkpoints_is_an_error(save_every: str | int) -> None:
    with pytest.raises(UsageError):
        config(save_every=save_every)


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(packed: PackedText, tmp_path: Path) -> None:
    session = TrainingSession(config(), packed, tmp_path)
    finish(session, 4)
    session.close()
    newest = sorted(session.folder.checkpoints_path.iterdir())[-1]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    told: list[str] = []
    resumed = TrainingSession(config(), packed, tmp_path, warn=told.append)
    resumed.close()
    assert resumed.resumed_from == 2
    assert len(told) == 1 and newest.name in told[0] and "model.safetensors" in told[0]


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_equals_the_big_batch(micro: int, packed: PackedText) -> None:
    whole = TrainingRun(config(), packed)
    parts = TrainingRun(config(micro_batch_size=micro), packed)
    for _ in range(2):
        assert parts.train_step().loss == pytest.approx(whole.train_step().loss, abs=1e-4)


def test_accumulated_gradients_equal_those_of_the_big_batch(packed: PackedText) -> None:
    whole, parts = TrainingRun(config(), packed), TrainingRun(config(), packed)
    tokens = whole.batch(0)
    assert whole._accumulate(tokens, 4) == pytest.approx(parts._accumulate(tokens, 1), abs=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_two_models_of_one_seed_read_the_same_batches(packed: PackedText) -> None:
    ours, theirs = TrainingRun(config("kalmagrove"), packed), TrainingRun(config("gpt2", "adamw"), packed)
    assert all(torch.equal(ours.batch(step), theirs.batch(step)) for step in range(30))


@pytest.mark.parametrize("preset", ["gpt2", "llama", "llama-plus", "slim", "kalmagrove"])
def test_training_lowers_the_loss(preset: str, packed: PackedText) -> None:
    run = TrainingRun(config(preset, "adamw" if preset in ("gpt2", "llama") else "kalma", tokens="9600"), packed)
    losses = [run.train_step().loss for _ in range(run.total_steps)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


def test_a_loss_that_is_not_a_number_stops_with_step_checkpoint_and_advice(packed: PackedText, tmp_path: Path) -> None:
    session = TrainingSession(config(), packed, tmp_path)
    finish(session, 3)
    with torch.no_grad():
        session.run.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at step 4; lower optim\.lr .* checkpoint is step 2"):
        session.advance()
    session.close()


def test_an_infinite_gradient_stops_before_the_step(packed: PackedText) -> None:
    run = TrainingRun(config(optim="adamw"), packed)
    before = [p.detach().clone() for p in run.model.parameters()]
    weight = run.model.model.layers[0].self_attn.q_proj.core
    weight.register_hook(lambda gradient: gradient.fill_(float("inf")))
    with pytest.raises(TrainingDiverged, match="the norm of the gradient is inf at step 1"):
        run.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_an_evaluation_that_a_crash_interrupted_is_done_on_resume(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation_loss = TrainingRun.validation_loss
    session = TrainingSession(config(save_every=3), packed, tmp_path)
    finish(session, 2)
    monkeypatch.setattr(TrainingRun, "validation_loss", lambda self: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        session.advance()
    session.close()
    monkeypatch.setattr(TrainingRun, "validation_loss", validation_loss)
    resumed = TrainingSession(config(save_every=3), packed, tmp_path)
    resumed.close()
    assert resumed.resumed_from == 3
    records = resumed.folder.read_metrics()
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in records if "valid_loss" in r] == [3]


def test_a_complete_folder_without_checkpoints_is_only_read(packed: PackedText, tmp_path: Path) -> None:
    result = train(config(), packed, tmp_path, say=lambda line: None)
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config(), packed, tmp_path, say=lambda line: None) == result
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_two_ways_to_write_a_number_of_tokens_are_the_same_run(packed: PackedText, tmp_path: Path) -> None:
    TrainingSession(config(tokens="960"), packed, tmp_path).close()
    TrainingSession(config(tokens=960, log_every=2), packed, tmp_path).close()


def test_train_writes_a_folder_that_transformers_opens(packed: PackedText, tmp_path: Path) -> None:
    said: list[str] = []
    result = train(config("llama", "adamw"), packed, tmp_path / "run", say=said.append)
    assert result["tokens"] == STEPS * 96 and result["steps"] == STEPS
    assert result["test"]["perplexity"] == pytest.approx(math.exp(result["test"]["loss"]))
    model = load_model(tmp_path / "run")
    assert type(model).__name__ == "LlamaForCausalLM"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "result.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert any("llama" in line for line in said)
    again = train(config("llama", "adamw"), packed, tmp_path / "run", say=said.append)
    assert again == result
    assert "complete already" in said[-1]


def test_the_exported_model_gives_the_logits_that_were_trained(packed: PackedText, tmp_path: Path) -> None:
    session = TrainingSession(config(), packed, tmp_path / "run")
    finish(session)
    session.finish({})
    session.close()
    ids = session.run.batch(0)[:, :20]
    loaded = load_model(tmp_path / "run")
    assert torch.equal(loaded(ids).logits, session.run.model.eval()(ids).logits)
    tokenizer = json.loads((tmp_path / "run" / "model" / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|endoftext|>"


def test_a_folder_of_another_configuration_is_refused_and_left_alone(packed: PackedText, tmp_path: Path) -> None:
    TrainingSession(config(), packed, tmp_path).close()
    before = (tmp_path / "config.yaml").read_bytes()
    changed = replace(config(), optim=OptimConfig(name="kalma", lr=0.5))
    with pytest.raises(KalmaGroveError, match=r"optim\.lr"):
        TrainingSession(changed, packed, tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_other_data_is_refused(packed: PackedText, text_file: Path, tmp_path: Path) -> None:
    session = TrainingSession(config(), packed, tmp_path / "run")
    finish(session, 2)
    session.close()
    other = prepare(str(text_file), tmp_path / "other", vocab_size=300, seed=5)
    with pytest.raises(KalmaGroveError, match="was trained on other data"):
        TrainingSession(config(), other, tmp_path / "run")


def test_other_data_is_refused_by_a_finished_run_too(packed: PackedText, text_file: Path, tmp_path: Path) -> None:
    train(config(), packed, tmp_path / "run", say=print)
    other = prepare(str(text_file), tmp_path / "other", vocab_size=300, seed=5)
    with pytest.raises(UsageError, match="was trained on other data; give the same data, choose another folder"):
        TrainingSession(config(), other, tmp_path / "run")


def test_a_run_goes_on_where_its_text_lies_elsewhere(packed: PackedText, tmp_path: Path) -> None:
    session = TrainingSession(config(), packed, tmp_path / "run")
    first = finish(session, 2)
    session.close()
    moved = replace(config(), data=replace(config().data, source="elsewhere/book.txt"))
    session = TrainingSession(moved, packed, tmp_path / "run")
    rest = finish(session)
    session.close()
    assert [*first, *rest] == run_to_the_end(tmp_path / "unbroken", packed, config())[0]
    assert RunFolder(tmp_path / "run").read_config()["data"]["source"] == "elsewhere/book.txt"


def test_too_little_text_says_how_much_is_needed(packed: PackedText) -> None:
    with pytest.raises(KalmaGroveError, match=r"\d+ tokens"):
        TrainingRun(config(context_length=60000, tokens="1m"), packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 3}, "micro_batch_size 3 does not divide loop.batch_size 4"),
        ({"tokens": "95"}, "less than one batch of 96 tokens"),
        ({"tokens": "many"}, "'many' is not a number of tokens"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"eval_every": -5}, "eval_every must not be negative"),
    ],
)
def test_wrong_loop_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**options)


def test_an_unknown_device_is_a_usage_error(packed: PackedText) -> None:
    with pytest.raises(UsageError, match="loop: unknown device 'gpu'"):
        TrainingRun(config(device="gpu"), packed)


GROWTH = {2: 8, 4: 12}


def growing(optim: str) -> TrainConfig:
    conf = config(optim=optim, grow_rank=GROWTH)
    options: dict[str, Any] = {"grove_parts": "all", "shared_sides": "both", "core": "dense", "rank": 4}
    return replace(conf, model=replace(conf.model, **options))


@pytest.mark.parametrize("optim", ["kalma", "adamw", "muon", "soap"])
def test_a_rank_grows_in_training_and_a_resumed_run_is_still_the_unbroken_one(
    optim: str, packed: PackedText, tmp_path: Path
) -> None:
    conf = growing(optim)
    losses, weights = run_to_the_end(tmp_path / "whole", packed, conf)
    for stop in (2, 3, 5):
        session = TrainingSession(conf, packed, tmp_path / f"cut-{stop}")
        first = finish(session, stop)
        session.save()
        session.close()
        rest, resumed = run_to_the_end(tmp_path / f"cut-{stop}", packed, conf)
        assert first + rest == losses
        assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    assert {tensor.shape for name, tensor in weights.items() if name.endswith(".core")} == {(12, 12)}


def test_the_configuration_of_a_growing_run_is_read_as_it_was(packed: PackedText, tmp_path: Path) -> None:
    conf = growing("adamw")
    TrainingSession(conf, packed, tmp_path).close()
    read = train_config_of(RunFolder(tmp_path))
    assert read.loop.grow_rank == GROWTH and plain_options(read) == plain_options(conf)


def test_growing_does_not_disturb_the_state_of_other_parameters(packed: PackedText) -> None:
    run = TrainingRun(growing("adamw"), packed)
    for _ in range(2):
        run.train_step()
    name = "model.embed_tokens.weight"
    before = run.optimizers[0].state[dict(run.model.named_parameters())[name]]["exp_avg"].clone()
    run._grow(2, 8)
    after = run.optimizers[0].state[dict(run.model.named_parameters())[name]]["exp_avg"]
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({2: 3}, "loop.grow_rank, step 2: the new rank must be above 4, got 3"),
        ({2: 64}, "loop.grow_rank, step 2: rank 64 must be between 1 and"),
        ({99: 8}, "loop.grow_rank names step 99, but the run has steps 1 to 6"),
    ],
)
def test_a_growth_that_cannot_be_is_an_error_before_the_first_step(
    growth: dict[int, int], message: str, packed: PackedText
) -> None:
    conf = growing("adamw")
    with pytest.raises(UsageError, match=re.escape(message)):
        TrainingRun(replace(conf, loop=replace(conf.loop, grow_rank=growth)), packed)


def test_a_damaged_checkpoint_is_set_aside_and_does_not_count(packed: PackedText, tmp_path: Path) -> None:
    conf = config(save_every=2, keep_last=2)
    session = TrainingSession(conf, packed, tmp_path)
    finish(session, 6)
    session.close()
    (session.folder.checkpoints_path / "step-00000006" / "state.json").write_text("{")
    resumed = TrainingSession(replace(conf, loop=replace(conf.loop, save_every=5)), packed, tmp_path)
    assert resumed.resumed_from == 4
    finish(resumed, 5)
    resumed.close()
    names = sorted(path.name for path in resumed.folder.checkpoints_path.iterdir())
    assert names == ["step-00000004", "step-00000005", "step-00000006.damaged"]


def test_best_checkpoints_that_are_gone_do_not_count(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {1: 2.0, 2: 3.0, 3: 2.5, 4: 4.0, 5: 2.2, 6: 3.0, 7: 2.4}
    monkeypatch.setattr(TrainingRun, "validation_loss", lambda self: losses[self.step])
    conf = config(eval_every=1, save_every=2, keep_last=1)
    session = TrainingSession(conf, packed, tmp_path)
    finish(session, 4)
    session.close()
    session = TrainingSession(replace(conf, loop=replace(conf.loop, keep_best=1)), packed, tmp_path)
    finish(session)
    session.finish({})
    session.close()
    result = session.folder.read_result()
    assert result is not None and result["best_checkpoints"] == [{"step": 5, "valid_loss": 2.2}]
    assert kept_steps(session) == [5, 7]


def test_a_run_of_before_an_option_existed_goes_on(packed: PackedText, tmp_path: Path) -> None:
    session = TrainingSession(config(), packed, tmp_path / "run")
    session.advance()
    session.save()
    session.close()
    path = tmp_path / "run" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "patch_size" not in line and "core_lr" not in line))
    assert len(lines) == len(path.read_text().splitlines()) + 2
    again = TrainingSession(config(), packed, tmp_path / "run")
    assert again.resumed_from == 1
    again.close()
