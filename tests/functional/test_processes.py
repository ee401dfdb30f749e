"""Several processes under the real command and under torchrun: stopped, killed, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed

pytestmark = pytest.mark.skipif(
    not (Path("/proc/self/stat").exists() and distributed.is_available() and distributed.is_gloo_available()),
    reason="needs Linux's /proc and torch.distributed with gloo",
)

STEPS = 60
OPTIONS = [
    "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.head_dim", "8", "--loop.batch_size", "4",
    "--loop.context_length", "24", "--loop.device", "cpu", "--loop.precision", "fp32", "--data.vocab_size", "300",
    "--loop.log_every", "1", "--loop.save_every", "4", "--tokens", str(STEPS * 4 * 24),
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEADLINE = 120.0


def command(text_file: Path, folder: Path) -> list[str]:
    data = ["--data", str(text_file), "--data.folder", str(folder.parent / "data")]
    return ["-m", "kalmagrove", "train", *data, *OPTIONS, "--out", str(folder)]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | {"LOGLEVEL": "ERROR"})


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process numbers of the training processes, the first rank first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
            environment = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [word for word in environment if word.startswith(b"RANK=")]
        if int(after_name[1]) == launcher.pid and rank:
            found.append((rank[0], int(path.parent.name)))
    return [number for _, number in sorted(found)]


def wait_for_steps(folder: Path, steps: int, log: Path) -> None:
    begun = time.monotonic()
    while len(losses(folder)) < steps:
        assert time.monotonic() - begun < DEADLINE, log.read_text()
        time.sleep(0.05)


def losses(folder: Path) -> list[float]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["loss"] for record in records if "loss" in record]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def unbroken(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    log = folder.parent / "log"
    assert start([sys.executable, *command(text_file, folder)], log).wait() == 0, log.read_text()
    assert len(losses(folder)) == STEPS
    return losses(folder)


@pytest.mark.parametrize(
    ("number", "code", "optim"),
    [(signal.SIGKILL, 137, "kalma"), (signal.SIGKILL, 137, "adamw"), (signal.SIGTERM, 143, "kalma")],
)
def test_nproc_ends_with_a_checkpoint_that_one_process_goes_on_from(
    number: signal.Signals, code: int, optim: str, text_file: Path, unbroken: list[float], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    words = [*command(text_file, folder), "--optim.name", optim]
    launcher = start([sys.executable, *words, "--nproc", "2"], log)
    wait_for_steps(folder, 5, log)
    os.kill(workers(launcher)[1] if number == signal.SIGKILL else launcher.pid, number)
    assert launcher.wait(DEADLINE) == code, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    # A part of Kalma's state is gone with the process that was killed.
    assert ("; saved " in said) == (number == signal.SIGTERM or optim == "adamw")
    assert ("process 1 of 2 was ended by SIGKILL" in said) == (number == signal.SIGKILL)
    saved = int(checkpoints(folder)[-1].removeprefix("step-"))
    assert 4 <= saved < STEPS
    assert start([sys.executable, *words], log).wait(DEADLINE) == 0, log.read_text()
    assert len(losses(folder)) == STEPS
    if optim == "kalma":
        assert losses(folder) == pytest.approx(unbroken, abs=0.02)


def test_a_folder_of_another_configuration_is_refused_once_for_all_processes(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("optim: {lr: 1.0}\n")
    log = tmp_path / "log"
    assert start([sys.executable, *command(text_file, folder), "--nproc", "2"], log).wait(DEADLINE) == 2
    said = log.read_text()
    assert said.count("belongs to another configuration") == 1
    assert "connection" not in said and "goes on from" not in said and "Traceback" not in said


def test_torchrun_starts_a_killed_process_again_and_the_run_ends_as_if_nothing_had_been(
    text_file: Path, unbroken: list[float], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    launcher = start([*TORCHRUN, "--max_restarts", "1", *command(text_file, folder)], log)
    wait_for_steps(folder, 5, log)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    assert launcher.wait(DEADLINE) == 0, log.read_text()
    assert "going on from step" in log.read_text()
    assert losses(folder) == pytest.approx(unbroken, abs=0.02)
    assert (folder / "model" / "model.safetensors").exists()


COMPARED = ["llama-tiny", "kalmagrove-tiny"]


def compared(text_file: Path, folder: Path, *more: str) -> dict[str, dict[str, float]]:
    """Validation and test losses of a comparison by model."""
    small = OPTIONS[OPTIONS.index("--loop.batch_size") : OPTIONS.index("--loop.log_every")]
    options = [*small, "--models", ",".join(COMPARED), "--tokens", str(20 * 4 * 24)]
    data = ["--data", str(text_file), "--data.folder", str(folder.parent / "data")]
    log = folder.parent / "log"
    words = [sys.executable, "-m", "kalmagrove", "compare", *data, *options, "--out", str(folder), *more]
    assert start(words, log).wait() == 0, log.read_text()
    models = json.loads((folder / "results.json").read_text())["models"]
    return {m["name"]: {split: m["runs"][0][split]["loss"] for split in ("valid", "test")} for m in models}


def test_a_comparison_by_two_processes_is_that_of_one(text_file: Path, tmp_path: Path) -> None:
    alone = compared(text_file, tmp_path / "alone")
    two = compared(text_file, tmp_path / "two", "--nproc", "2")
    assert set(two) == set(COMPARED)
    for model in COMPARED:
        assert two[model] == pytest.approx(alone[model], rel=1e-3)
    said = (tmp_path / "log").read_text()
    assert said.count("llama-tiny: test perplexity") == 2, "each comparison says it once"
