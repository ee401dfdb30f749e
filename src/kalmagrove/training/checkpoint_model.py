"""The model of a run as a folder for transformers: at the run's end, or of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import require_free_folder, whole_folder
from kalmagrove.models.convert import save_model
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.training.checkpoint import checkpoint_path, load_checkpoint, named_steps
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.model_card import model_card
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.run_folder import RunFolder


def export_checkpoint(run: Path, which: str, folder: Path, *, open_data: Callable[[DataConfig], TrainingData]) -> int:
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
    require_free_folder(folder)
    source = RunFolder(run)
    step = _chosen_step(source, which)
    config = train_config_of(source)
    # The run's own device may not be here.
    config = replace(config, loop=replace(config.loop, device="cpu", compile=False))
    trained = TrainingRun(config, open_data(config.data))
    trained.restore(load_checkpoint(checkpoint_path(source.checkpoints_path, step)))
    write_trained_model(trained.model, trained, folder)
    return step


def write_trained_model(
    model: KalmaGroveForCausalLM, run: TrainingRun, folder: Path, scores: Mapping[str, Any] | None = None
) -> None:
    """Writes a run's model with its tokeniser and its card; what has the folder's name is replaced.

    Args:
        model: All of the run's model, which the run itself may have in shards.
        run: Gives the tokeniser and the context.
        folder: Of the model.
        scores: By split, for the card; None where it was not scored.

    Raises:
        OSError: The folder cannot be written.
    """
    with whole_folder(folder) as temporary:
        save_model(model, temporary)
        run.data.save_beside_model(temporary, context_length=run.config.loop.context_length)
        (temporary / "README.md").write_text(model_card(run, scores or {}), encoding="utf-8")


def train_config_of(run: RunFolder) -> TrainConfig:
    """The configuration that a run was started with.

    Raises:
        KalmaGroveError: The folder is no training run's, or its configuration cannot be read.
    """
    try:
        options = run.read_config()
        parts = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "loop": LoopConfig}
        return TrainConfig(**{name: kind(**options[name]) for name, kind in parts.items()})
    except (OSError, LookupError, TypeError, ValueError) as error:
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
