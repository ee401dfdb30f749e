"""Our loop beside others that train the same Llama on the same batches; every contestant is a process of its own.

They take turns of a few steps (A, B, C, A, B, C, ...), so that a noisy machine disturbs all alike: between its turns a
contestant sleeps. A ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kalmagrove.data.batches import batch_at
from kalmagrove.data.packing import PackedText
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import save_model
from loop_lab.turns import Race
from paired import median_ratio

OURS = "kalmagrove train"
CONTESTANTS = {
    OURS: ["loop_lab.ours"],
    "transformers.Trainer": ["loop_lab.hugging_face"],
    "plain loop, transformers' Llama": ["loop_lab.plain"],
    "litgpt": ["loop_lab.lit_gpt"],
    "litgpt, compiled": ["loop_lab.lit_gpt", "--compile"],
}
LARGEST_DIFFERENCE = 0.01
"""Nats between the first losses of two contestants that are taken for rounding."""


class Contestant:
    """A training loop in a process of its own, which trains when it is told to."""

    def __init__(self, name: str, python: str, race_file: Path, log: Path) -> None:
        module, *flags = CONTESTANTS[name]
        readable, writable = os.pipe()
        self.name, self._log = name, log
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [python, "-m", module, str(race_file), str(writable), *flags],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writable,),
                env=environment,
                text=True,
            )
        os.close(writable)
        self._answers = os.fdopen(readable)
        self._answer()

    def turn(self) -> dict[str, Any]:
        """Lets it train a turn; its seconds and the loss of its first step."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process, which reads the end of its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()


def write_race(folder: Path, data: PackedText, options: Any) -> tuple[Race, Path]:
    """The initial weights, the places of all batches, and what else the contestants must agree on."""
    steps = (options.rounds + 1) * options.steps_a_turn
    token = data.end_of_text_id
    sizes = {"vocab_size": data.vocab_size, "max_position_embeddings": options.context_length}
    model = build_model(model_config(options.preset, sizes, bos_token_id=token, eos_token_id=token), seed=0)
    save_model(model, folder / "model")
    places = np.arange(data.splits["train"].tokens)
    batch = {"context_length": options.context_length, "batch_size": options.batch_size}
    starts = np.stack([batch_at(places, **batch, seed=0, step=step)[:, 0] for step in range(steps + 1)])
    np.save(folder / "starts.npy", starts)
    tokens = data.tokens("train")
    race = Race(
        tokens_file=str(Path(str(tokens.filename)).resolve()),
        dtype=tokens.dtype.str,
        starts_file=str(folder / "starts.npy"),
        model_folder=str(folder / "model"),
        preset=options.preset,
        data_folder=str(data.folder.resolve()),
        context_length=options.context_length,
        batch_size=options.batch_size,
        steps=steps + 1,
        steps_a_turn=options.steps_a_turn,
        log_every=10,
        lr=1.5e-3,
        scratch=str(folder),
    )
    (folder / "race.json").write_text(json.dumps(asdict(race)), "utf-8")
    return race, folder / "race.json"


def measure_peers(data: PackedText, options: Any) -> list[dict[str, Any]]:
    """Seconds of every contestant's turns; the first turn of each does not count.

    Raises:
        SystemExit: A contestant failed, or its first loss is not ours.
    """
    pythons = {name: sys.executable for name in CONTESTANTS if not name.startswith("litgpt")}
    if options.litgpt_python is not None:
        pythons |= {name: str(options.litgpt_python.absolute()) for name in CONTESTANTS if name.startswith("litgpt")}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        race, race_file = write_race(Path(scratch), data, options)
        contestants = []
        for number, (name, python) in enumerate(pythons.items()):
            contestants.append(Contestant(name, python, race_file, Path(scratch) / f"{number}.log"))
            running.callback(contestants[-1].close)
        first_losses = {one.name: float(one.turn()["first_loss"]) for one in contestants}
        for name, loss in first_losses.items():
            if abs(loss - first_losses[OURS]) > LARGEST_DIFFERENCE:
                raise SystemExit(f"{name} begins with a loss of {loss:.4f}, ours with {first_losses[OURS]:.4f}")
        seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
        for _ in range(options.rounds):
            for one in contestants:
                seconds[one.name].append(float(one.turn()["seconds"]))
    tokens = race.steps_a_turn * race.batch_size * race.context_length
    return [
        {
            "loop": name,
            "first_loss": first_losses[name],
            "seconds": own,
            "tokens_per_second": tokens / statistics.median(own),
            "ours_is_faster": median_ratio(own, seconds[OURS]),
        }
        for name, own in seconds.items()
    ]


def show_peers(rows: list[dict[str, Any]]) -> None:
    """Prints a line a loop."""
    print(f"{'loop':<34}{'first loss':>11}{'tokens/s':>10}{'ours is faster':>16}")
    for row in rows:
        print(
            f"{row['loop']:<34}{row['first_loss']:>11.4f}{row['tokens_per_second']:>10,.0f}"
            f"{row['ours_is_faster']:>15.2f}x"
        )
