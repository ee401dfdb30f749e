"""What ``kalmagrove compare`` compares, and on what terms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from kalmagrove.errors import UsageError
from kalmagrove.models.presets import FAMILIES, SIZES, split_preset
from kalmagrove.quantities import parse_count, parse_duration, parse_list, parse_seeds
from kalmagrove.training.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    TrainConfig,
    default_optimizer,
    split_optimizer,
)
from kalmagrove.training.rate_trials import trial_scales


@dataclass(frozen=True)
class Contestant:
    """One model with its optimiser.

    Attributes:
        name: Unique in the comparison; also its folder.
        preset: Family and size.
        optim: Optimiser.
    """

    name: str
    preset: str
    optim: OptimizerName

    @property
    def family(self) -> str:
        """The preset's family."""
        return split_preset(self.preset)[0]


class Rates(NamedTuple):
    """Factors on the usual learning rates.

    Attributes:
        scale: On all of them.
        auxiliary: On that of embeddings, head and vectors besides.
    """

    scale: float = 1.0
    auxiliary: float = 1.0


USUAL_RATES = Rates()


@dataclass(frozen=True)
class CompareConfig:
    """A fair comparison: the same tokens in the same order, the same number of trials for every side.

    Attributes:
        data: The text.
        models: Presets, divided by commas; a family alone has the size below. Behind plus signs stand parts that are
            put into it and its optimiser: llama+grove, llama+arnold, llama+grove+kalma.
        optim: Optimisers, one for each model, divided by commas; one alone is for all that name none. Left out: adamw
            for gpt2 and llama, kalma for the others.
        size: Size of the families that are named without one.
        seeds: Seeds, divided by commas; three or more give an interval.
        trials: Learning-rate trials for each side, a factor 2 apart, judged on the validation split. While a side's
            best is at the edge of what was tried, the next one is tried too, unless a budget limits the time.
        trial_tokens: Training tokens of a trial, whose schedule is as long; left out: those of the final runs.
        trial_margin: Nats by which the rates at both ends of a side's trials must be worse than its best; above 0 the
            trials also show over which span of rates a model trains.
        recheck: Whether every side is trained beside its rate too, with the first seed and as long as the final runs:
            at half of it, and at double where half is not better, until the best lies inside, at most four more.
        tune_auxiliary: Whether the rate of embeddings, head and vectors is tuned too, once the other is chosen: at a
            quarter of it, and at four times where a quarter is not better, until the best lies inside.
        budget: Size the run by time instead of by loop.tokens, e.g. 10m for everything together.
        loop: Length and portions; its seed is replaced by each of the seeds.
        weight_decay: Of every side.
        warmup: Of every side; left out is each optimiser's default.
    """

    data: DataConfig = field(default_factory=DataConfig)
    models: str = "llama,kalmagrove"
    optim: str | None = None
    size: str = "mini"
    seeds: str = "0"
    trials: int = 1
    trial_tokens: int | float | str | None = None
    trial_margin: float = 0.0
    recheck: bool = False
    tune_auxiliary: bool = False
    budget: str | None = None
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_every=1))
    weight_decay: float = 0.1
    warmup: float | None = None

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UsageError(f"trials must be at least 1, got {self.trials}")
        if self.trial_tokens is not None:
            self._check_trial_tokens(self.trial_tokens)
        if not 0 <= self.trial_margin < math.inf:
            raise UsageError(f"trial_margin must be a finite number of nats, 0 or more, got {self.trial_margin}")
        if self.trial_margin > 0 and (self.trials == 1 or self.budget is not None):
            raise UsageError("trial_margin is for several trials without a budget; give trials, or leave it out")
        if self.tune_auxiliary and self.trials == 1 and not self.recheck and self.budget is None:
            raise UsageError("tune_auxiliary comes after the rate that is common to all; give trials or recheck too")
        if self.budget is not None:
            parse_duration(self.budget)
            if self.recheck:
                raise UsageError("recheck takes as long as it takes; leave it or the budget out")
            if self.tune_auxiliary:
                raise UsageError("tune_auxiliary takes as long as it takes; leave it or the budget out")
        self.contestants()
        self.seed_list()

    def _check_trial_tokens(self, tokens: int | float | str) -> None:
        if self.trials == 1 or self.budget is not None:
            raise UsageError("trial_tokens is for several trials without a budget; give trials, or leave it out")
        replace(self.loop, tokens=tokens)
        if parse_count(tokens) > parse_count(self.loop.tokens):
            raise UsageError(f"trial_tokens {tokens} are more than the final runs' loop.tokens {self.loop.tokens}")

    def contestants(self) -> list[Contestant]:
        """The models with their optimisers.

        Raises:
            UsageError: Fewer than two, an unknown preset, size or optimiser, or the numbers do not match.
        """
        if self.size not in SIZES:
            raise UsageError(f"unknown size {self.size!r}; sizes: {', '.join(SIZES)}")
        named = [split_optimizer(item) for item in parse_list(self.models)]
        presets = [_with_size(preset, self.size) for preset, _ in named]
        if len(presets) < 2:
            raise UsageError(f"models needs at least two presets divided by commas, got {self.models!r}")
        optims = self._optimizers(presets, [optim for _, optim in named])
        names = [
            preset if presets.count(preset) == 1 else f"{preset}+{o}" for preset, o in zip(presets, optims, strict=True)
        ]
        if len(set(names)) < len(names):
            raise UsageError(f"models {self.models!r} names the same preset and optimiser twice")
        return [Contestant(*parts) for parts in zip(names, presets, optims, strict=True)]

    def _optimizers(self, presets: list[str], own: list[OptimizerName | None]) -> list[OptimizerName]:
        """The optimiser of each model: its own, else of the list, else the family's usual one."""
        families = [split_preset(preset)[0] for preset in presets]
        usual = [named or default_optimizer(family) for named, family in zip(own, families, strict=True)]
        if self.optim is None:
            return usual
        given = parse_list(self.optim)
        chosen: list[OptimizerName] = [known for name in given for known in get_args(OptimizerName) if known == name]
        if len(chosen) != len(given):
            unknown = next(name for name in given if name not in get_args(OptimizerName))
            raise UsageError(f"unknown optimiser {unknown!r}; use {', '.join(get_args(OptimizerName))}")
        if len(chosen) == 1:
            return [named or chosen[0] for named in own]
        if any(own):
            raise UsageError("models name their optimisers, so optim may name one for the others but no list")
        if len(chosen) != len(presets):
            raise UsageError(
                f"optim names {len(chosen)} optimisers for {len(presets)} models; give one, or one for each"
            )
        return chosen

    def seed_list(self) -> list[int]:
        """The seeds.

        Raises:
            UsageError: One is not a whole number, or comes twice.
        """
        return parse_seeds(self.seeds)

    def trial_steps(self, final_steps: int) -> int:
        """Steps of a trial."""
        return final_steps if self.trial_tokens is None else parse_count(self.trial_tokens) // self.loop.tokens_per_step

    def scales(self) -> list[float]:
        """Factors on the learning rates that are tried: powers of two around one."""
        return trial_scales(self.trials)

    def train_config(self, contestant: Contestant, *, rates: Rates = USUAL_RATES, seed: int, steps: int) -> TrainConfig:
        """The training run of one contestant."""
        return TrainConfig(
            data=self.data,
            model=ModelConfig(preset=contestant.preset),
            optim=OptimConfig(
                name=contestant.optim,
                lr_scale=rates.scale,
                auxiliary_lr=rates.auxiliary * OptimConfig.auxiliary_lr,
                weight_decay=self.weight_decay,
                warmup=self.warmup,
            ),
            # Paired times need every step.
            loop=replace(self.loop, seed=seed, tokens=steps * self.loop.tokens_per_step, log_every=1),
        )


def check_workers(workers: int, config: CompareConfig, processes: int) -> None:
    """Whether so many workers can do a comparison.

    Raises:
        UsageError: They cannot.
    """
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    if workers == 1:
        return
    if processes > 1:
        raise UsageError("--workers train a run each, and --nproc or torchrun all of them together; choose one")
    if config.budget is not None:
        raise UsageError("a budget counts steps that take turns; leave out --workers, or give --tokens")
    if config.loop.grow_rank:
        raise UsageError("ranks that grow change the time of a step on the way; leave out --workers or grow_rank")


def _with_size(preset: str, size: str) -> str:
    family, *parts = preset.split("+")
    return "+".join([f"{family}-{size}" if family in FAMILIES else family, *parts])
