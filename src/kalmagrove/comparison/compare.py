"""``kalmagrove compare``: trains several models side by side, tunes them equally and writes what came out."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kalmagrove.comparison.collect import collect_results, run_path
from kalmagrove.comparison.config import CompareConfig, Contestant
from kalmagrove.comparison.memory import measure_training_memory
from kalmagrove.comparison.plan import planned_steps
from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import KalmaGroveError
from kalmagrove.files import write_json_atomic
from kalmagrove.report.page import write_report
from kalmagrove.report.results import Results
from kalmagrove.training.config import MOST_FURTHER_TRIALS, NEUTRAL_OPTIONS, further_trial, plain_options, usual_options
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingDiverged
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.tracking import ProgressBar
from kalmagrove.training.trainer import describe_run, evaluate_run
from kalmagrove.world import ALONE, World

Say = Callable[[str], None]


def compare(
    config: CompareConfig, data: TrainingData, folder: Path, *, command: str, say: Say, world: World = ALONE
) -> dict[str, Any]:
    """Compares, or goes on where an earlier call of the same comparison stopped.

    Args:
        config: The comparison.
        data: Its packed text.
        folder: Gets a run folder for each training, ``results.json``, ``table.md`` and ``report.html``.
        command: Repeats the comparison; printed in the report.
        say: Told what a person wants to know, a line at a time.
        world: The processes that train every model together; each of them calls this, and all see the folder.

    Returns:
        What ``results.json`` holds.

    Raises:
        Interrupted: A signal came; every run was saved.
        KalmaGroveError: The folder belongs to another comparison.
    """
    plan = _Plan(folder / "plan.json", world)
    # Nobody writes before all have read.
    world.wait()
    # Options that do not fit are found before the folder is claimed.
    steps = plan.values.get("steps") or planned_steps(config, data, say=say, world=world)
    with _claimed(config, folder, world) as root:
        if "steps" not in plan.values:
            environment = describe_environment() | ({"processes": world.size} if world.size > 1 else {})
            plan.update(steps=steps, created=time.strftime("%Y-%m-%dT%H:%M:%S%z"), environment=environment)
            if world.is_first:
                write_json_atomic(root.environment_path, plan.values["environment"])
        _tune(config, data, folder, plan, say)
        for seed in config.seed_list():
            _final_runs(config, data, folder, plan, seed, say)
            results = _write(config, data, folder, plan, command)
            if config.recheck_baseline and "recheck" not in plan.values:
                _recheck(config, data, folder, plan, results, say)
                _final_runs(config, data, folder, plan, seed, say)
                _write(config, data, folder, plan, command)
        _measure_memory(config, data, plan, say)
        return _write(config, data, folder, plan, command)


def _claimed(config: CompareConfig, folder: Path, world: World) -> RunFolder:
    """The comparison's folder, which the first process holds for all."""
    if not world.is_first:
        return RunFolder(folder)
    return open_run_folder(folder, plain_options(config), allow_changed=NEUTRAL_OPTIONS, usual=usual_options(config))


