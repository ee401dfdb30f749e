"""A contestant's side of a race of training loops: it trains when it is told to, and says how long that took.

Imports nothing of this project, so that a contestant may live in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Race:
    """What every contestant trains on, written by the referee as ``race.json``.

    Attributes:
        tokens_file: The training split, little-endian tokens.
        dtype: Of the tokens, as numpy names it.
        starts_file: First tokens of the windows, (steps, batch) as .npy.
        model_folder: A stock Llama folder with the initial weights.
        preset: Of the same model in this project.
        data_folder: The packed text that the tokens are of.
        context_length: Tokens of a sequence.
        batch_size: Sequences of a step.
        steps: Of the whole race.
        steps_a_turn: Steps between two words of the referee.
        log_every: Steps between lines of the log.
        lr: Peak learning rate.
        scratch: A folder for what a loop writes.
    """

    tokens_file: str
    dtype: str
    starts_file: str
    model_folder: str
    preset: str
    data_folder: str
    context_length: int
    batch_size: int
    steps: int
    steps_a_turn: int
    log_every: int
    lr: float
    scratch: str

    def tokens(self) -> np.ndarray:
        """The training split, mapped from the disk."""
        return np.memmap(self.tokens_file, dtype=self.dtype, mode="r")

    def starts(self) -> np.ndarray:
        """First tokens of the windows, (steps, batch)."""
        return np.load(self.starts_file)


class Turns:
    """Waits for the referee between turns, and tells it the seconds of each.

    Args:
        steps_a_turn: Steps of a turn.
        answers: File descriptor that the referee reads.
    """

    def __init__(self, steps_a_turn: int, answers: int) -> None:
        self._steps_a_turn, self._answers = steps_a_turn, answers
        self._steps = 0
        self._first_loss: float | None = None
        self._started = 0.0

    def begin(self) -> None:
        """Called when all is made and the first step is next."""
        self._tell({"ready": True})
        self._wait()

    def first_loss(self, loss: float) -> None:
        """Remembers the loss of the first step, in nats a token; later calls change nothing."""
        self._first_loss = loss if self._first_loss is None else self._first_loss

    def step_ended(self) -> None:
        """Called at the end of each step; returns when the next one may begin."""
        self._steps += 1
        if self._steps % self._steps_a_turn == 0:
            self._tell({"seconds": time.perf_counter() - self._started, "first_loss": self._first_loss})
            self._wait()

    def _tell(self, answer: dict[str, Any]) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # The race is over; the loop has no way to be stopped in the middle.
        self._started = time.perf_counter()


def race_and_turns() -> tuple[Race, Turns]:
    """What the command line of a contestant names: race.json and the descriptor for its answers."""
    race = Race(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    return race, Turns(race.steps_a_turn, int(sys.argv[2]))
