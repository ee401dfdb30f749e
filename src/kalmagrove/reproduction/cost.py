"""What a plan costs before it is done: runs, tokens and FLOPs of every study."""

from __future__ import annotations

from dataclasses import dataclass

from kalmagrove.comparison.config import CompareConfig
from kalmagrove.data.synthetic.options import is_synthetic
from kalmagrove.data.synthetic.source import synthetic_tokenizer
from kalmagrove.errors import UsageError
from kalmagrove.models.presets import SIZES, split_preset
from kalmagrove.report.table import format_count
from kalmagrove.reproduction.plan import LADDER, STUDIES, Plan
from kalmagrove.scaling.costs import model_cost, rung_cost
from kalmagrove.scaling.ladder import SweepConfig, planned_runs
from kalmagrove.training.config import DataConfig, ModelConfig


@dataclass(frozen=True)
class StudyCost:
    """What one study costs.

    Attributes:
        name: Of the study.
        runs: Trainings, trials among them; more where a best learning rate lies at the edge.
        tokens: Of all of them.
        flops: Of all of them, forward and backward.
    """

    name: str
    runs: int
    tokens: int
    flops: float


def study_costs(plan: Plan) -> list[StudyCost]:
    """The costs of all studies, in their order.

    Raises:
        UsageError: A study has a budget of time, so that its length is not known.
    """
    costs = [_comparison_cost(name, plan.comparisons[name]) for name in plan.names if name != LADDER]
    return [*costs, *([_ladder_cost(plan.ladder)] if plan.ladder is not None else [])]


def _comparison_cost(name: str, config: CompareConfig) -> StudyCost:
    if config.budget is not None:
        raise UsageError(f"{name} has a budget of time, so its FLOPs are not known; give it loop.tokens")
    steps = config.loop.total_steps
    finals, trials = len(config.seed_list()), config.trials if config.trials > 1 else 0
    # The best of trials that are as long as the final runs is one of them.
    repeated = 1 if trials and config.trial_steps(steps) == steps else 0
    # Beside the best rate, at full length.
    rechecked = 2 if config.recheck and not repeated else 0
    # Two beside the usual rate of embeddings, as long as the last trials were.
    auxiliary = 2 if config.tune_auxiliary else 0
    longest = finals - repeated + rechecked + (auxiliary if config.recheck else 0)
    trials += 0 if config.recheck else auxiliary
    of_a_model = (longest * steps + trials * config.trial_steps(steps)) * config.loop.tokens_per_step
    runs = tokens = 0
    flops = 0.0
    for contestant in config.contestants():
        vocab_size = _vocab_size(config.data, contestant.preset)
        cost = model_cost(ModelConfig(preset=contestant.preset), vocab_size, config.loop.context_length)
        runs, tokens = runs + longest + trials, tokens + of_a_model
        flops += cost.flops_per_token * of_a_model
    return StudyCost(name, runs, tokens, flops)


def _ladder_cost(config: SweepConfig) -> StudyCost:
    runs = planned_runs(config, {})
    flops = sum(rung_cost(config, rung, _vocab_size(config.data, "llama")).flops for rung in runs)
    return StudyCost(LADDER, len(runs), sum(rung.tokens for rung in runs), flops)


def _vocab_size(data: DataConfig, preset: str) -> int:
    """As far as it is known without the text: a tokenizer of its own has the preset's."""
    if is_synthetic(data.source):
        return synthetic_tokenizer(data.source).get_vocab_size()
    if data.tokenizer is not None or data.vocab_size is None:
        return SIZES[split_preset(preset)[1]].vocab_size
    return data.vocab_size


def cost_page(costs: list[StudyCost], flops_per_second: float | None) -> str:
    """The costs as Markdown, with hours where a speed is given."""
    hours = "" if flops_per_second is None else " hours |"
    lines = [f"| study | runs | tokens | FLOPs |{hours} what for |"]
    lines.append("| :-- | --: | --: | --: |" + (" --: |" if hours else "") + " :-- |")
    whole = StudyCost("all", sum(c.runs for c in costs), sum(c.tokens for c in costs), sum(c.flops for c in costs))
    for cost in [*costs, whole]:
        time = "" if flops_per_second is None else f" {cost.flops / flops_per_second / 3600:,.1f} |"
        lines.append(
            f"| {cost.name} | {cost.runs} | {format_count(cost.tokens)} | {cost.flops:.2e} |{time} "
            f"{STUDIES.get(cost.name, '')} |"
        )
    return "\n".join(lines)
