"""The training of an adaptor from Python: what is for whole models only is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapted_models import grove

from kalmagrove.adaptation import run as adaptor_run
from kalmagrove.adaptation.config import AdaptConfig, BaseConfig
from kalmagrove.adaptation.run import AdaptorRun, AdaptorSession
from kalmagrove.adaptors import model_fingerprint
from kalmagrove.adaptors.options import AdaptorOptions
from kalmagrove.data.packing import PackedText
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.training.config import LoopConfig


@pytest.fixture
def base(tmp_path: Path) -> BaseConfig:
    model = grove(vocab_size=300)
    model.save_pretrained(tmp_path / "base")
    return BaseConfig(str(tmp_path / "base"), model_fingerprint(model))


def config_of(base: BaseConfig, **loop: object) -> AdaptConfig:
    options = {"tokens": "2k", "batch_size": 2, "context_length": 16, "device": "cpu", "precision": "fp32"} | loop
    adaptor = AdaptorOptions("legal", rank=2, bases="weights")
    return AdaptConfig(model=base, adaptor=adaptor, loop=LoopConfig(**options))  # type: ignore[arg-type]


def test_a_step_changes_the_cores_and_nothing_else(base: BaseConfig, packed: PackedText) -> None:
    run = AdaptorRun(config_of(base), packed)
    cores = {name: core.detach().clone() for name, core in run.adaptors.cores("legal").items()}
    run.train_step()
    run.train_step()
    assert all(not core.equal(cores[name]) for name, core in run.adaptors.cores("legal").items())
    assert model_fingerprint(run.adaptors.model) == base.fingerprint
    state = run.state()
    assert set(state["model"]) == {f"{name}.core" for name in cores}


def test_a_resumed_run_takes_its_bases_from_the_checkpoint(
    base: BaseConfig, packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(base)
    config = replace(config, adaptor=replace(config.adaptor, bases="gradient", core="diagonal", gradient_tokens=64))
    session = AdaptorSession(config, packed, tmp_path / "run")
    session.advance()
    session.save()
    session.close()
    state = session.run.state()["model"]
    monkeypatch.setattr(adaptor_run, "text_bases", lambda *_: pytest.fail("looked for the bases again"))
    resumed = AdaptorSession(config, packed, tmp_path / "run")
    resumed.close()
    found = resumed.run.state()["model"]
    assert resumed.resumed_from == 1 and state.keys() == found.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("stop", [5, 10, 12])
def test_an_adaptor_grows_in_rounds_and_a_resumed_one_is_the_unbroken_one(
    stop: int, base: BaseConfig, packed: PackedText, tmp_path: Path
) -> None:
    config = config_of(base, tokens=20 * 32)
    options = replace(config.adaptor, bases="gradient", core="diagonal", gradient_tokens=64, rounds=4)
    config = replace(config, adaptor=options)

    def trained(folder: Path, last: int = 20) -> AdaptorSession:
        session = AdaptorSession(config, packed, folder)
        losses.extend(session.advance().loss for _ in range(session.run.step, last))
        if last < 20:
            session.save()
        session.close()
        return session

    losses: list[float] = []
    unbroken = trained(tmp_path / "whole")
    expected, losses = losses, []
    first = trained(tmp_path / "cut", stop)
    resumed = trained(tmp_path / "cut")
    assert losses == expected
    found, wanted = (session.run.state()["model"] for session in (resumed, unbroken))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    sizes = [sum(len(core) for core in s.run.adaptors.cores("legal").values()) for s in (first, unbroken)]
    assert sizes[1] >= 4 * 2 * len(unbroken.run.adaptors.layers) > 0 and sizes[0] < sizes[1]


def test_new_directions_change_nothing_until_they_are_trained(base: BaseConfig, packed: PackedText) -> None:
    config = config_of(base)
    options = replace(config.adaptor, bases="gradient", core="diagonal", gradient_tokens=64)
    run = AdaptorRun(replace(config, adaptor=options), packed)
    run.train_step()
    tokens = run.batch(5)
    before = run.model(tokens).logits
    run.adaptors.extend_adaptor("legal", run._gradient_bases(1))
    assert torch.allclose(run.model(tokens).logits, before, atol=1e-6)
    dense = AdaptorRun(replace(config, adaptor=replace(options, core="dense")), packed)
    with pytest.raises(UsageError, match="needs diagonal cores between bases of its own"):
        dense.adaptors.extend_adaptor("legal", dense._gradient_bases(1))


@pytest.mark.parametrize(
    "option", [{"compile": True}, {"grow_rank": {1: 4}}, {"gradient_metrics": True}, {"activation_checkpointing": True}]
)
def test_what_is_for_whole_models_is_refused(option: dict[str, object], base: BaseConfig, packed: PackedText) -> None:
    name = next(iter(option))
    with pytest.raises(UsageError, match=rf"loop\.{name} is for the training of a whole model"):
        AdaptorRun(config_of(base, **option), packed)


def test_a_base_that_changed_or_does_not_know_the_tokens_is_refused(
    base: BaseConfig, packed: PackedText, tmp_path: Path
) -> None:
    with pytest.raises(KalmaGroveError, match="has changed since the adaptor's run began"):
        AdaptorRun(config_of(BaseConfig(base.source, "0" * 64)), packed)
    small = grove()
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match="the text has 300 different tokens and the base knows 61"):
        AdaptorRun(config_of(BaseConfig(str(tmp_path / "small"), model_fingerprint(small))), packed)
    with pytest.raises(UsageError, match="longer than the base's context, 40 tokens"):
        AdaptorRun(config_of(base, context_length=64), packed)
