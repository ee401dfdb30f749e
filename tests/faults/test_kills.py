"""A training that is killed again and again, at any moment, ends with the bytes and losses of one that never was."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_server import ENVIRONMENT, FaultServer

from kalmagrove.data.packing import PackedText
from kalmagrove.training.run_folder import RunFolder

KILLS = int(os.environ.get("KALMAGROVE_FAULT_KILLS", "12"))
MOST_KILLS_OF_A_RUN = 8
SECONDS_OF_A_RUN = 3.0
STEPS = 60
BATCH, CONTEXT = 4, 24
EVALUATE_EVERY = 11

CONFIGURATIONS = {
    "kalma": ["--optim.name", "kalma", "--optim.refresh_every", "3", "--loop.save_every", "4"],
    "accumulation": ["--optim.name", "kalma", "--loop.micro_batch_size", "1", "--loop.save_every", "7"],
    "saving at once, and the best": [
        *("--loop.save_in_background", "false", "--loop.save_every", "5", "--loop.keep_best", "2"),
    ],
    "adamw": ["--preset", "llama", "--optim.name", "adamw", "--loop.save_every", "1", "--loop.keep_last", "1"],
}
SIGNS = (
    ".lock",
    "config.yaml",
    "checkpoints/.*",
    "checkpoints/step-*",
    "model*",
    ".model*",
    ".result.json*",
    ".metrics.jsonl*",
)
"""Names whose first appearance in a run folder is a moment at which something is half done."""


def command(data: PackedText, out: Path, configuration: str) -> list[str]:
    return [
        "train",
        *("--data", str(data.folder), "--out", str(out), "--tokens", str(STEPS * BATCH * CONTEXT)),
        *("--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.head_dim", "8"),
        *("--loop.batch_size", str(BATCH), "--loop.context_length", str(CONTEXT), "--loop.precision", "fp32"),
        *("--loop.device", "cpu", "--loop.log_every", "1", "--loop.eval_every", str(EVALUATE_EVERY)),
        *CONFIGURATIONS[configuration],
    ]


def outcome(folder: Path) -> dict[str, object]:
    """Everything about a finished run that must not depend on when it was killed."""
    run = RunFolder(folder)
    losses = [
        {name: record[name] for name in ("step", "tokens", "loss", "lr", "grad_norm", "valid_loss") if name in record}
        for record in run.read_metrics()
    ]
    result = run.read_result()
    assert result is not None
    return {
        "model": {path.name: path.read_bytes() for path in run.model_path.iterdir()},
        "losses": losses,
        "scores": [result[name] for name in ("valid", "test", "steps", "tokens", "parameters")],
        "names": sorted(path.name for path in folder.iterdir()),
        "checkpoints": sorted(path.name for path in run.checkpoints_path.iterdir()),
    }


def kill_at_a_moment(server: FaultServer, folder: Path, chance: random.Random) -> bool:
    """Kills the child after a random time, half of the times counted from a sign; returns whether it was alive."""
    if chance.random() < 0.5:
        had = set(folder.glob("*")) | set(folder.glob("checkpoints/*"))
        sign = chance.choice([sign for sign in SIGNS if folder / sign not in had])
        while not server.ended() and not set(folder.glob(sign)) - had:
            time.sleep(0.0005)
        time.sleep(chance.random() * chance.choice((0.0, 0.02)))
    else:
        time.sleep(chance.random() * SECONDS_OF_A_RUN)
    return server.kill() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_killed_run_ends_as_one_that_was_never_killed(
    configuration: str, server: FaultServer, packed: PackedText, tmp_path: Path, count: Callable[[str, int], None]
) -> None:
    assert server.run(command(packed, tmp_path / "whole", configuration)) == 0, server.printed()
    whole = outcome(tmp_path / "whole")
    assert [record["step"] for record in whole["losses"] if "loss" in record] == list(range(1, STEPS + 1))

    chance = random.Random(f"{configuration} {os.environ.get('KALMAGROVE_FAULT_SEED', '0')}")
    kills, wanted = 0, -(-KILLS // len(CONFIGURATIONS))
    while kills < wanted:
        folder = tmp_path / f"killed-{kills}"
        for _ in range(min(MOST_KILLS_OF_A_RUN, wanted - kills)):
            server.start(command(packed, folder, configuration))
            if not kill_at_a_moment(server, folder, chance):
                break
            kills += 1
        assert server.run(command(packed, folder, configuration)) == 0, server.printed()
        assert outcome(folder) == whole
        shutil.rmtree(folder)
    count("kills", kills)


@pytest.mark.slow
def test_the_command_of_the_shell_survives_a_kill_too(
    server: FaultServer, packed: PackedText, tmp_path: Path, count: Callable[[str, int], None]
) -> None:
    assert server.run(command(packed, tmp_path / "whole", "kalma")) == 0, server.printed()
    folder = tmp_path / "killed"
    words = [sys.executable, "-m", "kalmagrove", *command(packed, folder, "kalma")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    while process.poll() is None and not list(folder.glob("checkpoints/step-*")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = subprocess.run([*words, "--json"], capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    assert "going on from step" in finished.stderr
    assert json.loads(finished.stdout)["steps"] == STEPS
    assert outcome(folder) == outcome(tmp_path / "whole")
    count("kills", 1)
