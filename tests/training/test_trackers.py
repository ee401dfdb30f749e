"""A tracker holds what metrics.jsonl holds, resumed or not, and one that fails costs a warning and nothing else."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.data.packing import PackedText
from kalmagrove.errors import UsageError
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.trackers import TensorBoardTracker, TrackedMetrics, TrackioTracker, check_tracker, numbers
from kalmagrove.training.tracking import MetricsWriter

NAMES = ["tensorboard", "trackio"]
READ_TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs("kalmagrove"))
print(json.dumps([[run.name, SQLiteStorage.get_logs("kalmagrove", run.name, run_id=run.id)] for run in runs]))
"""


def record(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 96 * step, "loss": 5.0 / step, "seconds": 2.0 * step, "grad_norm": None}


def tracked(folder: Path, name: str, told: list[str]) -> TrackedMetrics:
    run = RunFolder(folder)
    return TrackedMetrics(MetricsWriter(run.metrics_path), name, run, warn=told.append)


def points(folder: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """What a tracker's store holds, (step, value) by the name of the value."""
    return tensorboard_points(folder) if name == "tensorboard" else trackio_points(folder)


def tensorboard_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in (folder / "tensorboard").iterdir():
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def trackio_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    answer = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO],
        env=os.environ | {"TRACKIO_DIR": str(folder / "trackio")},
        capture_output=True,
        text=True,
        check=True,
    )
    [(name, rows)] = json.loads(answer.stdout)
    assert name == folder.name
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key in row.keys() - {"step", "timestamp"}:
            found.setdefault(key, []).append((row["step"], row[key]))
    return found


def expected(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for each in records:
        for key, value in numbers(each).items():
            found.setdefault(key, []).append((each["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_only_finite_numbers_are_drawn() -> None:
    mixed = {"step": 3, "loss": 1.5, "tokens": 7, "lr": math.nan, "memory": None, "diverged": "x", "flag": True}
    assert numbers(mixed) == {"loss": 1.5, "tokens": 7}


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"track {name} needs {name}; .*pip install 'kalmagrove\[{name}\]'"):
        check_tracker(name)


def test_no_tracker_needs_no_package() -> None:
    check_tracker(None)


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_cannot_write_is_one_warning_and_the_file_is_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    (tmp_path / name).write_text("a file where the tracker's folder would be")
    told: list[str] = []
    metrics = tracked(tmp_path, name, told)
    for step in range(1, 6):
        metrics.write(record(step))
    metrics.close()
    metrics.close()
    assert len(told) == 1 and f"no more tracking with {name}: " in told[0] and "\n" not in told[0]
    assert [each["step"] for each in RunFolder(tmp_path).read_metrics()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", NAMES)
def test_after_a_resume_the_points_are_those_of_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    told: list[str] = []
    # The first part is written before there is a tracker, the second one goes back to step 3.
    MetricsWriter(tmp_path / "metrics.jsonl").write(record(1))
    for first, last in ((2, 5), (4, 7)):
        RunFolder(tmp_path).truncate_metrics(first - 1)
        metrics = tracked(tmp_path, name, told)
        for step in range(first, last + 1):
            metrics.write(record(step))
        metrics.write({"step": last, "tokens": 1, "seconds": 1.0, "valid_loss": 0.5})
        metrics.close()
    assert told == []
    assert points(tmp_path, name) == expected(RunFolder(tmp_path).read_metrics())


def test_a_run_in_a_shared_trackio_store_replaces_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for place in ("a", "b", "a"):
        (tmp_path / place / "book").mkdir(parents=True, exist_ok=True)
        tracker = TrackioTracker(tmp_path / place / "book", [record(1)])
        tracker.close()
    answer = subprocess.run([sys.executable, "-c", READ_TRACKIO], capture_output=True, text=True, check=True)
    assert [(name, len(rows)) for name, rows in json.loads(answer.stdout)] == [("book", 1), ("book", 1)]
    assert not (tmp_path / "a" / "book" / "trackio").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_trackio_process_that_dies_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    told: list[str] = []
    metrics = tracked(tmp_path, "trackio", told)
    metrics.write(record(1))
    assert isinstance(metrics._tracker, TrackioTracker)
    os.kill(metrics._tracker._process.pid, signal.SIGKILL)
    metrics._tracker._process.wait()
    for step in (2, 3):
        metrics.write(record(step))
    metrics.close()
    assert len(told) == 1 and "trackio: its process ended with code -9" in told[0]
    assert len(RunFolder(tmp_path).read_metrics()) == 3


def test_a_file_that_takes_no_more_is_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    told: list[str] = []
    metrics = tracked(tmp_path, "tensorboard", told)
    metrics.write(record(1))
    assert isinstance(metrics._tracker, TensorBoardTracker)
    metrics._tracker._file.close()
    for step in (2, 3):
        metrics.write(record(step))
    metrics.close()
    assert len(told) == 1 and "closed file" in told[0]
    assert len(RunFolder(tmp_path).read_metrics()) == 3


def config(**options: Any) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(vocab_size=300),
        model=ModelConfig(preset="llama", hidden_size=32, num_hidden_layers=1, head_dim=8),
        optim=OptimConfig(name="adamw"),
        loop=LoopConfig(
            tokens=7 * 96, batch_size=4, context_length=24, precision="fp32", device="cpu", log_every=1, save_every=2
        ),
        **options,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_its_trackers_package_ends_before_its_folder_begins(
    name: str, packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"track {name} needs {name}"):
        TrainingSession(config(track=name), packed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_go_on_with_another_tracker_and_each_gets_all_of_it(
    name: str, packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    for track, steps in ((None, 3), (name, 5), (name, 7)):
        session = TrainingSession(config(track=track), packed, tmp_path / "run")
        while session.run.step < steps:
            session.advance()
        session.close()
    assert points(tmp_path / "run", name) == expected(RunFolder(tmp_path / "run").read_metrics())
