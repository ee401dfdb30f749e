"""A plan finds what the law's own mathematics says, and says where it is outside of what was fitted."""

import copy
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalmagrove.cli import main
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.scaling.advice import advice, markdown_of_advice
from kalmagrove.scaling.claims import scaling_claims
from kalmagrove.scaling.costs import model_cost
from kalmagrove.scaling.figures import _with_size, draw, save_figures
from kalmagrove.scaling.laws import predicted_loss, tokens_for_loss, worth_of_tokens
from kalmagrove.scaling.measuring import model_of
from kalmagrove.scaling.pages import write_pages
from kalmagrove.scaling.plan import best_for_flops, cheapest_for_loss, families_of, read_fit
from kalmagrove.scaling.points import Point, PointTable
from kalmagrove.scaling.report import report_text
from kalmagrove.scaling.summary import summarise

LLAMA = {"E": 1.7, "A": 60.0, "B": 300.0, "alpha": 0.30, "beta": 0.32}
OURS = {"E": 1.6, "A": 400.0, "B": 280.0, "alpha": 0.46, "beta": 0.32}
MODELS: dict[str, Any] = {
    "vocab_size": 512,
    "context_length": 64,
    "tokens_per_step": 512,
    "head_dim": 16,
    "sizes": ["32x2", "64x3", "128x4"],
    "families": {
        "llama": {"preset": "llama", "optim": "adamw"},
        "kalmagrove": {"preset": "kalmagrove", "optim": "kalma"},
    },
}


def points(name: str, law: dict[str, float], ranks: tuple[float, ...] = (1.0,)) -> list[Point]:
    chance = np.random.default_rng(0)
    return [
        Point(
            size,
            tokens,
            predicted_loss(law, size, tokens, rank_ratio=rank) + 0.001 * float(chance.normal()),
            family=name,
            rank_ratio=rank,
            flops=6 * size * tokens,
            seconds=6 * size * tokens / 1e10,
        )
        for size, tokens, rank in product(np.geomspace(1e5, 1e7, 4), np.geomspace(1e6, 1e9, 4), ranks)
    ]


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    table = PointTable((*points("llama", LLAMA), *points("kalmagrove", OURS)), ())
    return summarise(table, resamples=40)


def test_the_best_run_is_the_one_that_the_mathematics_gives(summary: dict[str, Any]) -> None:
    """Of Hoffmann's law with 6 N D FLOPs: N = G (C / 6)^(beta / (alpha + beta)), arXiv:2203.15556, equation 4."""
    llama = families_of(summary)[0]
    law, flops = llama.constants, 1e16
    g = (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / (law["alpha"] + law["beta"]))
    best_size = g * (flops / 6) ** (law["beta"] / (law["alpha"] + law["beta"]))
    answer = best_for_flops(llama, flops)
    assert answer.model.parameters == pytest.approx(best_size, rel=0.25)
    lowest = predicted_loss(law, best_size, flops / 6 / best_size)
    assert lowest <= answer.loss <= lowest + 1e-3
    assert answer.loss_interval[0] <= answer.loss <= answer.loss_interval[1]
    assert answer.tokens * answer.model.flops_per_token == pytest.approx(flops)


def test_the_cheapest_run_for_a_loss_is_the_best_run_for_its_price(summary: dict[str, Any]) -> None:
    for family in families_of(summary):
        there = best_for_flops(family, 1e15)
        back = cheapest_for_loss(family, there.loss)
        assert back is not None and back.flops == pytest.approx(1e15, rel=0.05)
        assert back.flops_interval is not None and back.flops_interval[0] <= back.flops <= back.flops_interval[1]
        assert cheapest_for_loss(family, 0.9 * family.constants["E"]) is None


def test_tokens_for_a_loss_are_those_that_have_it() -> None:
    for law in (LLAMA, {"c": 6000.0, "alpha": 0.1, "beta": 0.2}, LLAMA | {"gamma": 0.2}):
        loss = predicted_loss(law, 1e6, 3e7, rank_ratio=0.5)
        assert tokens_for_loss(law, 1e6, loss, rank_ratio=0.5) == pytest.approx(3e7, rel=1e-6)
    assert tokens_for_loss(LLAMA, 1e6, 1.0) == math.inf


def test_tokens_that_no_number_holds_are_infinite() -> None:
    flat = {"E": 1.2, "A": 50.0, "alpha": 0.3, "B": 3.0, "beta": 0.01}
    assert tokens_for_loss(flat, 1e7, predicted_loss(flat | {"B": 0.0}, 1e7, 1.0) + 1e-3) == math.inf


def test_what_is_outside_the_fitted_runs_is_said(summary: dict[str, Any]) -> None:
    llama = families_of(summary)[0]
    assert best_for_flops(llama, 6 * 1e6 * 3e7).outside == ()
    far = best_for_flops(llama, 1e24)
    assert any("more parameters than the largest fitted run" in line for line in far.outside)
    text = markdown_of_advice(advice(families_of(summary), None, flops=1e24))
    assert "This is an extrapolation" in text and "within the fitted runs" not in text


