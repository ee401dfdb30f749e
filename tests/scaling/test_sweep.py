"""Workers of a ladder: every run once, resumed bit for bit, shared by locks or by a study."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from kalmagrove.data.packing import PackedText
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.scaling.ladder import GROWING_OPTIONS, Rung, SweepConfig, all_runs, best_scales, rungs
from kalmagrove.scaling.points import read_points
from kalmagrove.scaling.share import FolderShare, run_path
from kalmagrove.scaling.study import open_study
from kalmagrove.scaling.sweep import sweep, write_tables
from kalmagrove.scaling.worker import known_losses, runs_to_do, tuning_report, work
from kalmagrove.training.config import DataConfig, LoopConfig, plain_options
from kalmagrove.training.run import TrainingDiverged, TrainingRun
from kalmagrove.training.run_folder import RunFolder, open_run_folder, valid_loss_of
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted
from kalmagrove.training.watching import FolderWatch

CONFIG = SweepConfig(
    data=DataConfig(vocab_size=300),
    families="llama,kalmagrove",
    sizes=["16x1", "32x1"],
    tokens=["512", "1024"],
    head_dim=8,
    loop=LoopConfig(batch_size=4, context_length=32, precision="fp32", device="cpu", save_every=2, log_every=1),
)


def result_losses(folder: Path, packed: PackedText) -> dict[str, float]:
    share = FolderShare(folder, packed.fingerprint)
    losses, done = known_losses(CONFIG, share)
    return {rung.key: valid_loss_of(done[rung.key]) for rung in all_runs(CONFIG, losses)}


@pytest.fixture(scope="module")
def finished(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    open_run_folder(folder, plain_options(CONFIG)).release()
    work(CONFIG, packed, folder, FolderShare(folder, packed.fingerprint))
    return folder


def test_a_ladder_that_grows_trains_only_what_is_new(packed: PackedText, tmp_path: Path) -> None:
    small = replace(CONFIG, families="kalmagrove", sizes=["16x1"], tokens=["512"])

    def done(config: SweepConfig) -> dict[str, Any]:
        terms: dict[str, Any] = {"workers": 1, "storage": None, "command": "kalmagrove scale sweep"}
        return sweep(config, packed, tmp_path / "ladder", **terms)

    assert done(small)["runs"] == 1
    before = {path: path.read_bytes() for path in (tmp_path / "ladder").rglob("result.json")}
    assert done(replace(small, sizes=["16x1", "24x1"], seeds="0,1"))["runs"] == 4
    assert len(before) == 1 and all(path.read_bytes() == content for path, content in before.items())
    assert RunFolder(tmp_path / "ladder").read_config()["sizes"] == ["16x1", "24x1"]
    with pytest.raises(KalmaGroveError, match=r"another configuration \(head_dim: 8 -> 4"):
        done(replace(small, head_dim=4))


def test_runs_on_another_text_are_not_mixed_with_these(finished: Path, packed: PackedText) -> None:
    share = FolderShare(finished, "of another text")
    with pytest.raises(UsageError, match="seed-0 was trained on other data; give the same data, choose another folder"):
        known_losses(CONFIG, share)


def test_a_sweep_waits_for_one_that_begins_beside_it(packed: PackedText, tmp_path: Path) -> None:
    small = replace(CONFIG, families="kalmagrove", sizes=["16x1"], tokens=["512"])
    held = open_run_folder(tmp_path / "ladder", plain_options(small))
    Timer(1.0, held.release).start()
    facts = sweep(small, packed, tmp_path / "ladder", workers=1, storage=None, command="kalmagrove scale sweep")
    assert facts["runs"] == 1


def test_the_watch_of_a_ladder_that_grows_has_not_ended(packed: PackedText, tmp_path: Path) -> None:
    small = replace(CONFIG, families="kalmagrove", sizes=["16x1"], tokens=["512"])
    sweep(small, packed, tmp_path / "ladder", workers=1, storage=None, command="kalmagrove scale sweep")
    watch = FolderWatch(tmp_path / "ladder")
    assert watch.has_ended(watch.read())
    grown = replace(small, seeds="0,1")
    with open_run_folder(tmp_path / "ladder", plain_options(grown), allow_changed=GROWING_OPTIONS) as root:
        root.write_config(plain_options(grown))
    watch = FolderWatch(tmp_path / "ladder")
    assert not watch.has_ended(watch.read())


def test_the_table_has_a_sound_point_for_each_run(finished: Path, packed: PackedText) -> None:
    facts = write_tables(
        CONFIG, packed, finished, FolderShare(finished, packed.fingerprint), command="kalmagrove scale sweep"
    )
    table = read_points(finished)
    assert facts["runs"] == facts["planned_runs"] == len(table.points) == 8 and not table.left_out
    assert facts["models"]["families"]["kalmagrove"] == {"preset": "kalmagrove", "optim": "kalma"}
    for point in table.points:
        assert 0 < point.loss < math.log(300) + 0.5
        assert point.flops is not None and point.flops > 6 * point.parameters * point.tokens / 10
        assert point.seconds is not None and point.seconds > 0
        assert point.unique_tokens is not None and point.unique_tokens <= point.tokens
    by_size = {(p.family, p.parameters) for p in table.points}
    assert len(by_size) == 4
    assert not list(finished.glob("runs/**/checkpoints"))
    assert len(list(finished.glob("runs/**/model/model.safetensors"))) == 8


def test_a_sweep_can_be_watched(finished: Path, packed: PackedText) -> None:
    watch = FolderWatch(finished)
    states = watch.read()
    assert watch.has_many and len(states) == 8 and {state.status for state in states} == {"finished"}
    assert {state.name for state in states} >= {"runs/llama/16x1/512/lr-x1/seed-0"}
    (finished / "sweep.json").unlink(missing_ok=True)
    assert not watch.has_ended(states)
    write_tables(CONFIG, packed, finished, FolderShare(finished, packed.fingerprint), command="")
    assert watch.has_ended(states)


def test_a_worker_that_is_stopped_goes_on_to_the_same_losses(
    finished: Path, packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes in the middle of every second run, until all are done."""
    steps = 0
    advance = TrainingSession.advance

    def advance_and_stop(session: TrainingSession) -> Any:
        nonlocal steps
        steps += 1
        if steps % 7 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(session)

    monkeypatch.setattr(TrainingSession, "advance", advance_and_stop)
    stops = 0
    while True:
        try:
            work(CONFIG, packed, tmp_path, FolderShare(tmp_path, packed.fingerprint))
            break
        except Interrupted as stopped:
            assert stopped.exit_code == 128 + signal.SIGTERM
            stops += 1
    assert stops > 4
    assert result_losses(tmp_path, packed) == result_losses(finished, packed)


