"""One training run of the optimiser benchmark: a job, and the record that it leaves."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kalmagrove.comparison.spikes import spikes_in_a_thousand
from kalmagrove.data.packing import PackedText
from kalmagrove.quantities import parse_count
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingDiverged, TrainingRun
from kalmagrove.training.trainer import score_split
from optimizer_lab.methods import Method

CURVE_POINTS = 50


@dataclass(frozen=True)
class Scale:
    """A model and a batch.

    Attributes:
        preset: Of the model.
        model: Options over the preset.
        batch_size: Sequences of 256 tokens a step.
        tokens: Training tokens of a whole run.
    """

    preset: str
    batch_size: int
    tokens: str
    model: dict[str, Any] = field(default_factory=dict)


_TWENTY_MILLION = {
    "hidden_size": 384, "num_hidden_layers": 10, "num_attention_heads": 6, "head_dim": 64, "intermediate_size": 1024,
}  # fmt: skip
_FIVE_MILLION = {"hidden_size": 192, "num_hidden_layers": 10, "num_attention_heads": 6, "intermediate_size": 512}
SCALES = {
    "llama-1.7m-2k": Scale("llama-mini", 8, "2m"),
    "llama-1.7m-16k": Scale("llama-mini", 64, "4m"),
    "llama-5m-2k": Scale("llama-mini", 8, "2m", _FIVE_MILLION),
    "llama-5m-16k": Scale("llama-mini", 64, "4m", _FIVE_MILLION),
    "llama-20m-16k": Scale("llama-mini", 64, "20m", _TWENTY_MILLION),
    "kalmagrove-1m-2k": Scale("kalmagrove-mini", 8, "2m"),
}


@dataclass(frozen=True)
class Job:
    """What one run is.

    Attributes:
        scale: Name of the model and batch.
        method: Name of the optimiser.
        lr: Its peak learning rate.
        seed: Of the start and the order of the data.
        part: Part of the scale's tokens; the schedule ends there.
    """

    scale: str
    method: str
    lr: float
    seed: int = 0
    part: float = 1.0

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.scale}/{self.method}-lr{self.lr:g}-part{self.part:g}-seed{self.seed}"


def train_config(job: Job, method: Method) -> TrainConfig:
    """The run of a job, but for its optimisers."""
    scale = SCALES[job.scale]
    return TrainConfig(
        model=ModelConfig(preset=scale.preset, **scale.model),
        optim=OptimConfig(name="adamw", warmup=method.warmup),
        loop=LoopConfig(tokens=int(parse_count(scale.tokens) * job.part), batch_size=scale.batch_size, seed=job.seed),
    )


def train_job(job: Job, method: Method, data: PackedText) -> dict[str, Any]:
    """Trains and scores one model."""
    config = train_config(job, method)
    run = TrainingRun(config, data)
    run.optimizers = method.build(run.model, job.lr)
    clock = _OptimizerClock(run.optimizers)
    losses, seconds, curve = [], [], []
    every = max(1, run.total_steps // CURVE_POINTS)
    diverged = False
    while not run.done:
        try:
            result = run.train_step()
        except TrainingDiverged:
            diverged = True
            break
        losses.append(result.loss)
        seconds.append(result.seconds)
        if run.step % every == 0:
            curve.append({"step": run.step, "loss": statistics.fmean(losses[-every:])})
    return {
        **asdict(job),
        "steps": run.step,
        "tokens_per_step": config.loop.tokens_per_step,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "diverged": diverged,
        "valid": None if diverged else score_split(run, "valid").loss,
        "test": None if diverged else score_split(run, "test").loss,
        "curve": curve,
        "spikes": spikes_in_a_thousand(losses),
        "step_seconds": statistics.median(seconds[3:] or seconds or [math.nan]),
        # Some steps refresh and take longer: the mean counts them, the median would not.
        "optimizer_seconds": statistics.fmean(clock.seconds[3:] or clock.seconds or [math.nan]),
        "state_bytes": sum(state_bytes(optimizer) for optimizer in run.optimizers),
        "threads": torch.get_num_threads(),
        "data_fingerprint": data.fingerprint,
        "environment": describe_environment(),
    }


class _OptimizerClock:
    """Seconds that the optimisers' steps take together."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.seconds: list[float] = []
        self._last = optimizers[-1]
        self._total = self._started = 0.0
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._start)
            optimizer.register_step_post_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._total += time.perf_counter() - self._started
        if optimizer is self._last:
            self.seconds.append(self._total)
            self._total = 0.0


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of an optimiser's state; some keep tensors in lists."""
    return _tensor_bytes(optimizer.state_dict()["state"])


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_tensor_bytes(part) for part in parts)
