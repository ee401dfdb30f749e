"""The model of one checkpoint of a run, as a folder like the one that the run leaves at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import save_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import replace_folder, temporary_name
from kalmagrove.models.convert import save_model
from kalmagrove.training.checkpoint import checkpoint_path, load_checkpoint, named_steps
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.run_folder import RunFolder


def export_checkpoint(run: Path, which: str, folder: Path, *, open_data: Callable[[DataConfig], PackedText]) -> int:
    """Writes the model of a checkpoint.

    Args:
        run: A run folder; it is only read.
        which: A step, "last", or "best": the lowest validation loss among the checkpoints that are there.
        folder: Must not exist, or be empty.
        open_data: Gives the run's text, which has the tokeniser.

    Returns:
        The checkpoint's step.

    Raises:
        UsageError: There is no such checkpoint, or the folder is in use.
        KalmaGroveError: The run or the checkpoint cannot be read.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty; choose another --out")
    source = RunFolder(run)
    step = _chosen_step(source, which)
    config = read_config(source)
    # The run's own device may not be here.
    config = replace(config, loop=replace(config.loop, device="cpu", compile=False))
    data = open_data(config.data)
    trained = TrainingRun(config, data)
    trained.restore(load_checkpoint(checkpoint_path(source.checkpoints_path, step)))
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model(trained.model, temporary)
        save_tokenizer(data.load_tokenizer(), temporary, context_length=config.loop.context_length)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return step


def read_config(run: RunFolder) -> TrainConfig:
    """The configuration that a run was started with.

    Raises:
        KalmaGroveError: The folder is no training run's.
    """
    try:
        options: dict[str, Any] = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
        parts = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "loop": LoopConfig}
        return TrainConfig(**{name: kind(**options[name]) for name, kind in parts.items()})
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise KalmaGroveError(f"{run.path} is not the folder of a training run; give one") from error


def _chosen_step(run: RunFolder, which: str) -> int:
    steps = named_steps(run.checkpoints_path)
    if not steps:
        raise UsageError(f"{run.path} holds no checkpoint; give the folder of a training run")
    listed = ", ".join(map(str, steps))
    if which == "last":
        return steps[-1]
    if which == "best":
        losses = {record["step"]: record["valid_loss"] for record in run.read_metrics() if record.get("valid_loss")}
        scored = [step for step in steps if step in losses]
        if not scored:
            raise UsageError(f"no checkpoint of {run.path} was evaluated; give a step: {listed}")
        return min(scored, key=losses.__getitem__)
    if not which.isdecimal() or int(which) not in steps:
        raise UsageError(f"--checkpoint must be last, best or one of the steps {listed}, got {which!r}")
    return int(which)
