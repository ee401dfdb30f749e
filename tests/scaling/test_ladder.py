"""A ladder holds the runs that its configuration names, at the rates that its trials chose."""

import math
from dataclasses import replace
from typing import Any

import pytest

from kalmagrove.errors import UsageError
from kalmagrove.models.accounting import build_empty, count_parameters
from kalmagrove.models.build import model_config
from kalmagrove.scaling.costs import rung_cost
from kalmagrove.scaling.ladder import (
    SweepConfig,
    all_runs,
    best_scales,
    checks,
    planned_runs,
    rungs,
    trials,
)
from kalmagrove.training.config import LoopConfig
from kalmagrove.training.rate_trials import MOST_FURTHER_TRIALS

TUNED = SweepConfig(
    families="llama+adamw,llama+kalma,kalmagrove",
    sizes=["16x1", "32x2", "48x2"],
    tokens=["4k", "8k", "16k"],
    rank_ratios=[1.0, 0.5],
    seeds="0,1",
    repeated_sizes=1,
    trials=3,
    tuned_sizes=2,
    loop=LoopConfig(batch_size=4, context_length=32),
)


def losses_with_best(config: SweepConfig, best: dict[str, dict[str, float]]) -> dict[str, float]:
    """Losses of all trials that come, lowest at the named factor of each family and size."""
    losses: dict[str, float] = {}
    while wanted := [rung for rung in trials(config, losses) if rung.key not in losses]:
        for rung in wanted:
            losses[rung.key] = 3.0 + abs(math.log2(rung.lr_scale / best[rung.family.name][rung.size]))
    return losses


def test_every_run_is_there_once() -> None:
    best = {"llama+adamw": 1.0, "llama+kalma": 1.0, "kalmagrove": 1.0}
    runs = rungs(TUNED, best)
    assert len({rung.key for rung in runs}) == len(runs)
    # (2 seeds at the smallest size, 1 at two others) x 3 lengths; and one other rank of the Grove family.
    assert [sum(rung.family.name == name for rung in runs) for name in best] == [12, 12, 16]
    assert {rung.tokens for rung in runs if rung.rank_ratio < 1} == {max(TUNED.token_counts)}
    assert all(rung.tokens % TUNED.loop.tokens_per_step == 0 for rung in runs)


def test_the_rate_is_the_geometric_mean_of_the_best_at_the_smallest_sizes() -> None:
    best = {
        "llama+adamw": {"16x1": 1.0, "32x2": 2.0},
        "llama+kalma": {"16x1": 0.5, "32x2": 0.5},
        "kalmagrove": {"16x1": 2.0, "32x2": 0.5},
    }
    losses = losses_with_best(TUNED, best)
    chosen = best_scales(TUNED, losses)
    assert chosen == pytest.approx({"llama+adamw": 2**0.5, "llama+kalma": 0.5, "kalmagrove": 1.0})
    assert {round(rung.lr_scale, 6) for rung in checks(TUNED, chosen) if rung.family.name == "llama+kalma"} == {
        0.25,
        1.0,
    }
    assert {rung.size for rung in checks(TUNED, chosen)} == {"48x2"}
    # Without the trials of one family the others go on.
    part = {key: loss for key, loss in losses.items() if not key.startswith("kalmagrove")}
    assert set(best_scales(TUNED, part)) == {"llama+adamw", "llama+kalma"}
    assert all(rung.family.name != "kalmagrove" for rung in rungs(TUNED, best_scales(TUNED, part)))
    assert len(all_runs(TUNED, losses)) <= len(planned_runs(TUNED, {})) + 3 * 12


def test_a_trial_that_diverged_is_not_the_best() -> None:
    losses = dict.fromkeys((rung.key for rung in trials(TUNED)), math.inf)
    losses |= {rung.key: 3.0 for rung in trials(TUNED) if rung.lr_scale == 1}
    assert set(best_scales(TUNED, losses).values()) == {1.0}


@pytest.mark.parametrize("best", [0.125, 4.0, 8.0])
def test_the_search_goes_on_while_the_best_is_at_the_edge(best: float) -> None:
    config = replace(TUNED, families="llama", tuned_sizes=1)
    losses = losses_with_best(config, {"llama": {"16x1": best}})
    assert best_scales(config, losses) == {"llama": best}
    tried = [rung.lr_scale for rung in trials(config, losses)]
    assert tried == sorted(tried) and tried[0] < best < tried[-1]
    # Without the last of them nothing is chosen yet.
    last = max(losses, key=lambda key: abs(math.log2(float(key.split("lr-x")[1].split("/")[0]))))
    assert best_scales(config, {key: loss for key, loss in losses.items() if key != last}) == {}


def test_the_search_ends_where_there_is_no_best() -> None:
    config = replace(TUNED, families="llama", tuned_sizes=1)
    losses = losses_with_best(config, {"llama": {"16x1": 2.0**40}})
    assert best_scales(config, losses) == {"llama": 2.0 ** (1 + MOST_FURTHER_TRIALS)}


def test_the_exponent_lowers_the_rate_of_wide_models() -> None:
    config = SweepConfig(sizes=["16x1", "64x1"], lr_exponent=0.5)
    assert [rung.lr_scale for rung in rungs(config, {"llama": 2.0}) if rung.tokens == config.token_counts[0]] == [2, 1]


def test_the_models_have_the_sizes_and_ranks_that_are_named() -> None:
    best = dict.fromkeys(("llama+adamw", "llama+kalma", "kalmagrove"), 1.0)
    for rung in rungs(TUNED, best):
        model = TUNED.model(rung)
        config = model_config(model.preset, {"vocab_size": 300, "max_position_embeddings": 32} | model.overrides())
        assert (config.hidden_size, config.num_hidden_layers) == tuple(map(int, rung.size.split("x")))
        assert config.rank == (round(config.attention_width / 2) if rung.rank_ratio == 0.5 else None)
        cost = rung_cost(TUNED, rung, 300)
        assert cost.model.parameters == count_parameters(build_empty(config)).total
        assert cost.flops == cost.model.flops_per_token * rung.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ["16"]}, "size '16' is not width x layers"),
        ({"sizes": ["16x0"]}, "size '16x0' is not width x layers"),
        ({"sizes": []}, "sizes must be different and at least one, got none"),
        ({"sizes": ["16x1", "16x1"]}, "sizes must be different"),
        ({"tokens": ["1m", "1000k"]}, "tokens must be different"),
        ({"tokens": ["10"]}, "loop.tokens 10 is less than one batch"),
        ({"tokens": ["many"]}, "'many' is not a number of tokens"),
        ({"families": "bert"}, "unknown family 'bert'"),
        ({"families": "llama+sgd"}, "'sgd' in llama+sgd is neither a part nor an optimiser"),
        ({"families": "llama,llama+adamw"}, "families must be different"),
        ({"families": ""}, "families must be different and at least one"),
        ({"seeds": "0,x"}, "seeds must be different whole numbers"),
        ({"rank_ratios": [2.0]}, "rank_ratios must be above 0 and at most 1, got 2"),
        ({"rank_ratios": []}, "rank_ratios must be different and at least one"),
        ({"trials": 0}, "trials must be between 1 and 99, got 0"),
        ({"tuned_sizes": 4}, "tuned_sizes must be between 1 and 3, got 4"),
        ({"checked_size": "9x9"}, "checked_size 9x9 is not among the sizes"),
    ],
)
def test_a_wrong_ladder_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SweepConfig(**options)
    assert message in str(caught.value)