def test_a_small_text_asks_for_fewer_tokens_of_a_larger_model(summary: dict[str, Any]) -> None:
    llama = families_of(summary)[0]
    without, small = best_for_flops(llama, 1e16), best_for_flops(llama, 1e16, unique_tokens=2e6)
    assert small.model.parameters > without.model.parameters and small.loss > without.loss
    assert worth_of_tokens(4e6, 2e6, 15.4) < 4e6 and worth_of_tokens(1e6, 2e6, 15.4) == 1e6


def test_models_of_a_sweep_are_real_ones(summary: dict[str, Any]) -> None:
    for family in families_of(summary):
        answer = best_for_flops(family, 1e14, MODELS)
        member, model = model_of(answer, MODELS)
        cost = model_cost(model, 512, 64)
        assert (answer.model.parameters, answer.model.flops_per_token) == (cost.parameters, cost.flops_per_token)
        assert member.optim == MODELS["families"][family.name]["optim"]
    found = advice(families_of(summary), MODELS, hours=1.0, devices=2, flops_per_second=1e10)
    for answer in found["families"].values():
        assert answer["hours"] == pytest.approx(1.0) and answer["memory_bytes"] > 0
        assert answer["flops"] == pytest.approx(2 * 3600 * 1e10)


def test_the_flags_of_an_answer_train_its_model(summary: dict[str, Any]) -> None:
    from kalmagrove.commands.parsing import build, parse
    from kalmagrove.commands.train import SHORT, make_train_parser

    found = advice(families_of(summary), MODELS, flops=1e12)
    for answer in found["families"].values():
        parser = make_train_parser()
        options = build(parser, parse(parser, [*answer["flags"].split(), "--out", "x"], SHORT))
        assert model_cost(options.model, 512, 64).parameters == answer["parameters"]


