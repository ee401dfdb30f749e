"""Trains the studies of a plan one after the other, or goes on where it stopped, and writes what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kalmagrove.comparison.compare import compare
from kalmagrove.data.packing import PackedText
from kalmagrove.data.sources import iter_documents
from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import UsageError
from kalmagrove.evaluation.text import score_text
from kalmagrove.files import write_json_atomic
from kalmagrove.report.results import Results
from kalmagrove.reproduction.answers import Answer
from kalmagrove.reproduction.claims import answer_claims
from kalmagrove.reproduction.evidence import OTHER_TEXT, load_evidence, read_other_text
from kalmagrove.reproduction.origin import Origin, claim_folder
from kalmagrove.reproduction.page import write_page
from kalmagrove.reproduction.pairs import PAPER
from kalmagrove.reproduction.plan import LADDER, STUDIES, Plan
from kalmagrove.scaling.ladder import SweepConfig
from kalmagrove.scaling.pages import LAW_FOLDER, write_pages
from kalmagrove.scaling.points import read_points
from kalmagrove.scaling.report import write_scaling_report
from kalmagrove.scaling.summary import facts_of_sweep, summarise
from kalmagrove.scaling.sweep import sweep
from kalmagrove.training.config import DataConfig
from kalmagrove.training.extras import require_extra
from kalmagrove.training.worker_processes import default_workers
from kalmagrove.world import ALONE, World

Say = Callable[[str], None]
OpenData = Callable[[DataConfig], TrainingData]


def reproduce(
    plan: Plan,
    folder: Path,
    *,
    only: Sequence[str] = (),
    open_data: OpenData,
    command: str,
    say: Say,
    world: World = ALONE,
    workers: int | None = None,
) -> list[Answer]:
    """Trains what is missing and answers the claims.

    Args:
        plan: The studies.
        folder: Gets a folder for each study, ``plan.json``, ``claims.json`` and ``claims.md``.
        only: Studies of the plan that are done now; none are all.
        open_data: Gives the packed text of a configuration.
        command: Repeats it; named in the page.
        say: Told what a person wants to know, a line at a time.
        world: The processes that train every model of a comparison together.
        workers: Runs that are trained at a time, each by a process of its own; None: one of a comparison, whose models
            take turns, and one for each GPU or core of the ladder.

    Raises:
        UsageError: The folder is of another plan or text, or a study is not in the plan.
        Interrupted: A signal came; every run was saved.
        KalmaGroveError: A folder belongs to another study.
    """
    chosen = plan.only(list(only)) if only else plan
    if any(contestant.optim == "soap" for config in chosen.comparisons.values() for contestant in config.contestants()):
        require_extra("pytorch_optimizer", "soap", "optim.name soap")
    if plan.other_text is not None:
        # One that cannot be read is found before hours of training.
        next(iter_documents(plan.other_text))
    world.wait()
    if world.is_first:
        claim_folder(plan, folder, command=command)
    for name in chosen.names:
        say(f"{name}: {STUDIES[name]}")
        again = f"{command} --only {name}"
        if name == LADDER:
            assert plan.ladder is not None
            if world.size > 1:
                say(f"the ladder has workers of its own; start {again} without torchrun and --nproc")
                continue
            _scale(plan.ladder, folder / name, open_data=open_data, workers=workers, command=again, say=say)
        else:
            config = plan.comparisons[name]
            data = world.one_here_before_the_others(partial(open_data, config.data), name)
            results = compare(config, data, folder / name, command=again, say=say, world=world, workers=workers or 1)
            if name in PAPER and plan.other_text is not None and world.is_first:
                _score_other_text(plan.other_text, folder / name, Results.from_dict(results), say)
            world.wait()
        if world.is_first:
            write_page(Origin(plan.scale, plan.names, command), load_evidence(folder), folder)
    return answer_claims(load_evidence(folder))


def _scale(
    config: SweepConfig, folder: Path, *, open_data: OpenData, workers: int | None, command: str, say: Say
) -> None:
    """The ladder, its laws, and their figures."""
    data = open_data(config.data)
    if not isinstance(data, PackedText):
        raise UsageError(f"the ladder takes text; {config.data.source} is a {data.modality}")
    sweep(config, data, folder, workers=workers or default_workers(), storage=None, command=command)
    points = read_points(folder)
    fitted = {point.family for point in points.points}
    baselines = [family.name for family in config.family_list() if family.is_baseline and family.name in fitted]
    summary = summarise(points, baselines=baselines, say=say) | facts_of_sweep(folder) | {"command": command}
    write_pages(summary, folder / LAW_FOLDER)
    write_scaling_report(summary, folder / LAW_FOLDER)


def _score_other_text(source: str, folder: Path, results: Results, say: Say) -> None:
    """Word perplexity of every finished model of a comparison on a second text, which nothing was tuned on."""
    known = read_other_text(folder)
    scores: dict[str, dict[str, Any]] = known.get("scores", {}) if known.get("source") == source else {}
    for model in results.models:
        of_model = scores.setdefault(model.name, {})
        for run in model.runs:
            # A seed that was trained again at another rate is another run.
            if run.finished and of_model.get(str(run.seed), {}).get("run") != run.folder:
                score = score_text(str(folder / run.folder), source).to_dict()
                of_model[str(run.seed)] = score | {"run": run.folder}
                write_json_atomic(folder / OTHER_TEXT, {"source": source, "scores": scores})
                say(f"{model.name}, seed {run.seed}: scored on {source}")
