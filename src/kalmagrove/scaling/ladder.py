"""A ladder of runs: model sizes x tokens x ranks x seeds for each family, and the trials of the learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kalmagrove.errors import UsageError
from kalmagrove.models.presets import FAMILIES, preset_options, split_parts
from kalmagrove.quantities import parse_count, parse_list, parse_seeds
from kalmagrove.training.config import (
    BASELINE_FAMILIES,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    TrainConfig,
    default_optimizer,
    is_plain_transformer,
    split_optimizer,
)
from kalmagrove.training.rate_trials import MOST_FURTHER_TRIALS, best_scale, further_trial, trial_scales

_SIZE = re.compile(r"(\d+)x(\d+)")

GROWING_OPTIONS = frozenset(
    {"families", "sizes", "tokens", "rank_ratios", "seeds", "repeated_sizes", "trials", "checked_size"}
)
"""Options that say which runs there are and not what a run is, so that a ladder may get more of them."""


@dataclass(frozen=True)
class Family:
    """Models of one architecture with one optimiser, which share a law.

    Attributes:
        name: As the table of the runs has it.
        preset: The architecture.
        optim: The optimiser.
    """

    name: str
    preset: str
    optim: OptimizerName

    @property
    def is_baseline(self) -> bool:
        """Whether this is a plain Transformer, whatever its optimiser."""
        return is_plain_transformer(self.preset)


@dataclass(frozen=True)
class Rung:
    """One training of the ladder.

    Attributes:
        family: Its family.
        size: Width x layers.
        tokens: Of the whole run, whose schedule is as long.
        rank_ratio: Rank of Grove's factors over the width of attention; 1 is full rank.
        seed: Of weights and batches.
        lr_scale: On every learning rate.
    """

    family: Family
    size: str
    tokens: int
    rank_ratio: float
    seed: int
    lr_scale: float

    @property
    def key(self) -> str:
        """Its folder below the sweep's, and its name."""
        rank = "" if self.rank_ratio == 1 else f"/rank-{self.rank_ratio:g}"
        return f"{self.family.name}/{self.size}/{self.tokens}{rank}/lr-x{self.lr_scale:.4g}/seed-{self.seed}"