def tuned(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary of runs whose learning rates leave nothing to ask."""
    well = {"trials": [{"size": "48x2"}], "at_the_edge": False, "check": None}
    return summary | {"tuning": [{"family": name} | well for name in summary["families"]]}


def test_the_claims_follow_the_intervals(summary: dict[str, Any]) -> None:
    steeper, same = scaling_claims(tuned(summary))["kalmagrove - llama"]
    assert (steeper.name, steeper.verdict) == ("C10", "supported")
    assert same.verdict != "not supported"
    swapped = summarise(
        PointTable((*points("kalmagrove", OURS), *points("llama", LLAMA)), ()), resamples=40, baselines=["kalmagrove"]
    )
    assert scaling_claims(swapped)["llama - kalmagrove"][0].verdict == "not supported"
    both = summarise(
        PointTable((*points("llama", LLAMA), *points("slim", LLAMA), *points("kalmagrove", OURS)), ()),
        resamples=10,
        baselines=["llama", "slim"],
    )
    assert list(both["differences"]) == ["slim - llama", "kalmagrove - llama", "kalmagrove - slim"]
    with pytest.raises(UsageError, match="there is no family 'gpt2'"):
        summarise(PointTable(tuple(points("llama", LLAMA)), ()), resamples=10, baselines=["llama", "gpt2"])
    of_ranks = points("kalmagrove", OURS | {"gamma": 0.3}, (1.0, 0.5, 0.25))
    ranked = summarise(PointTable(tuple(of_ranks), ()), resamples=20)
    (rank,) = scaling_claims(tuned(ranked))["kalmagrove"]
    assert (rank.name, rank.verdict) == ("C12", "supported")
    assert [axes.get_visible() and axes.axison for axes in draw(ranked).axes].count(True) == 6


def test_families_are_compared_at_the_ranks_and_cells_that_both_have(summary: dict[str, Any]) -> None:
    llama, ours = points("llama", LLAMA), points("kalmagrove", OURS)
    of_ranks = [replace(point, rank_ratio=0.5, loss=point.loss + 0.2) for point in ours[::3]]
    ranked = summarise(PointTable((*llama, *of_ranks, *ours), ()), resamples=40)
    assert ranked["differences"]["kalmagrove - llama"] == summary["differences"]["kalmagrove - llama"]
    assert ranked["paired"] == summary["paired"] == {"kalmagrove - llama": True}
    fewer = summarise(PointTable((*llama, *ours[1:]), ()), resamples=40)
    assert fewer["paired"] == {"kalmagrove - llama": False}
    apart, together = (s["differences"]["kalmagrove - llama"]["power"]["alpha"]["interval"] for s in (fewer, summary))
    # The same cells in both resamples leave less to chance.
    assert apart[1] - apart[0] > 1.5 * (together[1] - together[0])


def test_a_data_exponent_just_outside_the_tolerance_decides_nothing() -> None:
    def verdict(low: float, high: float) -> str:
        found = {"difference": (low + high) / 2, "interval": [low, high], "verdict": "larger"}
        laws = {"power": {"alpha": found, "beta": found}}
        families = {name: {"laws": {"power": {"constants": {}, "warnings": []}}} for name in ("ours", "llama")}
        summary = {"differences": {"ours - llama": laws}, "families": families, "left_out": []}
        return scaling_claims(tuned(summary))["ours - llama"][1].verdict

    assert verdict(0.02, 0.04) == "supported"
    assert verdict(0.02, 0.08) == "undecided"
    assert verdict(0.06, 0.08) == "not supported"


def test_a_warning_holds_a_claim_back(summary: dict[str, Any]) -> None:
    warned = copy.deepcopy(tuned(summary))
    warned["families"]["llama"]["laws"]["power"]["warnings"] = ["only 5 runs"]
    steeper, _ = scaling_claims(warned)["kalmagrove - llama"]
    assert steeper.verdict == "undecided" and steeper.reason.endswith("; only 5 runs")


def test_families_may_have_any_name() -> None:
    families = (*points("ours - big", OURS), *points("llama", LLAMA))
    found = scaling_claims(summarise(PointTable(families, ()), resamples=20))
    assert any("ours - big" in pair for pair in found)


def test_a_fit_without_resamples_is_drawn_and_refuses_to_plan(summary: dict[str, Any], tmp_path: Path) -> None:
    bare = copy.deepcopy(summary)
    for family in bare["families"].values():
        family["laws"]["hoffmann"]["draws"] = []
    save_figures(bare, tmp_path)
    family = families_of(bare)[0]
    with pytest.raises(KalmaGroveError, match="the fit of llama keeps no resamples"):
        best_for_flops(family, 1e13)
    with pytest.raises(KalmaGroveError, match="the fit of llama keeps no resamples"):
        cheapest_for_loss(family, 3.0)


def test_a_chosen_rate_that_diverged_at_another_size_is_said(summary: dict[str, Any]) -> None:
    check = {"size": "128x4", "valid_loss": {"0.5": 3.0, "1": None, "2": None}, "best": 0.5, "lost": None}
    tuning = [{"family": "llama", "trials": [], "chosen": 1.0, "at_the_edge": False, "check": check}]
    assert "at 128x4 x0.5 of it was best (the chosen one diverged)" in report_text(summary | {"tuning": tuning})


def test_ranks_are_compared_with_full_rank_of_their_own_size_in_any_order() -> None:
    shapes = [(1e6, 1.0, "a"), (8e6, 1.0, "b"), (8e5, 0.5, "a"), (6e6, 0.5, "b")]
    rows = [{"parameters": n, "rank_ratio": rank, "size": size} for n, rank, size in shapes]
    assert [row["parameters_at_full_rank"] for row in _with_size(rows)] == [1e6, 8e6, 1e6, 8e6]


def test_the_report_is_written_whole(summary: dict[str, Any], tmp_path: Path) -> None:
    text = report_text(summary)
    assert "C10" in text and "16 runs, 100 k to 10.0 M parameters" in text
    save_figures(summary, tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
    svg = (tmp_path / "scaling.svg").read_text()
    assert "<svg" in svg
    save_figures(summary, tmp_path)
    assert (tmp_path / "scaling.svg").read_text() == svg


def test_the_command_plans_from_a_fit(
    summary: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pages(summary | {"models": MODELS}, tmp_path / "law")
    assert main(["scale", "plan", str(tmp_path), "--flops", "1e13"]) == 0
    assert "kalmagrove train --preset llama" in capsys.readouterr().out
    assert main(["scale", "plan", str(tmp_path), "--loss", "3.0"]) == 0
    assert "of the FLOPs of llama" in capsys.readouterr().out
    assert main(["scale", "plan", str(tmp_path), "--hours", "0.001", "--measure", "--unique_tokens", "1m"]) == 0
    assert "Times through the text" in capsys.readouterr().out
    assert main(["report", "scaling", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["scaling.md", "scaling.png", "scaling.svg"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs one of --flops, --hours and --loss"),
        (["--flops", "1e9", "--loss", "3"], "needs one of --flops, --hours and --loss"),
        (["--flops", "-1"], "--flops must be positive, got -1"),
        (["--hours", "0"], "--hours must be positive, got 0"),
        (["--hours", "1", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["--loss", "3", "--unique_tokens", "1m"], "--loss asks for the cheapest run on text without end"),
        (["--flops", "1e9", "--data", "x", "--unique_tokens", "1m"], "say the same; give one of them"),
        (["--flops", "1e9", "--measure"], "--measure needs the fit of a sweep"),
        (
            ["--hours", "1", "--measure", "--flops_per_second", "1e9"],
            "--flops_per_second is what --measure finds out; give one of them",
        ),
    ],
)
def test_a_wrong_question_is_named(
    words: list[str], message: str, summary: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pages(summary, tmp_path)
    assert main(["scale", "plan", str(tmp_path), *words]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[", "[]", "{}", '{"families": {"a": {}}}', '{"families": 3}'])
def test_a_damaged_fit_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(content)
    with pytest.raises(KalmaGroveError, match="is no fit that can be read"):
        read_fit(tmp_path)
    with pytest.raises(KalmaGroveError, match="holds no"):
        read_fit(tmp_path / "elsewhere")
