"""Peak memory of training one model, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from queue import Empty
from typing import Any

from kalmagrove.training.config import TrainConfig

STEPS = 2
TIMEOUT = 300.0


def measure_training_memory(config: TrainConfig, data_folder: Path) -> int | None:
    """Bytes that training adds to a process: weights, gradients, optimiser state, activations and work space.

    Args:
        config: The run; a few of its steps are done and thrown away.
        data_folder: Its packed text.

    Returns:
        The peak after a few steps less the memory before the model was built; None where it cannot be measured.
    """
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_measure, args=(config, data_folder, answers))
    process.start()
    answer: int | None = None
    deadline = time.monotonic() + TIMEOUT
    # A process that was killed for its memory never answers.
    while answer is None and time.monotonic() < deadline:
        alive = process.is_alive()
        try:
            answer = answers.get(timeout=0.2)
        except Empty:
            if not alive:
                break
    process.join(timeout=5)
    if process.is_alive():
        process.kill()
    return answer


def _measure(config: TrainConfig, data_folder: Path, answers: Any) -> None:
    from kalmagrove.data.training_data import open_training_data
    from kalmagrove.precision import choose_device
    from kalmagrove.training.environment import peak_memory_bytes, reset_peak_memory
    from kalmagrove.training.run import TrainingRun

    data = open_training_data(data_folder, verify=False)
    device = choose_device(config.loop.device)
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    run = TrainingRun(config, data)
    for _ in range(STEPS):
        run.train_step()
    answers.put(max(0, peak_memory_bytes(device) - before))
