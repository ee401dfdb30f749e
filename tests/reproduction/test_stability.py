"""Whether an optimiser is the more stable one: its rates, its spikes and its runs that diverged."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from kalmagrove.report.results import Results
from kalmagrove.reproduction.answers import Answer
from kalmagrove.reproduction.evidence import Evidence, Study
from kalmagrove.reproduction.optimizer_claims import (
    Stability,
    TrainedRates,
    judge_stability,
    stable,
    trained_rates,
)

GOOD = {"ours": (27.0, 27.1, 27.2), "llama": (30.0, 30.1, 30.3)}
WIDE, NARROW = [4.0, 3.05, 3.0, 3.05, 4.0], [4.0, 3.5, 3.0, 3.5, 4.0]
"""Losses of trials a factor of two apart: good ones over a factor of four, and the best alone."""


def stability_in(*studies: Study) -> Answer:
    return stable(Evidence({study.name: study for study in studies}, None, None))


def test_the_width_of_the_rates_that_train(make_results: Callable[..., dict[str, Any]]) -> None:
    record = make_results()
    record["models"][0]["lr_trials"] = [
        {"lr_scale": scale, "valid_loss": loss} for scale, loss in ((0.5, 3.3), (1.0, 3.05), (2.0, 3.0), (4.0, None))
    ]
    model = Results.from_dict(record).models[0]
    assert trained_rates(model, 0.1) == TrainedRates(2.0, is_whole=True)
    # Nothing worse was tried below, so there may be more.
    assert trained_rates(model, 1.0) == TrainedRates(4.0, is_whole=False)
    record["models"][0]["lr_trials"] = [{"lr_scale": 1.0, "valid_loss": 3.0}, {"lr_scale": 2.0, "valid_loss": None}]
    assert trained_rates(Results.from_dict(record).models[0], 0.1) is None


def stability(make_results: Callable[..., dict[str, Any]], ours: list[float], theirs: list[float]) -> Answer:
    """C6 with calm losses, and the validation losses of trials at x0.25 ... for each side."""
    return stability_in(Study("base", Results.from_dict(stability_record(make_results, ours, theirs)), {}))


def stability_record(
    make_results: Callable[..., dict[str, Any]], our_rates: list[float], their_rates: list[float], **options: Any
) -> dict[str, Any]:
    record = make_results(**GOOD | options)
    record["trials"], record["trial_tokens"], record["budget"]["tokens"] = 3, 60_000, 60_000
    for model, losses in zip(record["models"], (their_rates, our_rates), strict=True):
        model["lr_trials"] = [{"lr_scale": 2.0 ** (n - 2), "valid_loss": loss} for n, loss in enumerate(losses)]
        for run in model["runs"]:
            run["spikes"] = 0.0
    text = json.dumps(record).replace('"ours"', '"llama-nano+kalma"').replace('"llama"', '"llama-nano"')
    record = json.loads(text)
    record["models"][1] |= {"preset": "llama-nano", "optim": "kalma"}
    return record


def test_wider_rates_count_where_the_other_side_s_were_seen_to_end(make_results: Callable[..., dict[str, Any]]) -> None:
    assert stability(make_results, WIDE, NARROW).verdict == "supported"
    assert stability(make_results, NARROW, WIDE).verdict == "not supported"
    assert stability(make_results, WIDE, WIDE).verdict == "undecided"
    # AdamW's rates go on where nobody looked.
    assert stability(make_results, WIDE, [4.0, 3.5, 3.04, 3.0]).verdict == "undecided"


@pytest.mark.parametrize("losses", [[4.0, 3.05, 3.0, 3.5, 4.0], [4.0, 3.5, 3.0, 3.05, 4.0]])
def test_one_step_of_the_grid_with_one_seed_is_a_tie(
    losses: list[float], make_results: Callable[..., dict[str, Any]]
) -> None:
    assert stability(make_results, losses, NARROW).verdict == "undecided"
    assert stability(make_results, NARROW, losses).verdict == "undecided"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        # One spike in each run of one side: three against none are what chance gives once in four times.
        (0, 1, "undecided"),
        (0, 2, "supported"),
        (2, 0, "not supported"),
        (4, 5, "undecided"),
    ],
)
def test_spikes_count_where_chance_does_not_explain_them(ours: int, theirs: int, verdict: str) -> None:
    same, seeds = TrainedRates(4.0, is_whole=True), frozenset({0, 1, 2})
    sides = [Stability(dict.fromkeys(seeds, float(n)), seeds, frozenset(), same) for n in (ours, theirs)]
    assert judge_stability(*sides, counted_steps=1000) == verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        # One run of three is what chance gives.
        ((), (0,), "undecided"),
        ((), (0, 1, 2, 3), "supported"),
        ((0, 1, 2, 3), (), "not supported"),
    ],
)
def test_runs_that_diverged_count_where_chance_does_not_explain_them(
    ours: tuple[int, ...], theirs: tuple[int, ...], verdict: str, make_results: Callable[..., dict[str, Any]]
) -> None:
    rates = WIDE
    record = stability_record(make_results, rates, rates, ours=(27.0,) * 4, llama=(30.0,) * 4)
    for model, lost in zip(record["models"], (theirs, ours), strict=True):
        for seed in lost:
            model["runs"][seed].update(diverged=True, valid=None, test=None)
    assert stability_in(Study("base", Results.from_dict(record), {})).verdict == verdict


def test_one_seed_says_nothing_about_stability(make_results: Callable[..., dict[str, Any]]) -> None:
    record = stability_record(make_results, WIDE, NARROW, ours=(27.0,), llama=(30.0,))
    assert stability_in(Study("base", Results.from_dict(record), {})).verdict == "undecided"


def test_stability_is_read_where_most_rates_were_tried(make_results: Callable[..., dict[str, Any]]) -> None:
    record = stability_record(make_results, [3.05, 3.0, 3.05], [3.5, 3.0, 3.5])
    few, many = record, stability_record(make_results, WIDE, NARROW)
    studies = [Study(name, Results.from_dict(r), {}) for name, r in (("base", few), ("optimizers", many))]
    answer = stability_in(*studies)
    assert answer.verdict == "supported" and "in optimizers" in answer.reason
    # A screening decides nothing while there is something else.
    many["budget"]["tokens"] = 10_000
    studies[1] = Study("optimizers", Results.from_dict(many), {})
    assert "in base" in stability_in(*studies).reason
