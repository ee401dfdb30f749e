"""``kalmagrove compare``: trains several models side by side, tunes them equally and writes what came out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kalmagrove.comparison.collect import collect_results, run_path
from kalmagrove.comparison.config import CompareConfig, Contestant
from kalmagrove.comparison.memory import measure_training_memory
from kalmagrove.comparison.plan import planned_steps
from kalmagrove.data.training_data import TrainingData
from kalmagrove.files import write_json_atomic
from kalmagrove.report.page import write_report
from kalmagrove.report.results import Results
from kalmagrove.training.config import NEUTRAL_OPTIONS, plain_options
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingDiverged
from kalmagrove.training.run_folder import open_run_folder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.tracking import ProgressBar
from kalmagrove.training.trainer import describe_run, evaluate_run

Say = Callable[[str], None]


def compare(config: CompareConfig, data: TrainingData, folder: Path, *, command: str, say: Say) -> dict[str, Any]:
    """Compares, or goes on where an earlier call of the same comparison stopped.

    Args:
        config: The comparison.
        data: Its packed text.
        folder: Gets a run folder for each training, ``results.json``, ``table.md`` and ``report.html``.
        command: Repeats the comparison; printed in the report.
        say: Told what a person wants to know, a line at a time.

    Returns:
        What ``results.json`` holds.

    Raises:
        Interrupted: A signal came; every run was saved.
        KalmaGroveError: The folder belongs to another comparison.
    """
    # Options that do not fit are found before the folder is claimed.
    steps = _Plan(folder / "plan.json").values.get("steps") or planned_steps(config, data, say=say)
    with open_run_folder(folder, plain_options(config), allow_changed=NEUTRAL_OPTIONS) as root:
        plan = _Plan(root.path / "plan.json")
        if "steps" not in plan.values:
            plan.update(steps=steps, created=time.strftime("%Y-%m-%dT%H:%M:%S%z"), environment=describe_environment())
            write_json_atomic(root.environment_path, plan.values["environment"])
        _tune(config, data, folder, plan, say)
        for seed in config.seed_list():
            _final_runs(config, data, folder, plan, seed, say)
            _write(config, data, folder, plan, command)
        _measure_memory(config, data, plan, say)
        return _write(config, data, folder, plan, command)


class _Plan:
    """What was decided on the way, kept in a file so that a later call decides the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def update(self, **values: Any) -> None:
        self.values |= values
        write_json_atomic(self.path, self.values)


def _tune(config: CompareConfig, data: TrainingData, folder: Path, plan: _Plan, say: Say) -> None:
    """The same number of learning-rate trials for each contestant, judged on the validation split."""
    if "scales" in plan.values:
        return
    contestants, seed = config.contestants(), config.seed_list()[0]
    losses: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    if config.trials > 1:
        for scale in config.scales():
            chosen = {contestant.name: scale for contestant in contestants}
            with _sessions(config, data, folder, plan, chosen, seed, say) as sessions:
                _train_together(sessions, f"learning rate x{scale:g}")
                for name, session in sessions.items():
                    lost = session.run.done is False
                    loss = None if lost else evaluate_run(session.run, ("valid",))["valid"]["loss"]
                    losses[name].append({"lr_scale": scale, "valid_loss": loss})
    best = {name: min(tried, key=_rank_of_trial)["lr_scale"] if tried else 1.0 for name, tried in losses.items()}
    plan.update(trials=losses, scales=best)


def _rank_of_trial(trial: dict[str, Any]) -> float:
    loss = trial["valid_loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _final_runs(config: CompareConfig, data: TrainingData, folder: Path, plan: _Plan, seed: int, say: Say) -> None:
    """Trains every contestant on one seed; the test split is read here, once a run."""
    number, count = config.seed_list().index(seed) + 1, len(config.seed_list())
    with _sessions(config, data, folder, plan, plan.values["scales"], seed, say) as sessions:
        if number == 1:
            for session in sessions.values():
                for line in describe_run(session.run):
                    say(line)
        _train_together(sessions, "training" if count == 1 else f"seed {number} of {count}")
        for name, session in sessions.items():
            if session.finished:
                continue
            if not session.run.done:
                session.folder.write_result({"diverged": True, "seconds": session.seconds, "step": session.run.step})
                say(f"{name} diverged at step {session.run.step}")
                continue
            result = evaluate_run(session.run, ("valid", "test"))
            session.finish(result | {"diverged": False})
            say(f"{name}: test perplexity {result['test']['perplexity']:.2f}")


@contextmanager
def _sessions(
    config: CompareConfig,
    data: TrainingData,
    folder: Path,
    plan: _Plan,
    scales: dict[str, float],
    seed: int,
    say: Say,
) -> Iterator[dict[str, TrainingSession]]:
    steps = int(plan.values["steps"])
    with ExitStack() as stack:
        sessions = {}
        for contestant in config.contestants():
            scale = scales[contestant.name]
            session = TrainingSession(
                config.train_config(contestant, scale=scale, seed=seed, steps=steps),
                data,
                run_path(folder, contestant, scale, seed),
                warn=lambda line: say(f"passed over {line}"),
            )
            stack.callback(session.close)
            sessions[contestant.name] = session
        yield sessions


def _train_together(sessions: dict[str, TrainingSession], description: str) -> None:
    """Interleaves the steps, so that every model meets the same moments of a noisy machine.

    A run whose loss is not finite stays where it is, and the others go on.
    """
    active = [session for session in sessions.values() if not session.run.done and not session.finished]
    if not active:
        return
    total = sum(session.run.total_steps for session in sessions.values())
    start = sum(session.steps_done for session in sessions.values())
    with StopRequest() as stop, ProgressBar(total, description=description, start_step=start) as progress:
        done = start
        while active:
            # The run that is behind goes first; in step, they alternate.
            session = min(active, key=lambda s: s.run.step)
            try:
                result = session.advance()
            except TrainingDiverged:
                active.remove(session)
                continue
            if session.run.done:
                active.remove(session)
            speed = session.run.config.loop.tokens_per_step / result.seconds
            done += 1
            progress.update(done, result.loss, speed)
            if stop.number is not None:
                for other in sessions.values():
                    if not other.finished and other.run.step != other.saved_step:
                        other.save()
                raise Interrupted(stop.number, "stopped and saved every run; the same command goes on from there")


def _measure_memory(config: CompareConfig, data: TrainingData, plan: _Plan, say: Say) -> None:
    known = {name for name, size in plan.values.get("memory", {}).items() if size is not None}
    if known == {contestant.name for contestant in config.contestants()}:
        return
    say("measuring peak memory, each model in a process of its own")
    seed, steps = config.seed_list()[0], int(plan.values["steps"])

    def measured(contestant: Contestant) -> int | None:
        train_config = config.train_config(contestant, scale=1.0, seed=seed, steps=steps)
        return measure_training_memory(train_config, data.folder)

    plan.update(memory={contestant.name: measured(contestant) for contestant in config.contestants()})


def _write(config: CompareConfig, data: TrainingData, folder: Path, plan: _Plan, command: str) -> dict[str, Any]:
    results = collect_results(
        config,
        data,
        folder,
        plan=plan.values,
        command=command,
        created=plan.values["created"],
        environment=plan.values["environment"],
    )
    write_json_atomic(folder / "results.json", results)
    write_report(Results.from_dict(results), folder)
    return results
