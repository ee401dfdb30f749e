"""Energy is summed over the processes of a run, says how it is known, and is counted without noise or other files."""

import json
import logging
import sys
import time
from pathlib import Path

import pytest

from kalmagrove.data.packing import PackedText
from kalmagrove.errors import UsageError
from kalmagrove.training.checkpoint import latest_checkpoint
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.energy import EnergyMeter, Part, _sum, check_energy
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.trainer import train


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    check_energy(False)
    with pytest.raises(UsageError, match=r"energy needs codecarbon; .*pip install 'kalmagrove\[energy\]'"):
        check_energy(True)


def test_a_sum_is_measured_only_where_all_of_it_is() -> None:
    measured = Part(kwh=1.0, source="measured", method="counters")
    estimated = Part(kwh=0.5, source="estimated", method="a nominal power")
    assert _sum(measured, measured) == Part(kwh=2.0, source="measured", method="counters")
    assert _sum(measured, estimated) == Part(kwh=1.5, source="estimated", method="counters; a nominal power")
    assert _sum(None, estimated) == estimated
    assert _sum(measured, None) == measured


def work(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))


def test_a_meter_counts_on_from_an_earlier_process_and_ends_where_it_is_closed(tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    earlier: dict[str, Part] = {"cpu": Part(kwh=2.0, source="measured", method="counters")}
    meter = EnergyMeter(tmp_path, earlier=earlier)
    work(0.5)
    first = meter.used()
    work(0.5)
    second = meter.used()
    meter.close()
    meter.close()
    assert 2.0 < first["cpu"]["kwh"] < second["cpu"]["kwh"] < 2.1
    assert 0.0 < first["ram"]["kwh"] < second["ram"]["kwh"]
    work(0.2)
    result = meter.result()
    assert result["energy_kwh"] == sum(part["kwh"] for part in result["energy"]["parts"].values())
    assert result["energy_kwh"] == sum(part["kwh"] for part in second.values())
    assert result["energy"]["source"] == "estimated"  # At least the memory is.
    assert json.loads(json.dumps(result)) == result


def test_nothing_is_printed_sent_or_written_whatever_the_users_settings_of_codecarbon_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon")
    here, run = tmp_path / "here", tmp_path / "run"
    here.mkdir()
    run.mkdir()
    monkeypatch.chdir(here)
    settings = "[codecarbon]\nsave_to_file = true\nemissions_endpoint = http://127.0.0.1:9/\nlog_level = debug\n"
    (here / ".codecarbon.config").write_text(settings)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    logging.getLogger("codecarbon").setLevel(logging.DEBUG)
    meter = EnergyMeter(run)
    work(0.3)
    meter.used()
    meter.close()
    assert [path.name for path in here.iterdir()] == [".codecarbon.config"]
    assert list(run.iterdir()) == []
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def config(energy: bool) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(vocab_size=300),
        model=ModelConfig(preset="llama", hidden_size=32, num_hidden_layers=1, head_dim=8),
        optim=OptimConfig(name="adamw"),
        loop=LoopConfig(tokens=6 * 96, batch_size=4, context_length=24, precision="fp32", device="cpu", save_every=2),
        energy=energy,
    )


def test_a_run_without_the_package_ends_before_its_folder_begins(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(UsageError, match="energy needs codecarbon"):
        TrainingSession(config(True), packed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_result_has_the_energy_of_all_processes_of_the_run(packed: PackedText, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    session = TrainingSession(config(True), packed, tmp_path)
    while session.run.step < 4:
        session.advance()
    session.close()
    checkpoint, _ = latest_checkpoint(session.folder.checkpoints_path)
    assert checkpoint is not None and checkpoint.progress["step"] == 4
    spent = sum(part["kwh"] for part in checkpoint.progress["energy"].values())
    result = train(config(True), packed, tmp_path, say=lambda line: None)
    assert result["energy_kwh"] > spent > 0
    assert result["energy"]["method"].startswith("codecarbon ")
    assert {"cpu", "ram"} <= result["energy"]["parts"].keys()


def test_energy_is_off_unless_asked_for(packed: PackedText, tmp_path: Path) -> None:
    assert "energy_kwh" not in train(config(False), packed, tmp_path, say=lambda line: None)