@dataclass(frozen=True)
class SweepConfig:
    """A ladder, and how its learning rates are found.

    Every run has a schedule of its own length. The rate is tuned at the smallest sizes and goes to the others by
    ``lr_scale(width) = best x (width / smallest width) ^ -lr_exponent``; at ``checked_size`` its half and its double
    are tried too, and the outcome is reported.

    Attributes:
        data: The text.
        families: Architectures divided by commas, each with its optimiser behind a plus sign (llama+kalma) and parts
            that are put into it (llama+grove+kalma). Without an optimiser: adamw for gpt2 and llama, kalma for the
            others.
        sizes: Width x layers, the smallest first.
        tokens: Lengths of the runs; not more than four times the text, unless repetition is what is asked about.
        rank_ratios: Ranks of the Grove families, as parts of the width of attention; the first is that of every run,
            the others are trained at the largest number of tokens.
        head_dim: Size of a head.
        seeds: Seeds divided by commas.
        repeated_sizes: Sizes, the smallest first, that are trained with every seed; the others with the first alone.
            Left out: all.
        trials: Learning rates that are tried at first, a factor of 2 apart; 1 is none. While the best is at the edge,
            the next one is tried.
        tuned_sizes: Sizes, the smallest first, at which they are tried; the geometric mean of the best is taken.
        lr_exponent: Of the rule above.
        checked_size: Where the rule is checked; left out: the third size, or the largest of fewer.
        loop: Batch, context and everything else but the tokens and the seed.
        weight_decay: Of every family.
        warmup: Of every family; left out is each optimiser's default.
    """

    data: DataConfig = field(default_factory=DataConfig)
    families: str = "llama,kalmagrove"
    sizes: list[str] = field(default_factory=lambda: ["48x2", "80x3", "128x4"])
    tokens: list[str] = field(default_factory=lambda: ["500k", "1m", "2m"])
    rank_ratios: list[float] = field(default_factory=lambda: [1.0])
    head_dim: int = 16
    seeds: str = "0"
    repeated_sizes: int | None = None
    trials: int = 1
    tuned_sizes: int = 1
    lr_exponent: float = 0.0
    checked_size: str | None = None
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(batch_size=8))
    weight_decay: float = 0.1
    warmup: float | None = None

    def __post_init__(self) -> None:
        for size in self.sizes:
            width_and_layers(size)
        if len(set(self.sizes)) < len(self.sizes) or not self.sizes:
            raise UsageError(f"sizes must be different and at least one, got {', '.join(self.sizes) or 'none'}")
        if len({parse_count(text) for text in self.tokens}) < len(self.tokens) or not self.tokens:
            raise UsageError(f"tokens must be different and at least one, got {', '.join(self.tokens) or 'none'}")
        for text in self.tokens:
            replace(self.loop, tokens=text)
        for ratio in self.rank_ratios:
            if not 0 < ratio <= 1:
                raise UsageError(f"rank_ratios must be above 0 and at most 1, got {ratio:g}")
        if not self.rank_ratios or len(set(self.rank_ratios)) < len(self.rank_ratios):
            raise UsageError("rank_ratios must be different and at least one")
        for name, low, high in (
            ("trials", 1, 99),
            ("tuned_sizes", 1, len(self.sizes)),
            ("repeated_sizes", 0, len(self.sizes)),
            ("head_dim", 1, 1024),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} must be between {low} and {high}, got {value}")
        if self.checked_size is not None and self.checked_size not in self.sizes:
            raise UsageError(f"checked_size {self.checked_size} is not among the sizes {', '.join(self.sizes)}")
        self.family_list()
        self.seed_list()

    def family_list(self) -> list[Family]:
        """The families in their order.

        Raises:
            UsageError: An architecture or optimiser is unknown, or a family comes twice.
        """
        families = [_family(item) for item in parse_list(self.families)]
        presets = [family.preset for family in families]
        # One optimiser for an architecture needs no mention.
        named = [f if presets.count(f.preset) > 1 else replace(f, name=f.preset) for f in families]
        if not named or len({family.name for family in named}) < len(named):
            raise UsageError(f"families must be different and at least one, got {self.families!r}")
        return named

    def seed_list(self) -> list[int]:
        """The seeds.

        Raises:
            UsageError: One is not a whole number, or comes twice.
        """
        return parse_seeds(self.seeds)

    @property
    def token_counts(self) -> list[int]:
        """Tokens that the runs of each length read: whole steps."""
        step = self.loop.tokens_per_step
        return [parse_count(text) // step * step for text in self.tokens]

    @property
    def checked(self) -> str:
        """The size at which the transfer of the learning rate is checked."""
        return self.checked_size or self.sizes[min(2, len(self.sizes) - 1)]

    def scales(self) -> list[float]:
        """Factors on the learning rates that are tried: powers of two around one."""
        return trial_scales(self.trials)

    def transferred(self, best: float, size: str) -> float:
        """The factor at a size, from the best one at the smallest."""
        smallest, width = width_and_layers(self.sizes[0])[0], width_and_layers(size)[0]
        return best * (width / smallest) ** -self.lr_exponent

    def train_config(self, rung: Rung) -> TrainConfig:
        """The training run of a rung."""
        return TrainConfig(
            data=self.data,
            model=self.model(rung),
            optim=OptimConfig(
                name=rung.family.optim, lr_scale=rung.lr_scale, weight_decay=self.weight_decay, warmup=self.warmup
            ),
            loop=replace(self.loop, seed=rung.seed, tokens=rung.tokens),
        )

    def model(self, rung: Rung) -> ModelConfig:
        """The model of a rung."""
        width, layers = width_and_layers(rung.size)
        size: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "head_dim": self.head_dim}
        options = preset_options(rung.family.preset, size)
        if split_parts(rung.family.preset)[0] in BASELINE_FAMILIES:
            # Their heads fill the width.
            size["head_dim"] = width // max(1, width // self.head_dim)
        if rung.rank_ratio < 1:
            attention_width = options["num_attention_heads"] * options["head_dim"]
            size["rank"] = max(1, round(rung.rank_ratio * attention_width))
        return ModelConfig(preset=rung.family.preset, **size)


def width_and_layers(size: str) -> tuple[int, int]:
    """Width and layers of a size such as 128x4.

    Raises:
        UsageError: It is not one.
    """
    match = _SIZE.fullmatch(size)
    if match is None or not int(match[1]) or not int(match[2]):
        raise UsageError(f"size {size!r} is not width x layers; write for example 128x4")
    return int(match[1]), int(match[2])


def _family(text: str) -> Family:
    preset, optim = split_optimizer(text)
    family = split_parts(preset)[0]
    if family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}; families: {', '.join(FAMILIES)}")
    chosen = optim or default_optimizer(family)
    return Family(f"{preset}+{chosen}", preset, chosen)


def is_grove(family: Family) -> bool:
    """Whether the family's matrices have a rank."""
    return preset_options(family.preset).get("projections") == "grove"