class _Plan:
    """What was decided on the way, kept in a file so that a later call, and every process, decides the same."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self.values = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            values: dict[str, Any] = json.loads(self.path.read_text("utf-8"))
        except ValueError as error:
            raise KalmaGroveError(
                f"{self.path} is damaged; remove it, and what is decided there is decided anew"
            ) from error
        return values

    def update(self, **values: Any) -> None:
        """Adds what the first process decided; all processes must call this together."""
        if self.world.is_first:
            self.values |= values
            write_json_atomic(self.path, self.values)
        self.world.wait()
        self.values = self._read()


def _tune(config: CompareConfig, data: TrainingData, folder: Path, plan: _Plan, say: Say) -> None:
    """The same learning-rate trials for each contestant, judged on the validation split, and more at an edge.

    A budget leaves no time for more.
    """
    if "scales" in plan.values:
        return
    names = [contestant.name for contestant in config.contestants()]
    losses: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rounds = [dict.fromkeys(names, scale) for scale in config.scales()] if config.trials > 1 else []
    for scales in rounds:
        _try(config, data, folder, plan, scales, losses, say)
    for _ in range(MOST_FURTHER_TRIALS if rounds and config.budget is None else 0):
        further = {name: further_trial({t["lr_scale"]: _rank_of_trial(t) for t in losses[name]}) for name in names}
        at_an_edge = {name: scale for name, scale in further.items() if scale is not None}
        if not at_an_edge:
            break
        _try(config, data, folder, plan, at_an_edge, losses, say)
    best = {name: min(tried, key=_rank_of_trial)["lr_scale"] if tried else 1.0 for name, tried in losses.items()}
    plan.update(trials=losses, scales=best)


def _try(
    config: CompareConfig,
    data: TrainingData,
    folder: Path,
    plan: _Plan,
    scales: Mapping[str, float],
    losses: dict[str, list[dict[str, Any]]],
    say: Say,
) -> None:
    """One trial of each contestant that has a factor."""
    shown = ", ".join(f"x{scale:g}" for scale in sorted(set(scales.values())))
    with _sessions(config, data, folder, plan, scales, config.seed_list()[0], say, are_trials=True) as sessions:
        _train_together(sessions, f"learning rate {shown}")
        for name, session in sessions.items():
            loss = evaluate_run(session.run, ("valid",))["valid"]["loss"] if session.run.done else None
            losses[name].append({"lr_scale": scales[name], "valid_loss": loss})


def _recheck(
    config: CompareConfig,
    data: TrainingData,
    folder: Path,
    plan: _Plan,
    results: Mapping[str, Any],
    say: Say,
) -> None:
    """The baseline beside its rate, in runs as long as the final ones, until the best lies inside.

    Trials may have been shorter, and what we are compared with shall not stand at a rate that is not its best.
    """
    name, seed = results["baseline"], config.seed_list()[0]
    chosen = float(plan.values["scales"][name])
    (first,) = (model["runs"][0] for model in results["models"] if model["name"] == name)
    losses = {chosen: first["valid"]["loss"] if first["valid"] else math.inf}
    for _ in range(MOST_FURTHER_TRIALS):
        best = min(losses, key=lambda scale: losses[scale])
        beside = [scale for scale in (best / 2, best * 2) if scale not in losses]
        for scale in beside:
            with _sessions(config, data, folder, plan, {name: scale}, seed, say) as sessions:
                _train_together(sessions, f"{name} again, learning rate x{scale:g}")
                run = sessions[name].run
                loss = evaluate_run(run, ("valid",))["valid"]["loss"] if run.done else math.inf
                losses[scale] = loss if math.isfinite(loss) else math.inf
        if not beside:
            break
    best = min(losses, key=lambda scale: losses[scale])
    if best != chosen:
        say(f"{name}: x{best:g} of its learning rate is better at full length than x{chosen:g}")
    trials = [
        {"lr_scale": scale, "valid_loss": loss if math.isfinite(loss) else None} for scale, loss in losses.items()
    ]
    recheck = {"model": name, "chosen_before": chosen, "trials": trials}
    plan.update(recheck=recheck, scales=plan.values["scales"] | {name: best})


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
            result = evaluate_run(session.run, ("valid", "test")) if session.run.done else None
            if result is None or not math.isfinite(result["test"]["loss"]):
                if plan.world.is_first:
                    lost = {"diverged": True, "seconds": session.seconds, "step": session.run.step}
                    session.folder.write_result(lost)
                plan.world.wait()
                say(f"{name} diverged at step {session.run.step}")
                continue
            session.finish(result | {"diverged": False})
            say(f"{name}: test perplexity {result['test']['perplexity']:.2f}")


@contextmanager
def _sessions(
    config: CompareConfig,
    data: TrainingData,
    folder: Path,
    plan: _Plan,
    scales: Mapping[str, float],
    seed: int,
    say: Say,
    *,
    are_trials: bool = False,
) -> Iterator[dict[str, TrainingSession]]:
    final_steps = int(plan.values["steps"])
    steps = config.trial_steps(final_steps) if are_trials else final_steps
    with ExitStack() as stack:
        sessions = {}
        for contestant in (c for c in config.contestants() if c.name in scales):
            scale = scales[contestant.name]
            session = TrainingSession(
                config.train_config(contestant, scale=scale, seed=seed, steps=steps),
                data,
                run_path(folder, contestant, scale, seed, short_trial=steps < final_steps),
                world=plan.world,
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
    first = next(iter(sessions.values()))
    stream = sys.stderr if first.world.is_first else io.StringIO()
    with (
        StopRequest() as stop,
        ProgressBar(total, description=description, start_step=start, stream=stream) as progress,
    ):
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
            number = int(first.world.largest([stop.number or 0], first.run.device)[0])
            if number:
                for other in sessions.values():
                    if not other.finished and other.run.step != other.saved_step:
                        other.save()
                        other.wait_for_saving()
                first.world.wait()
                raise Interrupted(number, "stopped and saved every run; the same command goes on from there")


def _measure_memory(config: CompareConfig, data: TrainingData, plan: _Plan, say: Say) -> None:
    known = {name for name, size in plan.values.get("memory", {}).items() if size is not None}
    if known == {contestant.name for contestant in config.contestants()}:
        return
    say("measuring peak memory, each model in a process of its own")
    seed, steps = config.seed_list()[0], int(plan.values["steps"])

    def measured(contestant: Contestant) -> int | None:
        train_config = config.train_config(contestant, scale=1.0, seed=seed, steps=steps)
        return measure_training_memory(train_config, data.folder)

    # One process measures what one process needs; with more of them it is an upper bound.
    plan.update(memory={c.name: measured(c) for c in config.contestants()} if plan.world.is_first else {})


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
    if plan.world.is_first:
        write_json_atomic(folder / "results.json", results)
        write_report(Results.from_dict(results), folder)
    # The others read these files too.
    plan.world.wait()
    return results
