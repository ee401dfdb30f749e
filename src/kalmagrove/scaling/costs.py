"""What a ladder costs before it is trained: parameters and FLOPs of every run, and hours from measured steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kalmagrove.data.packing import PackedText
from kalmagrove.models.accounting import build_empty, count_parameters, training_flops_per_token
from kalmagrove.models.build import model_config
from kalmagrove.report.table import format_count
from kalmagrove.scaling.ladder import Rung, SweepConfig
from kalmagrove.training.config import ModelConfig
from kalmagrove.training.run import TrainingRun

WARMUP_STEPS, MEASURED_STEPS = 2, 10
"""One of Kalma's refreshes falls into any ten steps."""


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        parameters: Different ones; a shared one counts once.
        non_embedding: Without embeddings.
        flops_per_token: Of forward and backward.
    """

    parameters: int
    non_embedding: int
    flops_per_token: float


@dataclass(frozen=True)
class RungCost:
    """What one run costs.

    Attributes:
        rung: The run.
        model: Its model.
    """

    rung: Rung
    model: ModelCost

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.model.flops_per_token * self.rung.tokens


@dataclass(frozen=True)
class TimedCost(RungCost):
    """What one run costs where it is known how fast it is.

    Attributes:
        seconds: Time of its steps on one worker.
    """

    seconds: float


def model_cost(model: ModelConfig, vocab_size: int, context_length: int) -> ModelCost:
    """Counts a model without memory for its weights.

    Raises:
        UsageError: Its options do not fit together.
    """
    return _counted(model.preset, tuple(sorted(model.overrides().items())), vocab_size, context_length)


@lru_cache(maxsize=4096)
def _counted(preset: str, overrides: tuple[tuple[str, int], ...], vocab_size: int, context_length: int) -> ModelCost:
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": context_length}
    config = model_config(preset, sizes | dict(overrides))
    parameters = count_parameters(build_empty(config))
    flops = training_flops_per_token(config, context_length)
    return ModelCost(parameters.total, parameters.non_embedding, flops)


def rung_cost(config: SweepConfig, rung: Rung, vocab_size: int) -> RungCost:
    """The cost of a run."""
    return RungCost(rung, model_cost(config.model(rung), vocab_size, config.loop.context_length))


def ladder_costs(
    config: SweepConfig,
    runs: Sequence[Rung],
    data: PackedText,
    *,
    flops_per_second: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[TimedCost]:
    """The cost of each run.

    Args:
        config: The ladder.
        runs: Of it.
        data: Its text.
        flops_per_second: Of one worker; None measures a few steps of every model here.
        say: Told what is being measured.
    """
    speeds: dict[tuple[str, str, float], float] = {}
    costs = []
    for rung in runs:
        cost = rung_cost(config, rung, data.vocab_size)
        model = (rung.family.name, rung.size, rung.rank_ratio)
        if model not in speeds:
            if flops_per_second is None:
                say(f"measuring a few steps of {rung.family.name} {rung.size}")
            speeds[model] = (
                measured_speed(config, rung, data)
                if flops_per_second is None
                else flops_per_second / cost.model.flops_per_token
            )
        costs.append(TimedCost(rung, cost.model, rung.tokens / speeds[model]))
    return costs


def measured_speed(config: SweepConfig, rung: Rung, data: PackedText) -> float:
    """Tokens a second of a model's training steps here."""
    run = TrainingRun(config.train_config(rung), data)
    steps = min(WARMUP_STEPS + MEASURED_STEPS, run.total_steps)
    seconds = [run.train_step().seconds for _ in range(steps)]
    return config.loop.tokens_per_step / statistics.fmean(seconds[min(WARMUP_STEPS, steps - 1) :])


def cost_table(costs: Sequence[TimedCost], *, workers: int) -> str:
    """The costs of a ladder by family and size, as Markdown.

    Args:
        costs: Of every run.
        workers: That train at a time.
    """
    groups: dict[tuple[str, str], list[TimedCost]] = {}
    for cost in costs:
        groups.setdefault((cost.rung.family.name, cost.rung.size), []).append(cost)
    lines = [
        "| family | size | parameters | runs | tokens | FLOPs | hours |",
        "| :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for (family, size), group in groups.items():
        parameters = format_count(group[0].model.parameters)
        lines.append(f"| {family} | {size} | {parameters} | {_sums(group)} |")
    lines.append(f"| all | | | {_sums(costs)} |")
    hours = sum(cost.seconds for cost in costs) / 3600
    longest = max(cost.seconds for cost in costs) / 3600
    lines += ["", f"About {max(hours / workers, longest):,.2f} hours with {workers} workers, without evaluations."]
    return "\n".join(lines)


def _sums(costs: Sequence[TimedCost]) -> str:
    tokens = sum(cost.rung.tokens for cost in costs)
    flops = sum(cost.flops for cost in costs)
    hours = sum(cost.seconds for cost in costs) / 3600
    return f"{len(costs)} | {format_count(tokens)} | {flops:.3g} | {hours:,.2f}"