def trials(config: SweepConfig, losses: Mapping[str, float] | None = None) -> list[Rung]:
    """The runs that the learning rates are chosen by: the first seed, the middle length.

    Args:
        config: The ladder.
        losses: Validation losses by the keys of finished runs: while the best of a family and size is the largest or
            the smallest rate that was tried, the next one is tried too.
    """
    if config.trials == 1:
        return []
    return [
        trial
        for family in config.family_list()
        for size in config.sizes[: config.tuned_sizes]
        for trial in _trials_of(config, family, size, losses or {}).values()
    ]


def _trials_of(config: SweepConfig, family: Family, size: str, losses: Mapping[str, float]) -> dict[float, Rung]:
    """The trials of a family at a size by their factors, the smallest first."""
    tokens, seed = config.token_counts[len(config.tokens) // 2], config.seed_list()[0]

    def trial(scale: float) -> Rung:
        return Rung(family, size, tokens, config.rank_ratios[0], seed, config.transferred(scale, size))

    tried = {scale: trial(scale) for scale in config.scales()}
    for _ in range(MOST_FURTHER_TRIALS):
        if any(rung.key not in losses for rung in tried.values()):
            break
        further = further_trial({scale: losses[rung.key] for scale, rung in tried.items()})
        if further is None:
            break
        tried[further] = trial(further)
    return dict(sorted(tried.items()))


def best_scales(config: SweepConfig, losses: Mapping[str, float]) -> dict[str, float]:
    """The chosen factor of each family whose trials are all done: at the smallest size.

    Args:
        config: The ladder.
        losses: Validation losses by the keys of finished runs; a run that diverged has infinity.
    """
    if config.trials == 1:
        return {family.name: 1.0 for family in config.family_list()}
    chosen = {}
    for family in config.family_list():
        by_size = [_trials_of(config, family, size, losses) for size in config.sizes[: config.tuned_sizes]]
        if any(rung.key not in losses for tried in by_size for rung in tried.values()):
            continue
        best = [math.log2(best_scale({scale: losses[rung.key] for scale, rung in tried.items()})) for tried in by_size]
        chosen[family.name] = 2.0 ** (sum(best) / len(best))
    return chosen


def rungs(config: SweepConfig, best: Mapping[str, float]) -> list[Rung]:
    """The runs that the laws are fitted to, of each family whose learning rate is chosen."""
    return [rung for family in config.family_list() if family.name in best for rung in _rungs(config, family, best)]


def _rungs(config: SweepConfig, family: Family, best: Mapping[str, float]) -> Iterator[Rung]:
    repeated = len(config.sizes) if config.repeated_sizes is None else config.repeated_sizes
    for place, size in enumerate(config.sizes):
        scale = config.transferred(best[family.name], size)
        for seed in config.seed_list()[: None if place < repeated else 1]:
            for tokens in config.token_counts:
                yield Rung(family, size, tokens, config.rank_ratios[0], seed, scale)
            for ratio in config.rank_ratios[1:] if is_grove(family) else []:
                yield Rung(family, size, max(config.token_counts), ratio, seed, scale)


def checks(config: SweepConfig, best: Mapping[str, float]) -> list[Rung]:
    """Half and double of the transferred learning rate, at one larger size; none where nothing was tuned."""
    if config.trials == 1 or config.checked in config.sizes[: config.tuned_sizes]:
        return []
    tokens, seed = config.token_counts[len(config.tokens) // 2], config.seed_list()[0]
    return [
        Rung(family, config.checked, tokens, config.rank_ratios[0], seed, factor * scale)
        for family in config.family_list()
        if family.name in best
        for scale in [config.transferred(best[family.name], config.checked)]
        for factor in (0.5, 2.0)
    ]


def all_runs(config: SweepConfig, losses: Mapping[str, float]) -> list[Rung]:
    """Every different run that is known by now; those after the tuning follow from its losses."""
    return _different_runs(config, best_scales(config, losses), losses)


def planned_runs(config: SweepConfig, losses: Mapping[str, float]) -> list[Rung]:
    """Every run; those that wait for the tuning stand at the rates as they would be without it."""
    best = {family.name: 1.0 for family in config.family_list()} | best_scales(config, losses)
    return _different_runs(config, best, losses)


def _different_runs(config: SweepConfig, best: Mapping[str, float], losses: Mapping[str, float]) -> list[Rung]:
    runs = [*trials(config, losses), *rungs(config, best), *checks(config, best)]
    return list({rung.key: rung for rung in runs}.values())
