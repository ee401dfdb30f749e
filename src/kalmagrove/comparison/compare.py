"""``kalmagrove compare``: trains several models, tunes them equally and writes what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from kalmagrove.comparison.collect import collect_results
from kalmagrove.comparison.config import CompareConfig, Contestant, Rates, check_workers
from kalmagrove.comparison.in_turns import train_in_turns
from kalmagrove.comparison.memory import measure_training_memory
from kalmagrove.comparison.plan import planned_steps
from kalmagrove.comparison.runs import PlannedRun, Say, chosen_rates, known_loss, run_path
from kalmagrove.comparison.side_by_side import train_side_by_side
from kalmagrove.comparison.timing import time_in_turns
from kalmagrove.data.training_data import TrainingData
from kalmagrove.files import read_json_object, write_json_atomic
from kalmagrove.quantities import parse_list
from kalmagrove.report.page import write_report
from kalmagrove.report.results import Results
from kalmagrove.training.config import NEUTRAL_OPTIONS, plain_options, usual_options
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.rate_trials import MOST_FURTHER_TRIALS, best_scale, further_trial, untried_neighbour
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.world import ALONE, World


def compare(
    config: CompareConfig,
    data: TrainingData,
    folder: Path,
    *,
    command: str,
    say: Say,
    world: World = ALONE,
    workers: int = 1,
) -> dict[str, Any]:
    """Compares, or goes on where an earlier call of the same comparison stopped, perhaps with more seeds.

    Args:
        config: The comparison.
        data: Its packed text.
        folder: Gets a run folder for each training, ``results.json``, ``table.md`` and ``report.html``.
        command: Repeats the comparison; printed in the report.
        say: Told what a person wants to know, a line at a time.
        world: The processes that train every model together; each of them calls this, and all see the folder.
        workers: Runs that are trained at a time, each by a process of its own; the steps are timed afterwards. With
            one, all models of a seed take their steps in turns in this process.

    Returns:
        What ``results.json`` holds.

    Raises:
        Interrupted: A signal came; every run was saved.
        UsageError: Workers beside other processes or a budget, or fewer than one.
        KalmaGroveError: The folder belongs to another comparison.
    """
    check_workers(workers, config, world.size)
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
        comparison = _Comparison(config, data, folder, plan, command, say, workers)
        comparison.tune()
        comparison.train_finally()
        comparison.measure_times()
        comparison.measure_memory()
        return comparison.write()


def _claimed(config: CompareConfig, folder: Path, world: World) -> RunFolder:
    """The comparison's folder, which the first process holds for all; it may get more seeds."""
    if not world.is_first:
        return RunFolder(folder)
    options = plain_options(config)
    may_change = NEUTRAL_OPTIONS | ({"seeds"} if _has_more_seeds(config, folder) else set())
    root = open_run_folder(folder, options, allow_changed=may_change, usual=usual_options(config))
    if "seeds" in may_change:
        root.write_config(options)
    return root


def _has_more_seeds(config: CompareConfig, folder: Path) -> bool:
    """Whether a folder's seeds come first among those that are asked for: the rates are tuned with the first."""
    known = RunFolder(folder)
    if not known.config_path.is_file():
        return False
    stored = parse_list(str(known.read_config().get("seeds", "")))
    seeds = parse_list(config.seeds)
    return 0 < len(stored) < len(seeds) and seeds[: len(stored)] == stored


