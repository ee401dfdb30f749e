"""The training of an adaptor from Python: what is for whole models only is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapted_models import grove

from kalmagrove.adaptors import model_fingerprint
from kalmagrove.adaptors import run as adaptor_run
from kalmagrove.adaptors.options import AdaptConfig, AdaptorOptions, BaseConfig
from kalmagrove.adaptors.run import AdaptorRun, AdaptorSession
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
