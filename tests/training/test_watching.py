"""A run is read while it is written: cut lines, resumed and replaced files, locks, ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kalmagrove.data.packing import PackedText
from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run import TrainingDiverged
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.tracking import MetricsWriter
from kalmagrove.training.watching import FolderWatch, MetricsTail, RunWatch, is_in_use

LOOP = {"tokens": 9600, "batch_size": 4, "context_length": 24}
CONFIG: dict[str, Any] = {"model": {"preset": "llama"}, "loop": LOOP}


def record(step: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 96 * step,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 1.0,
        "step_seconds": 96.0,
        "seconds": 3.0 * step,
        "peak_memory_bytes": 10**9,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "run"


def write(folder: Path, *records: dict[str, Any]) -> None:
    writer = MetricsWriter(folder / "metrics.jsonl")
    for each in records:
        writer.write(each)


def test_a_tail_reads_what_is_new_and_leaves_a_half_line_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    tail.update()
    assert tail.records == []
    line = json.dumps(record(1)).encode()
    for place in range(len(line)):
        path.write_bytes(line[:place])
        tail.update()
        assert tail.records == []
    path.write_bytes(line + b"\n" + line[:9])
    tail.update()
    assert [r["step"] for r in tail.records] == [1]
    path.write_bytes(line + b"\n" + json.dumps(record(2)).encode() + b"\n")
    tail.update()
    tail.update()
    assert [r["step"] for r in tail.records] == [1, 2]


def test_a_tail_begins_anew_where_a_resumed_run_dropped_records(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    write(tmp_path, *(record(step, loss=3.0) for step in range(1, 6)))
    tail.update()
    RunFolder(tmp_path).truncate_metrics(2)
    # As long as before or longer when it is looked at again: the size alone would not tell.
    write(tmp_path, *(record(step, loss=1.0) for step in range(3, 9)))
    tail.update()
    assert [(r["step"], r["loss"]) for r in tail.records] == [(s, 3.0 if s < 3 else 1.0) for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").unlink()
    tail.update()
    assert tail.records == []


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    no_records = [b"[1]", b"null", b'{"loss": 1}', b"\xff\xfe", b"[" * 100_000, b'{"step": %s}' % (b"9" * 5000)]
    no_records += [b'{"step": %s, "loss": 1}' % step for step in (b"true", b"2.0", b"-1", b"9" * 400, b"NaN")]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*no_records, b'{"step": 3, "loss": 1.5}', b""]))
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    tail.update()
    assert tail.records == [{"step": 3, "loss": 1.5}]


def test_a_run_is_described_from_its_files(folder: Path) -> None:
    write(folder, record(10, 3.0), {"step": 10, "valid_loss": 2.75}, record(20, 2.5))
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "checkpoints" / ".step-00000020.tmp-1").mkdir()
    for path, moment in ((folder / "checkpoints" / "step-00000010", 400), (folder / "metrics.jsonl", 950)):
        os.utime(path, (moment, moment))
    state = RunWatch(folder, "mine", clock=lambda: 1000.0).read()
    assert (state.name, state.status, state.step, state.total_steps) == ("mine", "stopped", 20, 100)
    assert (state.loss, state.valid_loss, state.lr, state.grad_norm) == (2.5, 2.75, 1e-3, 0.5)
    # From the ten steps between the records, not from what the last step alone took.
    assert (state.tokens_per_second, state.seconds, state.seconds_left) == (32.0, 60.0, 240.0)
    assert (state.checkpoint_step, state.checkpoint_age, state.record_age) == (10, 600.0, 50.0)
    assert state.losses == ((10, 3.0), (20, 2.5)) and state.valid_losses == ((10, 2.75),)
    assert "losses" not in state.to_dict() and json.loads(json.dumps(state.to_dict()))["step"] == 20


WRONG_NUMBERS = [
    None, True, "x", "3", [], {}, 10**400, -(10**400), 1e308, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=lambda wrong: f"{wrong!r:.9}")
@pytest.mark.parametrize(
    ("written", "left_out"),
    [
        ("loss", "loss"),
        ("lr", "lr"),
        ("grad_norm", "grad_norm"),
        ("peak_memory_bytes", "peak_memory_bytes"),
        ("seconds", "seconds"),
        ("tokens", None),
    ],
)
def test_a_wrong_number_is_left_out_and_the_rest_stays(
    written: str, left_out: str | None, wrong: Any, folder: Path
) -> None:
    before, last = record(10), record(30) | {written: wrong}
    lines = [json.dumps(r) for r in (before, record(20), last)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    state = RunWatch(folder, "mine").read()
    expected = {name: last[name] for name in ("step", "loss", "lr", "grad_norm", "seconds", "peak_memory_bytes")}
    expected |= {} if left_out is None else {left_out: None}
    assert {name: getattr(state, name) for name in expected} == expected
    # The speed is that between the records that have a time.
    assert (state.tokens_per_second, state.seconds_left) == (32.0, 210.0)
    assert state.losses == ((10, 2.0), (20, 2.0), (30, 2.0))[: 2 if written == "loss" else 3]


@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=lambda wrong: f"{wrong!r:.9}")
def test_wrong_numbers_of_the_ends_are_left_out(wrong: Any, folder: Path) -> None:
    lines = [json.dumps(r) for r in ({"step": 5, "valid_loss": 2.5}, {"step": 10, "valid_loss": wrong})]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    watch = RunWatch(folder, "mine")
    for test in (wrong, {"perplexity": wrong}):
        (folder / "result.json").write_text(json.dumps({"test": test}))
        state = watch.read()
        assert (state.status, state.test_perplexity) == ("finished", None)
    assert (state.valid_loss, state.valid_losses) == (2.5, ((5, 2.5),))


def test_what_no_run_could_reach_is_left_out(folder: Path) -> None:
    """Sound numbers of which the quotient is not."""
    write(folder, record(1) | {"seconds": 0.0}, record(2) | {"seconds": 5e-324})
    assert RunWatch(folder, "mine").read().tokens_per_second is None
    write(folder, record(3) | {"seconds": 9e15})
    state = RunWatch(folder, "mine").read()
    assert (state.seconds, state.seconds_left) == (9e15, None)
    for name in (f"step-{'9' * 200}", f"step-{2**53:08d}"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        assert RunWatch(folder, "mine").read().checkpoint_step is None


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes that have a name")
@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "plan.json", "config.yaml", ".lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_only_files_are_read(name: str, kind: str, tmp_path: Path) -> None:
    run = tmp_path / "llama" / "lr-x1" / "seed-0"
    run.mkdir(parents=True)
    for place in (tmp_path, run):
        (place / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"models": "llama"}))
    watch = FolderWatch(tmp_path)
    path = (tmp_path if name == "plan.json" else run) / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    if name == ".lock":
        assert [state.status for state in watch.read()] == ["stopped"]
        return
    with pytest.raises(KalmaGroveError, match=f"{name} is not a regular file"):
        watch.has_ended(watch.read())


def test_a_plan_that_is_nested_too_deeply_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": "llama"}))
    (tmp_path / "plan.json").write_text("[" * 100_000)
    assert not FolderWatch(tmp_path).has_ended([])


def test_a_name_that_a_terminal_would_obey_is_written_out(tmp_path: Path) -> None:
    run = tmp_path / "llama\x1b[2J" / "lr-x1" / "seed\n0"
    run.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": "llama"}))
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert [state.name for state in FolderWatch(tmp_path).read()] == [r"llama\x1b[2J/lr-x1/seed\n0"]


def test_a_run_without_records_has_no_numbers_yet(folder: Path) -> None:
    state = RunWatch(folder, "mine").read()
    assert (state.status, state.step, state.loss, state.seconds_left, state.checkpoint_step) == (
        "stopped", 0, None, None, None,
    )  # fmt: skip


def test_a_run_is_running_while_a_process_holds_it_and_looking_does_not_disturb(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "run", CONFIG)
    watch = RunWatch(tmp_path / "run", "mine")
    assert watch.read().status == "running"
    run.release()
    assert watch.read().status == "stopped"
    open_run_folder(tmp_path / "run", CONFIG).release()
    holder = (
        "import sys, time; from pathlib import Path; from kalmagrove.training.run_folder import open_run_folder\n"
        f"run = open_run_folder(Path({str(tmp_path / 'run')!r}), {CONFIG!r}); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert watch.read().status == "running"
    process.kill()
    process.communicate()
    assert watch.read().status == "stopped"
    assert not is_in_use(tmp_path / "nowhere")


def test_the_ends_of_a_run(folder: Path) -> None:
    watch = RunWatch(folder, "mine")
    write(folder, record(90), {"step": 91, "diverged": "the loss is nan at step 91"})
    state = watch.read()
    assert (state.status, state.step) == ("diverged", 90)
    RunFolder(folder).truncate_metrics(90)
    assert watch.read().status == "stopped"
    RunFolder(folder).write_result({"diverged": True, "seconds": 1.0})
    assert watch.read().status == "diverged"
    RunFolder(folder).write_result({"test": {"perplexity": 12.5}})
    state = watch.read()
    assert (state.status, state.test_perplexity) == ("finished", 12.5)


def test_a_run_that_diverged_looks_so_until_it_goes_on(packed: PackedText, tmp_path: Path) -> None:
    config = TrainConfig(
        data=DataConfig(vocab_size=300),
        model=ModelConfig(preset="llama", hidden_size=32, num_hidden_layers=1, head_dim=8),
        optim=OptimConfig(name="adamw"),
        loop=LoopConfig(tokens=9600, batch_size=4, context_length=24, device="cpu", log_every=1, save_every=2),
    )
    session = TrainingSession(config, packed, tmp_path)
    for _ in range(3):
        session.advance()
    with torch.no_grad():
        next(session.run.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingDiverged):
        session.advance()
    watch = RunWatch(tmp_path, "mine")
    assert watch.read().status == "running"
    session.close()
    assert (watch.read().status, watch.read().step) == ("diverged", 3)
    session = TrainingSession(config, packed, tmp_path)
    assert (watch.read().status, watch.read().step) == ("running", 2)
    session.close()
    assert watch.read().status == "stopped"


def test_a_comparison_shows_the_runs_that_have_begun_and_ends_with_its_last_measurement(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": "llama,kalmagrove", "loop": LOOP}))
    watch = FolderWatch(tmp_path)
    assert watch.is_comparison and watch.read() == [] and not watch.has_ended([])
    for number, name in enumerate(("llama/lr-x2/seed-0", "kalmagrove/lr-x0.5/seed-0")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        os.utime(tmp_path / name / "config.yaml", (number, number))
        states = watch.read()
    assert [state.name for state in states] == ["llama/lr-x2/seed-0", "kalmagrove/lr-x0.5/seed-0"]
    # A trial of a learning rate has no result of its own.
    write(tmp_path / "llama/lr-x2/seed-0", record(100))
    assert [state.status for state in watch.read()] == ["finished", "stopped"]
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 100}))
    assert not watch.has_ended(states)
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 100, "memory": {}}))
    assert watch.has_ended(states)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder"),
        ("- 1", "does not hold a configuration"),
        ("a: [", "is not valid YAML"),
        ("loop: {tokens: many}", "does not say how long the run is"),
        ("a: " + "[" * 3000 + "]" * 3000, "is not valid YAML"),
        ("a: !!int ''", "is not valid YAML"),
        ("a: !!bool maybe", "is not valid YAML"),
        ("a: !!timestamp now", "is not valid YAML"),
        ("a: 1" + ":59" * 500 + ".5", "is not valid YAML"),
        ("loop: {tokens: .inf, batch_size: 2, context_length: 9}", "does not say how long the run is"),
        ("loop: {tokens: .nan, batch_size: 2, context_length: 9}", "does not say how long the run is"),
        ("loop: {tokens: -99, batch_size: 2, context_length: 9}", "does not say how long the run is"),
        ("loop: {tokens: 1" + "0" * 400 + ", batch_size: 2, context_length: 9}", "does not say how long the run is"),
        ("loop: [1]", "does not say how long the run is"),
    ],
    ids=lambda text: None if text is None else f"{text:.40}",
)
def test_a_folder_that_is_no_run_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(KalmaGroveError, match=message):
        FolderWatch(tmp_path).read()
    with pytest.raises(KalmaGroveError, match="does not exist"):
        FolderWatch(tmp_path / "nowhere")
