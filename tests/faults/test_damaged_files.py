"""Spoiled, missing and exchanged files are named in one line, and whatever whole checkpoint is left is used."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fault_operations import fork
from fault_server import FaultServer
from hostile import ends_well

from kalmagrove.cli import main
from kalmagrove.data.packing import PackedText, open_packed
from kalmagrove.errors import KalmaGroveError
from kalmagrove.models.convert import load_config, load_model
from kalmagrove.training.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, TrainConfig
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.trainer import train

Count = Callable[[str, int], None]
Harm = Callable[[Path, random.Random], None]

STEPS, SAVE_EVERY = 6, 2


def config(**loop: object) -> TrainConfig:
    options = {"tokens": STEPS * 32, "batch_size": 2, "context_length": 16, "precision": "fp32", "device": "cpu"}
    options |= {"log_every": 1, "eval_every": 3, "save_every": SAVE_EVERY, "keep_last": 2}
    return TrainConfig(
        data=DataConfig(vocab_size=300),
        model=ModelConfig(hidden_size=16, num_hidden_layers=1, head_dim=8),
        loop=LoopConfig(**(options | loop)),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def whole(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with the checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(), packed, folder, say=lambda line: None)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoiled."""
    return shutil.copytree(whole, tmp_path / "run")


def cut(part: float) -> Harm:
    return lambda file, chance: os.truncate(file, int(file.stat().st_size * part))


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def zero_the_end(file: Path, chance: random.Random) -> None:
    """As some file systems leave what had not reached the disk."""
    size = file.stat().st_size
    os.truncate(file, size // 3)
    os.truncate(file, size)


def become_a_folder(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def become_a_link_to_nothing(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.symlink_to("nothing")


def become_a_circle(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.name)


HARMS: dict[str, Harm] = {
    "emptied": cut(0),
    "cut at the start": cut(0.1),
    "cut in the middle": cut(0.5),
    "without its last byte": lambda file, chance: os.truncate(file, file.stat().st_size - 1),
    "with zeros at its end": zero_the_end,
    "missing": lambda file, chance: file.unlink(),
    "a folder": become_a_folder,
    "a link to nothing": become_a_link_to_nothing,
    "a link to itself": become_a_circle,
    **{f"with another bit, {number}": flip for number in range(6)},
}
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    return latest_checkpoint(RunFolder(folder).checkpoints_path)


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    return one.step == other.step and all(torch.equal(value, other.model[name]) for name, value in one.model.items())


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_checkpoint_with_a_spoiled_file_is_named_and_the_older_one_used(
    name: str, whole: Path, tmp_path: Path, count: Count
) -> None:
    older = load_checkpoint(whole / "checkpoints" / "step-00000004")
    for number, (kind, harm) in enumerate(HARMS.items()):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(whole / "checkpoints", folder)
        harm(folder / "step-00000006" / name, random.Random(f"{name} {kind}"))
        found, passed_over = latest_checkpoint(folder)
        assert found is not None and equal(found, older), kind
        assert len(passed_over) == 1 and passed_over[0].startswith("step-00000006: "), kind
        assert len(passed_over[0].splitlines()) == 1
    count("faults", len(HARMS))


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, "all"])
def test_files_of_another_step_are_not_taken_for_its_own(name: str, folder: Path, count: Count) -> None:
    checkpoints = folder / "checkpoints"
    for file in CHECKPOINT_FILES if name == "all" else (name,):
        shutil.copyfile(checkpoints / "step-00000004" / file, checkpoints / "step-00000006" / file)
    found, passed_over = newest(folder)
    assert found is not None and found.step == 4
    assert len(passed_over) == 1 and passed_over[0].startswith("step-00000006: ")
    count("faults", 1)


@pytest.mark.parametrize("kind", ["a file", "a link", "an empty folder", "a link to itself"])
def test_something_else_of_a_checkpoints_name_is_passed_over_and_set_aside(
    kind: str, packed: PackedText, folder: Path, count: Count
) -> None:
    (folder / "result.json").unlink()
    path = folder / "checkpoints" / "step-00000006"
    moved = path.rename(folder / "moved")
    if kind == "a file":
        path.write_text("mine")
    elif kind == "an empty folder":
        path.mkdir()
    else:
        path.symlink_to(moved if kind == "a link" else path)
    told: list[str] = []
    train(config(keep_last=1), packed, folder, say=told.append)
    assert any(line.startswith("passed over step-00000006: ") for line in told)
    names = sorted(entry.name for entry in (folder / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000006.damaged"]
    assert load_checkpoint(path).step == 6
    assert moved.is_dir() and (moved / "manifest.json").is_file()
    count("faults", 1)


def test_with_no_whole_checkpoint_the_run_stops_and_says_so(packed: PackedText, folder: Path) -> None:
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").glob("*/state.json"):
        path.unlink()
    with pytest.raises(KalmaGroveError, match=r"no checkpoint in .* is whole; put one back from a copy"):
        train(config(), packed, folder, say=lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "result.json", "environment.json"])
def test_a_spoiled_file_of_a_run_folder_never_harms_the_rest(
    name: str, packed: PackedText, whole: Path, tmp_path: Path, count: Count
) -> None:
    """The command goes on as if nothing had been, or ends with one line and leaves every other file as it was."""
    losses = [record["loss"] for record in RunFolder(whole).read_metrics() if "loss" in record]
    for number, (kind, harm) in enumerate(HARMS.items()):
        folder = shutil.copytree(whole, tmp_path / str(number))
        harm(folder / name, random.Random(f"{name} {kind}"))
        if name != "result.json":
            (folder / "result.json").unlink()
        before = (folder / "checkpoints" / "step-00000006" / "manifest.json").read_bytes()
        result = ends_well(lambda folder=folder: train(config(), packed, folder, say=lambda line: None))
        assert (folder / "checkpoints" / "step-00000006" / "manifest.json").read_bytes() == before, kind
        if result is not None and name == "environment.json":
            assert [r["loss"] for r in RunFolder(folder).read_metrics() if "loss" in r] == losses
    count("faults", len(HARMS))


@pytest.mark.slow
def test_a_spoiled_packed_text_is_refused(packed: PackedText, tmp_path: Path, count: Count) -> None:
    names = [path.name for path in packed.folder.iterdir() if path.name != "tokenizer_config.json"]
    assert len(names) >= 5
    out = tmp_path / "out"
    for name in names:
        for kind, harm in HARMS.items():
            folder = shutil.copytree(packed.folder, tmp_path / "packed")
            harm(folder / name, random.Random(f"{name} {kind}"))
            if kind.startswith(("with another bit", "without its last")) and name in (
                "manifest.json",
                "tokenizer.json",
            ):
                # A note or white space may change without harm.
                opened = ends_well(lambda folder=folder: open_packed(folder))
            else:
                opened = ends_well(lambda folder=folder: open_packed(folder))
                assert opened is None, (name, kind)
            words = f"train --data {folder} --tokens 16 --loop.batch_size 1 --loop.context_length 16 --out {out}"
            code = main([*words.split(), *["--model.hidden_size", "16", "--model.num_hidden_layers", "1"]])
            assert code == (0 if opened is not None else 1), (name, kind)
            assert out.exists() == (opened is not None)
            shutil.rmtree(folder)
            shutil.rmtree(out, ignore_errors=True)
    count("faults", len(names) * len(HARMS))


@pytest.mark.slow
def test_a_spoiled_model_is_loaded_whole_or_refused_in_one_line(whole: Path, tmp_path: Path, count: Count) -> None:
    names = [path.name for path in (whole / "model").iterdir()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        for kind, harm in HARMS.items():
            folder = shutil.copytree(whole / "model", tmp_path / "model")
            harm(folder / name, random.Random(f"{name} {kind}"))
            ends_well(lambda folder=folder: load_config(folder))
            model = ends_well(lambda folder=folder: load_model(folder))
            if model is not None:
                # A number of a weight cannot be told from another; all else is there.
                assert name != "model.safetensors" or kind.startswith(("with another bit", "with zeros"))
            shutil.rmtree(folder)
    count("faults", len(names) * len(HARMS))


# A disk that is full, read-only, or reached by another name; and a clock that is wrong.


def in_child(action: Callable[[], object]) -> None:
    """Runs an action in a forked child and fails with what it raised."""
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        problem = pipe.read()
    _, status = os.waitpid(child, 0)
    assert not problem, problem
    assert os.waitstatus_to_exitcode(status) == 0


def advance(session: TrainingSession, steps: int) -> None:
    for _ in range(steps):
        session.advance()


def checkpoint_bytes(folder: Path) -> int:
    return max(path.stat().st_size for path in (folder / "checkpoints" / "step-00000006").iterdir())


@pytest.mark.parametrize("part", [0.05, 0.5, 0.98])
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_a_file_that_may_not_grow_ends_the_run_and_not_its_checkpoints(
    part: float, background: bool, packed: PackedText, whole: Path, tmp_path: Path, count: Count
) -> None:
    conf = config(save_in_background=background)

    def fill() -> None:
        session = TrainingSession(conf, packed, tmp_path)
        advance(session, 3)
        session.wait_for_saving()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = int(part * checkpoint_bytes(whole))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            advance(session, 1)
            session.close()
        except OSError as error:
            assert str(error), "an error without a word"
        else:
            raise AssertionError("the disk took it all")

    in_child(fill)
    found, passed_over = newest(tmp_path)
    assert found is not None and found.step == 2 and passed_over == []
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train(conf, packed, tmp_path, say=lambda line: None)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    count("faults", 1)


@contextmanager
def small_disk(megabytes: float) -> Iterator[Path]:
    """A file system of its own in memory, or a skipped test where this process may not make one."""
    point = Path(tempfile.mkdtemp())
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if mounted:
        words = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(point)]
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    try:
        if not mounted:
            pytest.skip("no file system can be mounted here")
        yield point
    finally:
        if mounted:
            subprocess.run(["umount", str(point)], check=True)
        point.rmdir()


def test_a_full_file_system_ends_the_run_and_not_its_checkpoints(packed: PackedText, whole: Path, count: Count) -> None:
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step-00000006").iterdir())
    with small_disk(1.5 * size / 2**20 + 0.06) as disk:
        with pytest.raises(OSError):
            train(config(), packed, disk / "run", say=lambda line: None)
        found, passed_over = newest(disk / "run")
        assert found is not None and found.step == 2 and passed_over == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        train(config(), packed, disk / "run", say=lambda line: None)
        assert (disk / "run" / "model" / "model.safetensors").read_bytes() == (
            whole / "model" / "model.safetensors"
        ).read_bytes()
    count("faults", 1)


def test_a_folder_that_may_not_be_written_is_refused_in_one_line(packed: PackedText, tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o555)

        def write() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                open_run_folder(place / "run", {"seed": 1})
            except OSError as error:
                assert error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            else:
                raise AssertionError("it was written")

        in_child(write)
        assert list(place.iterdir()) == []
    finally:
        place.chmod(0o755)
        shutil.rmtree(place)


def test_a_linked_run_folder_is_the_same_folder_with_the_same_lock(
    packed: PackedText, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    session = TrainingSession(config(), packed, tmp_path / "link")
    advance(session, 3)
    with pytest.raises(KalmaGroveError, match="is in use by another process"):
        TrainingSession(config(), packed, tmp_path / "disk")
    session.close()
    train(config(), packed, tmp_path / "disk", say=lambda line: None)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


def test_a_clock_that_jumps_back_changes_nothing(
    packed: PackedText, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = TrainingSession(config(), packed, tmp_path / "run")
    advance(session, 5)
    session.close()
    for number, path in enumerate(sorted((tmp_path / "run").rglob("*"), reverse=True)):
        # The newest files get the oldest times.
        os.utime(path, (1_000_000 + number, 1_000_000 + number))
    monkeypatch.setattr(time, "time", lambda: 1.0)
    train(config(), packed, tmp_path / "run", say=lambda line: None)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    expected = [(r["step"], r.get("loss"), r.get("valid_loss")) for r in RunFolder(whole).read_metrics()]
    found = [(r["step"], r.get("loss"), r.get("valid_loss")) for r in RunFolder(tmp_path / "run").read_metrics()]
    assert found == expected


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(
    packed: PackedText, server: FaultServer, tmp_path: Path, count: Count
) -> None:
    words = ["train", "--data", str(packed.folder), "--out", str(tmp_path / "run"), "--tokens", "1m"]
    words += ["--model.hidden_size", "16", "--model.num_hidden_layers", "1", "--model.head_dim", "8"]
    words += ["--loop.batch_size", "2", "--loop.context_length", "16", "--loop.device", "cpu", "--loop.save_every", "2"]
    server.start(words)
    while not list((tmp_path / "run").glob("checkpoints/step-*")):
        assert not server.ended(), server.printed()
        time.sleep(0.01)
    second = subprocess.run([sys.executable, "-m", "kalmagrove", *words], capture_output=True, text=True)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].endswith(
        "is in use by another process; wait for it to end or choose another folder"
    )
    assert server.kill() == -signal.SIGKILL
    stored = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(KalmaGroveError, match="belongs to another configuration"):
        open_run_folder(tmp_path / "run", {"seed": 1})
    assert (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8") == stored
    assert newest(tmp_path / "run")[0] is not None
    count("kills", 1)


def test_a_result_that_lacks_what_the_command_shows_is_refused_in_one_line(packed: PackedText, folder: Path) -> None:
    for wrong in ({"test": 3}, {}, {"test": {"perplexity": 2.0, "bits_per_byte": 1.0}, "tokens": "9", "seconds": 1.0}):
        (folder / "result.json").write_text(json.dumps(wrong))
        with pytest.raises(KalmaGroveError, match=r"result\.json .* delete it and run again"):
            train(config(), packed, folder, say=lambda line: None)


def test_a_perplexity_that_is_too_large_for_a_number_is_said_so(
    packed: PackedText, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((folder / "result.json").read_bytes())
    result["test"]["perplexity"] = None
    (folder / "result.json").write_text(json.dumps(result))
    # The text that the folder was trained on, in the place of the one that its configuration would have made.
    monkeypatch.setattr("kalmagrove.commands.train.open_data", lambda config: packed)
    assert main(["train", "--config", str(folder / "config.yaml"), "--out", str(folder)]) == 0
    assert "test perplexity too large, " in capsys.readouterr().out


def test_a_checkpoint_for_another_model_is_named(packed: PackedText, folder: Path) -> None:
    found, _ = newest(folder)
    assert found is not None
    found.model.pop("model.norm.weight")
    session = TrainingSession(config(), packed, folder)
    session.close()
    with pytest.raises(CheckpointError, match=r"step-00000006 cannot be used: its content does not have"):
        session.run.restore(found)
