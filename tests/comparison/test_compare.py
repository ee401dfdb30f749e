"""A whole comparison on a small text: fair, complete, resumable, and honest about what failed."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.comparison import compare as compare_module
from kalmagrove.comparison import side_by_side
from kalmagrove.comparison.collect import _blocks
from kalmagrove.comparison.compare import compare
from kalmagrove.comparison.config import CompareConfig
from kalmagrove.data.packing import PackedText
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.report.results import Results
from kalmagrove.training import config as training_config
from kalmagrove.training.config import DataConfig, LoopConfig
from kalmagrove.training.rate_trials import MOST_FURTHER_TRIALS, further_trial
from kalmagrove.training.run import TrainingDiverged, TrainingRun
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.worker_processes import Work
from kalmagrove.world import World

STEPS = 14


def config(**options: Any) -> CompareConfig:
    loop = LoopConfig(
        tokens=str(STEPS * 2 * 16), batch_size=2, context_length=16, precision="fp32", device="cpu", log_every=1,
        save_every=5,
    )  # fmt: skip
    defaults: dict[str, Any] = {"data": DataConfig(vocab_size=300), "models": "llama,kalmagrove", "size": "tiny"}
    return CompareConfig(**(defaults | {"loop": loop} | options))


@pytest.fixture(autouse=True)
def quick_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory takes a new process for each model; the comparison that all tests share measures it for real."""
    monkeypatch.setattr(compare_module, "measure_training_memory", lambda *_: 1)


def run(folder: Path, data: PackedText, conf: CompareConfig | None = None) -> dict[str, Any]:
    return compare(conf or config(), data, folder, command="kalmagrove compare", say=lambda line: None)