def test_a_run_that_another_process_holds_is_left_alone(packed: PackedText, tmp_path: Path) -> None:
    share = FolderShare(tmp_path, packed.fingerprint)
    todo = runs_to_do(CONFIG, share, packed.vocab_size)
    with open_run_folder(run_path(tmp_path, todo[0]), {"any": "thing"}):
        claim = share.take(todo)
        assert claim is not None and claim.rung.key == todo[1].key
        assert share.take(todo[:1]) is None
    claim = share.take(todo)
    assert claim is not None and claim.rung.key == todo[0].key


def test_a_run_that_diverges_has_an_outcome_and_is_left_out_by_name(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = TrainingRun.train_step

    def diverge(self: TrainingRun) -> Any:
        if self.config.loop.tokens == run.tokens and self.step == 3:
            raise TrainingDiverged("the loss is nan")
        return train_step(self)

    monkeypatch.setattr(TrainingRun, "train_step", diverge)
    config = replace(CONFIG, families="llama", sizes=["16x1"], tokens=["512", "1024"], lr_exponent=0.0)
    config = replace(config, loop=replace(config.loop, tokens="1024"))
    share = FolderShare(tmp_path, packed.fingerprint)
    run = rungs(config, {"llama": 1.0})[0]
    work(config, packed, tmp_path, share)
    assert RunFolder(run_path(tmp_path, run)).read_result()["diverged"]  # type: ignore[index]
    write_tables(config, packed, tmp_path, share, command="")
    table = read_points(tmp_path)
    assert len(table.points) == 1 and len(table.left_out) == 1
    assert "it has no loss (it did not finish, or diverged)" in table.left_out[0]


def test_trials_choose_the_rate_and_the_check_is_reported(packed: PackedText, tmp_path: Path) -> None:
    config = replace(CONFIG, families="llama", trials=3, tuned_sizes=1, checked_size="32x1", tokens=["512"])
    share = FolderShare(tmp_path, packed.fingerprint)
    work(config, packed, tmp_path, share)
    losses, done = known_losses(config, share)
    known = {key: valid_loss_of(result) for key, result in done.items()}
    chosen = best_scales(config, losses)["llama"]
    tried = {rung.lr_scale: known[rung.key] for rung in all_runs(config, losses) if rung.size == "16x1"}
    assert {0.5, 1.0, 2.0} <= set(tried) and tried[chosen] == min(tried.values())
    facts = write_tables(config, packed, tmp_path, share, command="")
    (report,) = facts["tuning"]
    assert report["chosen"] == chosen and report["at_the_edge"] == (chosen in (min(tried), max(tried)))
    check = report["check"]
    assert check["size"] == "32x1" and set(check["valid_loss"]) == {"0.5", "1", "2"}
    assert check["lost"] == check["valid_loss"]["1"] - min(check["valid_loss"].values())
    assert facts["runs"] == 2
    assert tuning_report(config, {}, [], {}) == []


@pytest.mark.parametrize("storage", ["journal.log", "sqlite:///{folder}/study.db"])
def test_machines_without_a_common_folder_share_a_study(
    storage: str, finished: Path, packed: PackedText, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    place = storage.format(folder=tmp_path) if "://" in storage else str(tmp_path / storage)
    first = open_study(place, CONFIG, packed.fingerprint)
    todo = runs_to_do(CONFIG, first, packed.vocab_size)
    taken = [first.take(todo) for _ in range(3)]
    second = open_study(place, CONFIG, packed.fingerprint)
    others = [second.take(todo) for _ in range(len(todo))]
    keys = [claim.rung.key for claim in [*taken, *others] if claim is not None]
    assert len(keys) == len(set(keys)) == len(todo)
    # A claim that is given back is taken by the other machine; a finished one by nobody.
    assert taken[0] is not None and taken[1] is not None
    taken[0].give_back()
    again = second.take(todo)
    assert again is not None and again.rung.key == taken[0].rung.key
    result = json.loads((run_path(finished, taken[1].rung) / "result.json").read_text())
    taken[1].finish(result)
    assert second.results(todo) == {taken[1].rung.key: result}
    assert taken[1].rung.key not in {rung.key for rung in runs_to_do(CONFIG, second, packed.vocab_size)}


def test_a_worker_that_gives_no_sign_loses_its_run(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    share = open_study(str(tmp_path / "journal.log"), CONFIG, packed.fingerprint)
    todo = runs_to_do(CONFIG, share, packed.vocab_size)[:1]
    claim = share.take(todo)
    assert claim is not None and share.take(todo) is None
    monkeypatch.setattr("kalmagrove.scaling.study.SECONDS_UNTIL_LOST", -1.0)
    again = share.take(todo)
    assert again is not None
    # It comes back with an outcome that nobody waits for any more.
    claim.finish({"valid": {"loss": 1.0}})
    assert share.results(todo) == {}
    again.finish({"valid": {"loss": 2.0}})
    assert share.results(todo)[todo[0].key]["valid"]["loss"] == 2.0


def test_another_ladder_has_another_study(packed: PackedText, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    place = str(tmp_path / "journal.log")
    one = open_study(place, CONFIG, packed.fingerprint)
    others = [replace(CONFIG, head_dim=4), replace(CONFIG, loop=replace(CONFIG.loop, batch_size=2))]
    grown = [replace(CONFIG, sizes=["16x1", "32x1", "48x1"]), replace(CONFIG, seeds="0,1")]
    same = [replace(CONFIG, loop=replace(CONFIG.loop, log_every=7)), *grown]
    names = [open_study(place, config, packed.fingerprint).study.study_name for config in (*same, *others)]
    assert [name == one.study.study_name for name in names] == [True] * len(same) + [False] * len(others)


def test_a_storage_that_cannot_be_opened_is_named(packed: PackedText, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(KalmaGroveError, match="the storage nosuch://x cannot be opened"):
        open_study("nosuch://x", CONFIG, packed.fingerprint)


def test_the_longest_runs_come_first(packed: PackedText, tmp_path: Path) -> None:
    todo: list[Rung] = runs_to_do(CONFIG, FolderShare(tmp_path, packed.fingerprint), packed.vocab_size)
    assert todo[0].size == "32x1" and todo[0].tokens == 1024 and todo[-1].size == "16x1"
