"""Seconds from a command to the end of its first training step, and from which imports they come."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = {
    "python": "pass",
    "torch": "import torch",
    "torch, an optimiser": "import torch; torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])",
    "transformers' PreTrainedModel": "from transformers import PreTrainedModel",
    "transformers' Trainer, Llama": "from transformers import LlamaForCausalLM, Trainer",
    "kalmagrove.models.decoder": "import kalmagrove.models.decoder",
    "kalmagrove.training.trainer": "import kalmagrove.training.trainer",
}
"""Programs of which a start is made, each timed as a process."""
TRAINING = "kalmagrove train, first step"


def seconds_of(program: str) -> float:
    """Seconds of a whole Python process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - started


def seconds_to_first_step(preset: str, data_flags: list[str]) -> float:
    """Seconds from the command to the first line of metrics.jsonl, which is written when the first step is done."""
    with tempfile.TemporaryDirectory() as scratch:
        run, log = Path(scratch) / "run", Path(scratch) / "log"
        optimizer = "adamw" if preset.startswith("llama") else "kalma"
        words = ["--preset", preset, "--optim.name", optimizer, "--loop.log_every", "1", "--out", str(run)]
        with log.open("w") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "kalmagrove", "train", *data_flags, *words], stdout=output, stderr=output
            )
            try:
                metrics = run / "metrics.jsonl"
                while not (metrics.exists() and metrics.stat().st_size):
                    if process.poll() is not None:
                        raise SystemExit(f"the training ended:\n{log.read_text()[-3000:]}")
                    time.sleep(0.002)
                return time.perf_counter() - started
            finally:
                process.kill()
                process.wait()


def measure_start(presets: list[str], data_flags: list[str], rounds: int) -> list[dict[str, Any]]:
    """Seconds of every stage and of every preset's start, in turns; a first round fills the file cache."""
    seconds: dict[str, list[float]] = {name: [] for name in STAGES}
    seconds |= {f"{TRAINING}, {preset}": [] for preset in presets}
    for number in range(rounds + 1):
        times = {name: seconds_of(program) for name, program in STAGES.items()}
        times |= {f"{TRAINING}, {preset}": seconds_to_first_step(preset, data_flags) for preset in presets}
        if number:
            for name, own in times.items():
                seconds[name].append(own)
    return [{"stage": name, "seconds": own} for name, own in seconds.items()]


def show_start(rows: list[dict[str, Any]]) -> None:
    """Prints medians, with the quickest beside them."""
    for row in rows:
        print(f"{row['stage']:<50}{statistics.median(row['seconds']):>7.2f} s{min(row['seconds']):>9.2f} s at best")