class _Plan:
    """What was decided on the way, kept in a file so that a later call, and every process, decides the same."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self.values = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        return read_json_object(self.path, "remove it, and what is decided there is decided anew")

    def update(self, **values: Any) -> None:
        """Adds what the first process decided, infinities as None; all processes must call this together."""
        if self.world.is_first:
            self.values |= values
            write_json_atomic(self.path, self.values)
        self.world.wait()
        self.values = self._read()


@dataclass(frozen=True)
class _Comparison:
    """A comparison under way."""

    config: CompareConfig
    data: TrainingData
    folder: Path
    plan: _Plan
    command: str
    say: Say
    workers: int

    def tune(self) -> None:
        """The same learning-rate trials for each contestant, judged on the validation split, and more at an edge.

        A budget leaves no time for more.
        """
        if "scales" in self.plan.values:
            return
        names = [contestant.name for contestant in self.config.contestants()]
        losses: dict[str, dict[float, float]] = {name: {} for name in names}
        rounds = [dict.fromkeys(names, scale) for scale in self.config.scales()] if self.config.trials > 1 else []
        self._try(rounds, losses)
        for _ in range(MOST_FURTHER_TRIALS if rounds and self.config.budget is None else 0):
            further = {name: further_trial(tried, margin=self.config.trial_margin) for name, tried in losses.items()}
            at_an_edge = {name: scale for name, scale in further.items() if scale is not None}
            if not at_an_edge:
                break
            self._try([at_an_edge], losses)
        trials = {
            name: [{"lr_scale": scale, "valid_loss": loss} for scale, loss in tried.items()]
            for name, tried in losses.items()
        }
        best = {name: best_scale(tried) if tried else 1.0 for name, tried in losses.items()}
        self.plan.update(trials=trials, scales=best)

    def _try(self, rounds: Sequence[Mapping[str, float]], losses: dict[str, dict[float, float]]) -> None:
        """Trials, in each round one of each contestant that has a factor."""
        seed = self.config.seed_list()[0]
        steps = self.config.trial_steps(self._steps)
        groups = [self._runs(_all_rates(scales), seed, steps=steps) for scales in rounds]
        for group in self._at_a_time(groups):
            shown = ", ".join(f"x{scale:g}" for scale in sorted({run.rates.scale for run in group}))
            found = self._train(group, f"learning rate {shown}")
            for run, loss in zip(group, found, strict=True):
                losses[run.name][run.rates.scale] = loss

    def train_finally(self) -> None:
        """Every contestant on every seed; the test split is read here, once a run."""
        if self.config.recheck and "rechecks" not in self.plan.values:
            self._recheck()
        if self.config.tune_auxiliary and "auxiliary_scales" not in self.plan.values:
            self._tune_auxiliary()
        seeds = self.config.seed_list()
        groups = [self._runs(self._chosen(), seed, steps=self._steps, is_final=True) for seed in seeds]
        for number, group in enumerate(self._at_a_time(groups), 1):
            several = self.workers == 1 and len(seeds) > 1
            description = f"seed {number} of {len(seeds)}" if several else "training"
            self._train(group, description, describe=number == 1)
            self.write()

    def _recheck(self) -> None:
        """Every contestant beside its rate, in runs as long as the final ones, until its best lies inside.

        Trials may have been shorter, and the longer a training, the lower its best rate.
        """
        chosen = {name: float(scale) for name, scale in self.plan.values["scales"].items()}
        losses = self._settle(chosen, 2.0, _all_rates, steps=self._steps, description="rates at full length")
        best = {name: best_scale(tried) for name, tried in losses.items()}
        for name in (name for name in best if best[name] != chosen[name]):
            self.say(f"{name}: x{best[name]:g} of its learning rate is better at full length than x{chosen[name]:g}")
        rechecks = [
            {
                "model": name,
                "chosen_before": chosen[name],
                "trials": [{"lr_scale": scale, "valid_loss": loss} for scale, loss in tried.items()],
            }
            for name, tried in losses.items()
        ]
        self.plan.update(rechecks=rechecks, scales=best)

    def _tune_auxiliary(self) -> None:
        """Every contestant beside the rate of its embeddings, head and vectors, as long as its last trials were."""
        chosen = self._chosen()
        steps = self._steps if self.config.recheck else self.config.trial_steps(self._steps)
        losses = self._settle(
            dict.fromkeys(chosen, 1.0),
            4.0,
            lambda factors: {name: Rates(chosen[name].scale, factor) for name, factor in factors.items()},
            steps=steps,
            description="rates of embeddings",
        )
        trials = [
            {
                "model": name,
                "trials": [{"auxiliary_scale": factor, "valid_loss": loss} for factor, loss in tried.items()],
            }
            for name, tried in losses.items()
        ]
        best = {name: best_scale(tried) for name, tried in losses.items()}
        self.plan.update(auxiliary_trials=trials, auxiliary_scales=best)

    def _settle(
        self,
        start: Mapping[str, float],
        step: float,
        rates_of: Callable[[Mapping[str, float]], dict[str, Rates]],
        *,
        steps: int,
        description: str,
    ) -> dict[str, dict[float, float]]:
        """Losses of every contestant at its factor and beside it, until the best lies inside or there were enough."""
        losses: dict[str, dict[float, float]] = {name: {} for name in start}
        beside = dict(start)
        # One more for the start.
        for _ in range(MOST_FURTHER_TRIALS + 1):
            runs = self._runs(rates_of(beside), self.config.seed_list()[0], steps=steps)
            for run, loss in zip(runs, self._train(runs, description), strict=True):
                losses[run.name][beside[run.name]] = loss
            neighbours = {name: untried_neighbour(tried, step) for name, tried in losses.items()}
            beside = {name: factor for name, factor in neighbours.items() if factor is not None}
            if not beside:
                break
        return losses

    def _chosen(self) -> dict[str, Rates]:
        return {contestant.name: chosen_rates(self.plan.values, contestant) for contestant in self.config.contestants()}

    def _at_a_time(self, groups: Sequence[list[PlannedRun]]) -> list[list[PlannedRun]]:
        """Groups that take turns are trained one after the other, and workers get all at once."""
        return list(groups) if self.workers == 1 else [list(chain.from_iterable(groups))]

    @property
    def _steps(self) -> int:
        return int(self.plan.values["steps"])

    def _runs(self, rates: Mapping[str, Rates], seed: int, *, steps: int, is_final: bool = False) -> list[PlannedRun]:
        """A run of each contestant that has rates."""
        is_short = steps < self._steps

        def path(contestant: Contestant) -> Path:
            return run_path(self.folder, contestant, rates[contestant.name], seed, short_trial=is_short)

        return [
            PlannedRun(contestant, rates[contestant.name], seed, steps, path(contestant), is_final)
            for contestant in self.config.contestants()
            if contestant.name in rates
        ]

    def _train(self, runs: Sequence[PlannedRun], description: str, *, describe: bool = False) -> list[float]:
        """Validation losses of the runs, infinity for one that diverged."""
        if not runs:
            return []
        if self.workers == 1:
            return train_in_turns(
                self.config,
                self.data,
                runs,
                description=description,
                describe=describe,
                say=self.say,
                world=self.plan.world,
            )
        known = {run: loss for run in runs if (loss := known_loss(run)) is not None}
        missing = [run for run in runs if run not in known]
        if missing:
            # Whoever goes on with this must know that the times of these runs say nothing.
            self.plan.update(side_by_side=True)
            found = train_side_by_side(
                self.config,
                self.data,
                missing,
                workers=self.workers,
                description=description,
                describe=describe,
                say=self.say,
            )
            known |= dict(zip(missing, found, strict=True))
        return [known[run] for run in runs]

    def measure_times(self) -> None:
        """Of steps, where the runs did not take turns."""
        if not self.plan.values.get("side_by_side") or "timing" in self.plan.values:
            return
        self.say("measuring the time of steps, which take turns now")
        # The other processes would be what it is disturbed by.
        first = self.plan.world.is_first
        timing = time_in_turns(self.config, self.data, self._chosen(), steps=self._steps) if first else {}
        self.plan.update(timing=timing)

    def measure_memory(self) -> None:
        """Peak memory of training each model."""
        config, plan = self.config, self.plan
        known = {name for name, size in plan.values.get("memory", {}).items() if size is not None}
        if known == {contestant.name for contestant in config.contestants()}:
            return
        self.say("measuring peak memory, each model in a process of its own")

        def measured(contestant: Contestant) -> int | None:
            train_config = config.train_config(contestant, seed=config.seed_list()[0], steps=self._steps)
            return measure_training_memory(train_config, self.data.folder)

        # One process measures what one process needs; with more of them it is an upper bound.
        plan.update(memory={c.name: measured(c) for c in config.contestants()} if plan.world.is_first else {})

    def write(self) -> dict[str, Any]:
        """Writes the results and the report of what there is."""
        plan = self.plan
        results = collect_results(
            self.config,
            self.data,
            self.folder,
            plan=plan.values,
            command=self.command,
            created=plan.values["created"],
            environment=plan.values["environment"],
        )
        if plan.world.is_first:
            write_json_atomic(self.folder / "results.json", results)
            write_report(Results.from_dict(results), self.folder)
        # The others read these files too.
        plan.world.wait()
        return results


def _all_rates(scales: Mapping[str, float]) -> dict[str, Rates]:
    return {name: Rates(scale) for name, scale in scales.items()}