@pytest.fixture(scope="module")
def finished(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "demo"
    run(folder, packed, config(seeds="0,3"))
    return folder


def test_everything_that_the_report_needs_is_there(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert Results.from_dict(results).to_dict() == results
    assert results["baseline"] == "llama-tiny" and results["candidate"] == "kalmagrove-tiny"
    for model in results["models"]:
        assert [r["seed"] for r in model["runs"]] == [0, 3]
        assert all(r["test"]["tokens"] == results["data"]["splits"]["test"]["tokens"] - 1 for r in model["runs"])
        assert model["peak_memory_bytes"] > model["parameters"]["total"] * 4
        assert model["step_seconds"] > 0
        assert model["precision"] == "fp32"
    assert len(results["paired_time"][0]["ratios"]) == 2


def test_both_sides_read_the_same_tokens(finished: Path) -> None:
    curves = [
        [
            record["tokens"]
            for record in RunFolder(finished / name / "lr-x1" / "seed-0").read_metrics()
            if "loss" in record
        ]
        for name in ("llama-tiny", "kalmagrove-tiny")
    ]
    assert curves[0] == curves[1] == [32 * step for step in range(1, STEPS + 1)]


def test_the_page_holds_the_numbers_and_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    results = json.loads((finished / "results.json").read_text())
    mean = sum(run["test"]["perplexity"] for run in results["models"][0]["runs"]) / 2
    assert f"{mean:.0f}" in page
    assert "kalmagrove compare" in page and "<svg" in page
    assert "<script" not in page and not re.search(r'(src|href)="https?:', page)
    assert "llama-tiny" in (finished / "table.md").read_text()


def test_a_second_call_trains_nothing_and_gives_the_same(
    finished: Path, packed: PackedText, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((finished / "results.json").read_text())
    monkeypatch.setattr(TrainingRun, "train_step", lambda self: pytest.fail("trained again"))
    assert run(finished, packed, config(seeds="0,3"))["models"] == before["models"]


def test_a_comparison_may_get_more_seeds_and_trains_these_alone(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    before = run(folder, packed, config(seeds="0"))
    trained: list[int] = []
    train_step = TrainingRun.train_step

    def watched(self: TrainingRun) -> Any:
        trained.append(self.config.loop.seed)
        return train_step(self)

    monkeypatch.setattr(TrainingRun, "train_step", watched)
    after = run(folder, packed, config(seeds="0,3"))
    assert trained == [3] * (2 * STEPS)
    assert [model["runs"][0] for model in after["models"]] == [model["runs"][0] for model in before["models"]]
    assert after["seeds"] == [0, 3] and RunFolder(folder).read_config()["seeds"] == "0,3"
    # Fewer, or another first one, by which the rates were tuned, are another comparison.
    for seeds in ("0", "3,0", "1,0,3"):
        with pytest.raises(UsageError, match="belongs to another configuration"):
            run(folder, packed, config(seeds=seeds))


def test_a_crash_in_the_middle_goes_on_and_gives_the_same_scores(
    finished: Path, packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = TrainingSession.advance
    calls = 0

    def crash_at_30(self: TrainingSession) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise OSError("the machine went down")
        return advance(self)

    monkeypatch.setattr(TrainingSession, "advance", crash_at_30)
    with pytest.raises(OSError, match="went down"):
        run(tmp_path / "demo", packed, config(seeds="0,3"))
    monkeypatch.setattr(TrainingSession, "advance", advance)
    resumed = run(tmp_path / "demo", packed, config(seeds="0,3"))
    unbroken = json.loads((finished / "results.json").read_text())
    for ours, theirs in zip(resumed["models"], unbroken["models"], strict=True):
        for one, other in zip(ours["runs"], theirs["runs"], strict=True):
            assert one["test"] == other["test"] and one["valid"] == other["valid"]
            assert one["curve"]["loss"] == other["curve"]["loss"]


def test_workers_give_the_same_scores_and_times_that_took_turns(
    finished: Path, packed: PackedText, tmp_path: Path
) -> None:
    conf = config(seeds="0,3")
    lines: list[str] = []
    ours = compare(conf, packed, tmp_path / "demo", command="c", say=lines.append, workers=2)
    alone = json.loads((finished / "results.json").read_text())
    for one, other in zip(ours["models"], alone["models"], strict=True):
        for own, theirs in zip(one["runs"], other["runs"], strict=True):
            assert own["test"]["loss"] == pytest.approx(theirs["test"]["loss"], rel=1e-3)
            assert own["curve"]["loss"] == pytest.approx(theirs["curve"]["loss"], rel=1e-3)
        assert one["step_seconds"] * STEPS == pytest.approx(one["runs"][0]["curve"]["seconds"][-1])
    assert alone["timing_environment"] is None and ours["timing_environment"]["cpu"] == alone["environment"]["cpu"]
    assert len(ours["paired_time"][0]["ratios"]) == 10
    assert sum("test perplexity" in line for line in lines) == 4 and any("parameters" in line for line in lines)
    assert ours["side_by_side"] and not alone["side_by_side"]
    assert "trained side by side" in (tmp_path / "demo" / "report.html").read_text()
    assert Results.from_dict(ours).to_dict() == ours
    # What was begun by workers is finished by one process without new times.
    assert run(tmp_path / "demo", packed, conf)["paired_time"] == ours["paired_time"]


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers do their part one after the other in this process; another test starts real ones."""

    def run_here(
        work: Work, arguments: Sequence[Any], *, workers: int, sharing_threads: int, heard: dict[str, Any]
    ) -> None:
        assert workers <= sharing_threads
        for place in range(workers):
            work(place, lambda kind, content: heard[kind](content), *arguments)

    monkeypatch.setattr(side_by_side, "run_workers", run_here)


@pytest.mark.usefixtures("workers_here")
def test_workers_tune_and_look_at_every_rate_again_as_one_process_does(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "MOST_FURTHER_TRIALS", 1)
    conf = config(trials=3, trial_tokens=str(10 * 2 * 16), recheck=True)
    alone = run(tmp_path / "alone", packed, conf)
    ours = compare(conf, packed, tmp_path / "workers", command="c", say=lambda line: None, workers=2)
    for one, other in zip(ours["rechecks"], alone["rechecks"], strict=True):
        assert_trials_agree(one["trials"], other["trials"])
    for one, other in zip(ours["models"], alone["models"], strict=True):
        assert_trials_agree(one["lr_trials"], other["lr_trials"])
        assert one["runs"][0]["test"]["loss"] == pytest.approx(other["runs"][0]["test"]["loss"], rel=1e-3)


def assert_trials_agree(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert [trial["lr_scale"] for trial in ours] == [trial["lr_scale"] for trial in theirs]
    losses = [[trial["valid_loss"] for trial in trials] for trials in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_finished_comparison_keeps_the_times_of_steps_that_took_turns(
    finished: Path, packed: PackedText, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(finished, folder)
    terms: dict[str, Any] = {"command": "kalmagrove compare", "say": lambda line: None}
    before = json.loads((finished / "results.json").read_text())
    assert compare(config(seeds="0,3"), packed, folder, **terms, workers=2) == before


def test_a_model_that_diverges_where_steps_are_timed_has_no_time(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The workers are processes of their own, which this does not reach.
    train_step = TrainingRun.train_step

    def diverge(self: TrainingRun) -> Any:
        if self.config.model.preset == "kalmagrove-tiny" and self.step == 30:
            raise TrainingDiverged("the loss is nan")
        return train_step(self)

    monkeypatch.setattr(TrainingRun, "train_step", diverge)
    results = compare(config(), packed, tmp_path / "demo", command="c", say=lambda line: None, workers=2)
    llama, ours = results["models"]
    assert llama["step_seconds"] > 0 and ours["step_seconds"] is None and results["paired_time"][0]["ratios"] == []
    assert ours["runs"][0]["test"] is not None and ours["runs"][0]["seconds"] is None


@pytest.mark.parametrize(
    ("options", "terms", "message"),
    [
        ({}, {"workers": 0}, "--workers must be at least 1, got 0"),
        ({"budget": "10m"}, {"workers": 2}, "a budget counts steps that take turns"),
        ({}, {"workers": 2, "world": World(rank=0, size=2)}, "choose one"),
        ({"loop": replace(config().loop, grow_rank={5: 2})}, {"workers": 2}, "ranks that grow change the time"),
    ],
)
def test_workers_that_cannot_be_are_refused(
    packed: PackedText, tmp_path: Path, options: dict[str, Any], terms: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compare(config(**options), packed, tmp_path / "demo", command="c", say=lambda line: None, **terms)
    assert not (tmp_path / "demo").exists()


def test_what_a_worker_cannot_do_is_said_and_the_rest_is_kept(packed: PackedText, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    terms: dict[str, Any] = {"command": "c", "say": lambda line: None, "workers": 2}
    first = run(folder, packed)
    changed = folder / "llama-tiny" / "lr-x1" / "seed-0"
    (changed / "result.json").unlink()
    known = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(known.replace("seed: 0", "seed: 8"))
    with pytest.raises(KalmaGroveError, match="seed-0"):
        compare(config(), packed, folder, **terms)
    (changed / "config.yaml").write_text(known)
    again = compare(config(), packed, folder, **terms)
    one, other = (results["models"][0]["runs"][0]["test"]["loss"] for results in (again, first))
    assert one == pytest.approx(other, rel=1e-3)


def test_another_comparison_in_the_folder_is_refused(finished: Path, packed: PackedText) -> None:
    with pytest.raises(KalmaGroveError, match="seeds"):
        run(finished, packed, config(seeds="0,4"))


def test_a_plan_that_is_no_object_is_named(packed: PackedText, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(KalmaGroveError, match=r"plan\.json is damaged; remove it, and what is decided there"):
        run(tmp_path, packed)


def test_trials_choose_the_best_rate_on_the_validation_split_for_each_side(packed: PackedText, tmp_path: Path) -> None:
    results = run(tmp_path / "demo", packed, config(trials=3))
    for model in results["models"]:
        tried = {trial["lr_scale"]: trial["valid_loss"] for trial in model["lr_trials"]}
        assert set(tried) >= {0.5, 1.0, 2.0}
        assert tried[model["lr_scale"]] == min(tried.values())
        inside = min(tried) < model["lr_scale"] < max(tried)
        assert inside or len(tried) == 3 + MOST_FURTHER_TRIALS
        assert model["runs"][0]["folder"].endswith(f"lr-x{model['lr_scale']:g}/seed-0")
    read_test = [p for p in (tmp_path / "demo").rglob("result.json") if '"test"' in p.read_text()]
    assert len(read_test) == 2


def test_short_trials_choose_the_rate_of_longer_runs(packed: PackedText, tmp_path: Path) -> None:
    results = run(tmp_path / "demo", packed, config(trials=3, trial_tokens=str(6 * 2 * 16)))
    for model in results["models"]:
        folder = tmp_path / "demo" / model["name"]
        trials = [RunFolder(path).read_metrics()[-1]["step"] for path in folder.glob("trial-lr-x*/seed-0")]
        assert len(trials) == len(model["lr_trials"]) and set(trials) == {6}
        assert [r["valid"] is not None for r in model["runs"]] == [True]
        assert RunFolder(folder / f"lr-x{model['lr_scale']:g}" / "seed-0").read_metrics()[-1]["step"] == STEPS


def test_every_side_is_given_a_better_rate_at_full_length(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training_config._DEFAULT_LR, "adamw", 3e-4)
    conf = config(seeds="0,3", recheck=True)
    results = run(tmp_path / "demo", packed, conf)
    assert [recheck["model"] for recheck in results["rechecks"]] == [model["name"] for model in results["models"]]
    for recheck, model in zip(results["rechecks"], results["models"], strict=True):
        tried = {trial["lr_scale"]: trial["valid_loss"] for trial in recheck["trials"]}
        best = min(tried, key=lambda scale: tried[scale])
        assert recheck["chosen_before"] == 1 and model["lr_scale"] == best and {best / 2, best, best * 2} <= set(tried)
        assert [Path(own["folder"]).parts[1] for own in model["runs"]] == [f"lr-x{model['lr_scale']:g}"] * 2
        assert all(own["test"] is not None for own in model["runs"])
    llama = results["models"][0]
    assert llama["name"] == "llama-tiny" and llama["lr_scale"] > 1
    # Times of the first seed are those of the rates that were chosen first, whose steps took turns.
    assert len(results["paired_time"][0]["ratios"]) == 2
    assert (
        f"at full length (llama-tiny from x1 to x{llama['lr_scale']:g}" in (tmp_path / "demo" / "table.md").read_text()
    )
    monkeypatch.setattr(TrainingRun, "train_step", lambda self: pytest.fail("trained again"))
    assert run(tmp_path / "demo", packed, conf) == results


@pytest.mark.parametrize("options", [{"recheck": True}, {"trials": 2, "trial_tokens": str(10 * 2 * 16)}])
def test_the_rate_of_embeddings_is_tuned_for_every_side(
    options: dict[str, Any], packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "MOST_FURTHER_TRIALS", 2)
    conf = config(seeds="0,3", tune_auxiliary=True, **options)
    results = run(tmp_path / "demo", packed, conf)
    assert [own["model"] for own in results["auxiliary_trials"]] == [model["name"] for model in results["models"]]
    for own, model in zip(results["auxiliary_trials"], results["models"], strict=True):
        tried = {trial["auxiliary_scale"]: trial["valid_loss"] for trial in own["trials"]}
        assert {1.0, 0.25} <= set(tried) and len(tried) == 3
        assert model["auxiliary_scale"] == min(tried, key=lambda factor: tried[factor])
        assert model["optim_config"]["auxiliary_lr"] == 0.02 * model["auxiliary_scale"]
        ending = "" if model["auxiliary_scale"] == 1 else f"-auxiliary-x{model['auxiliary_scale']:g}"
        folders = [Path(seed["folder"]).parts[1] for seed in model["runs"]]
        assert folders == [f"lr-x{model['lr_scale']:g}{ending}"] * 2
        assert all(seed["test"] is not None for seed in model["runs"])
    assert "the rate of embeddings, head and vectors" in (tmp_path / "demo" / "table.md").read_text()
    assert "on the rate of embeddings" in (tmp_path / "demo" / "report.html").read_text()
    assert Results.from_dict(results).to_dict() == results
    monkeypatch.setattr(TrainingRun, "train_step", lambda self: pytest.fail("trained again"))
    assert run(tmp_path / "demo", packed, conf) == results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recheck": True, "budget": "10m"}, "leave it or the budget out"),
        ({"tune_auxiliary": True, "budget": "10m"}, "tune_auxiliary takes as long as it takes"),
        ({"tune_auxiliary": True}, "give trials or recheck too"),
        ({"trial_tokens": "100"}, "trial_tokens is for several trials"),
        ({"trials": 3, "trial_tokens": "1k"}, "are more than the final runs'"),
        ({"trials": 3, "trial_tokens": "3"}, "less than one batch"),
        ({"trial_margin": 0.1}, "trial_margin is for several trials"),
        ({"trials": 3, "trial_margin": -0.1}, "must be a finite number of nats"),
        ({"trials": 3, "trial_margin": math.nan}, "must be a finite number of nats"),
    ],
)
def test_wrong_trials_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        ({1.0: 2.0, 2.0: 3.0}, {}, 0.5),
        ({0.5: 3.0, 1.0: 2.0, 2.0: 3.0}, {}, None),
        ({0.25: 3.0, 1.0: 2.5, 4.0: 2.0}, {"step": 4.0}, 16.0),
        # The best lies inside, and how far the good ones reach is not seen yet: below first, then above.
        ({0.5: 2.05, 1.0: 2.0, 2.0: 2.05}, {"margin": 0.1}, 0.25),
        ({0.25: 2.2, 0.5: 2.05, 1.0: 2.0, 2.0: 2.05}, {"margin": 0.1}, 4.0),
        ({0.25: 2.2, 1.0: 2.0, 4.0: math.inf}, {"margin": 0.1}, None),
        ({1.0: math.inf, 2.0: math.inf}, {}, 0.5),
    ],
)
def test_the_rate_to_try_next(losses: dict[float, float], options: dict[str, float], expected: float | None) -> None:
    assert further_trial(losses, **options) == expected


def test_a_margin_that_no_rate_is_worse_by_takes_all_further_trials(packed: PackedText, tmp_path: Path) -> None:
    results = run(tmp_path / "demo", packed, config(trials=3, trial_margin=100.0))
    for model in results["models"]:
        scales = sorted(trial["lr_scale"] for trial in model["lr_trials"])
        assert scales == [2.0**power for power in range(-1 - MOST_FURTHER_TRIALS, 2)]


def test_a_side_that_diverges_is_reported_and_the_other_is_finished(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = TrainingRun.train_step

    def diverge(self: TrainingRun) -> Any:
        if self.config.model.preset == "kalmagrove-tiny" and self.step == 4:
            raise TrainingDiverged("the loss is nan at step 5")
        return train_step(self)

    monkeypatch.setattr(TrainingRun, "train_step", diverge)
    results = run(tmp_path / "demo", packed)
    by_name = {model["name"]: model["runs"][0] for model in results["models"]}
    assert by_name["kalmagrove-tiny"]["diverged"] and by_name["kalmagrove-tiny"]["test"] is None
    assert not by_name["llama-tiny"]["diverged"] and by_name["llama-tiny"]["test"] is not None
    assert "diverged" in (tmp_path / "demo" / "report.html").read_text()


def test_a_budget_is_turned_into_steps_once_and_kept(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalmagrove.comparison.plan.seconds_per_round", lambda *_: 0.5)
    monkeypatch.setattr(compare_module, "measure_training_memory", lambda *_: 1)
    results = run(tmp_path / "demo", packed, config(budget="10s"))
    assert results["budget"]["steps"] == 16
    monkeypatch.setattr("kalmagrove.comparison.plan.seconds_per_round", lambda *_: pytest.fail("measured again"))
    assert run(tmp_path / "demo", packed, config(budget="10s"))["budget"]["steps"] == 16


def test_wrong_options_leave_the_folder_free(packed: PackedText, tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match=r"optim\.warmup"):
        run(tmp_path / "demo", packed, config(warmup=2.0))
    assert not (tmp_path / "demo").exists()


def test_the_built_in_corpus_has_a_name_in_the_results(packed: PackedText, tmp_path: Path) -> None:
    results = run(tmp_path / "demo", replace(packed, source=None))
    assert "standard library" in results["data"]["source"]


def test_times_are_compared_by_whole_blocks_of_ten_steps() -> None:
    seconds = {step: 2.0 if step % 10 == 1 else 1.0 for step in range(11, 36)}
    assert _blocks(seconds) == {1: (10, 11.0), 2: (10, 11.0)}
    assert _blocks({11: 1.0, 12: 3.0}) == {1: (2, 4.0)}


def test_a_budget_that_is_too_short_says_how_much_is_needed(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalmagrove.comparison.plan.seconds_per_round", lambda *_: 2.0)
    with pytest.raises(KalmaGroveError, match="too short for 10 steps of each model; give at least 25s"):
        run(tmp_path / "demo", packed, config(budget="5s"))
