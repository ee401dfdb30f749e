"""The verdict is one plain sentence that says what is known, and no more."""

from collections.abc import Callable
from typing import Any

import pytest

from kalmagrove.report.results import Results
from kalmagrove.report.verdict import Verdict, verdict

Make = Callable[..., dict[str, Any]]


def judge(record: dict[str, Any]) -> Verdict:
    return verdict(Results.from_dict(record))


def diverge(record: dict[str, Any], name: str, *seeds: int) -> None:
    model = next(model for model in record["models"] if model["name"] == name)
    for seed in seeds:
        model["runs"][seed] |= {"diverged": True, "valid": None, "test": None}


def test_one_seed_is_said_to_be_lower_and_decides_nothing(make_results: Make) -> None:
    record = make_results(ours=(26.4,), llama=(30.0,))
    assert judge(record) == Verdict(
        "ours reached a test perplexity 12 % lower than llama with 0.50x its parameters and 0.60x its time a step "
        "(1 seed: no interval, so a small difference may be chance; learning rates not tuned; screening: 5.0 tokens a "
        "parameter).",
        "undecided",
    )
    record["trials"], record["budget"]["tokens"] = 3, 40_000
    assert judge(record).tone == "undecided"


def test_kalmagrove_without_its_controls_is_said_to_have_more_than_grove_and_arnold(make_results: Make) -> None:
    record = make_results(others={"slim": (29.0,)})
    models = {model["name"]: model for model in record["models"]}
    models["ours"]["preset"] = "kalmagrove-mini"
    assert "tell them apart" not in judge(record).sentence
    record["models"] = [models["llama"], models["ours"]]
    assert "optimiser and cheap tricks are in it: slim and llama-plus tell them apart" in judge(record).sentence


def test_a_worse_candidate_is_called_worse(make_results: Make) -> None:
    found = judge(make_results(ours=(33.0,), llama=(30.0,), time_ratios=(1.2,)))
    assert found.sentence.startswith(
        "ours did worse than llama: its test perplexity is 10 % higher, with 0.50x its parameters and 1.20x its time"
    )
    assert found.tone == "worse"


def test_a_worse_but_cheaper_candidate_is_mixed(make_results: Make) -> None:
    assert judge(make_results(ours=(33.0,), llama=(30.0,))).tone == "mixed"


def test_a_better_but_slower_candidate_is_mixed(make_results: Make) -> None:
    found = judge(make_results(ours=(27.0,), llama=(30.0,), time_ratios=(1.3,)))
    assert "10 % lower than llama with 0.50x its parameters and 1.30x its time a step" in found.sentence
    assert found.tone == "mixed"


def test_a_small_change_of_one_seed_is_not_claimed(make_results: Make) -> None:
    found = judge(make_results(ours=(29.85,), llama=(30.0,)))
    assert found.sentence.startswith("ours reached about the test perplexity of llama, 0.5 % lower, with 0.50x")
    assert found.tone == "undecided"


def test_three_seeds_that_agree_are_claimed_with_their_interval(make_results: Make) -> None:
    found = judge(make_results(ours=(27.0, 27.2, 27.1), llama=(30.0, 30.1, 30.2)))
    assert found.sentence.startswith("ours reached a test perplexity 10 % lower than llama")
    assert "(3 seeds: 95 % interval of the ratio 0.893 to 0.908; learning rates" in found.sentence
    assert "no interval" not in found.sentence
    assert found.tone == "better"


def test_three_seeds_that_disagree_are_a_tie_even_with_a_lower_mean(make_results: Make) -> None:
    found = judge(make_results(ours=(24.0, 31.0, 28.0), llama=(30.0,) * 3))
    assert found.sentence.startswith("ours and llama are a tie within the interval of their test perplexity with 0.50x")
    assert "lower" not in found.sentence
    assert found.tone == "undecided"


def test_three_seeds_that_are_all_a_little_higher_are_worse(make_results: Make) -> None:
    found = judge(make_results(ours=(30.15, 30.16, 30.15), llama=(30.0,) * 3))
    assert "its test perplexity is 0.5 % higher" in found.sentence


def test_long_training_is_no_screening(make_results: Make) -> None:
    record = make_results()
    record["budget"]["tokens"] = 40_000
    assert "screening" not in judge(record).sentence


def test_without_paired_times_only_parameters_are_named(make_results: Make) -> None:
    sentence = judge(make_results() | {"paired_time": []}).sentence
    assert "with 0.50x its parameters (1 seed" in sentence
    assert "time a step" not in sentence


def test_nothing_finished_is_no_verdict(make_results: Make) -> None:
    assert judge(make_results(ours=(None,), llama=(30.0,))) == Verdict(
        "Not finished, so there is no verdict yet: 0 of 1 of ours and 1 of 1 of llama runs are done.", "undecided"
    )


def test_seeds_that_are_missing_are_said(make_results: Make) -> None:
    assert "not finished: 1 of 2 seeds so far" in judge(make_results(ours=(27.0, None), llama=(30.0, 30.0))).sentence


def test_a_candidate_that_diverged_is_worse(make_results: Make) -> None:
    record = make_results()
    diverge(record, "ours", 0)
    assert judge(record) == Verdict(
        "ours diverged, so there is nothing to compare; llama reached a test perplexity of 30.00.", "worse"
    )


def test_a_baseline_that_diverged_is_no_victory(make_results: Make) -> None:
    record = make_results()
    diverge(record, "llama", 0)
    assert judge(record) == Verdict(
        "llama diverged, so there is nothing to compare; ours reached a test perplexity of 27.00.", "undecided"
    )


def test_some_diverged_seeds_are_said_and_keep_the_verdict_from_better(make_results: Make) -> None:
    record = make_results(ours=(27.0, 27.0, 27.0), llama=(30.0, 30.0, 30.0))
    diverge(record, "ours", 1)
    found = judge(record)
    assert found.sentence.endswith("; ours diverged in 1 of 3 runs, which the numbers leave out.")
    assert found.tone == "mixed"


def test_the_best_of_the_other_models_is_named_when_it_did_better(make_results: Make) -> None:
    record = make_results(ours=(27.0,), others={"slim": (24.3,), "plus": (25.0,)})
    assert judge(record).sentence.endswith("; slim did better than ours: 10 % lower.")


@pytest.mark.parametrize("slim", [(28.0, 28.1, 28.2), (26.0, 28.0, 26.5)])
def test_other_models_that_did_not_do_better_are_not_named(make_results: Make, slim: tuple[float, ...]) -> None:
    record = make_results(ours=(27.0, 27.0, 27.0), llama=(30.0,) * 3, others={"slim": slim})
    assert "slim" not in judge(record).sentence


def test_of_one_seed_another_model_that_is_hardly_lower_is_not_named(make_results: Make) -> None:
    assert "slim" not in judge(make_results(ours=(27.0,), others={"slim": (26.0,)})).sentence
