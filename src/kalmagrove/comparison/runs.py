"""The runs of a comparison: where one lives, and what is read from it when it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalmagrove.comparison.config import CompareConfig, Contestant, Rates
from kalmagrove.data.training_data import TrainingData
from kalmagrove.training.run_folder import RunFolder, valid_loss_of
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.trainer import evaluate_run
from kalmagrove.world import ALONE, World

Say = Callable[[str], None]


@dataclass(frozen=True)
class PlannedRun:
    """One training of a comparison.

    Attributes:
        contestant: Model and optimiser.
        rates: Factors on the learning rates.
        seed: Of weights and batches.
        steps: Its length.
        path: Its run folder.
        is_final: Whether the test split is read at its end; others are judged on the validation split and stay open.
    """

    contestant: Contestant
    rates: Rates
    seed: int
    steps: int
    path: Path
    is_final: bool

    @property
    def name(self) -> str:
        """The contestant's."""
        return self.contestant.name


def run_path(folder: Path, contestant: Contestant, rates: Rates, seed: int, *, short_trial: bool = False) -> Path:
    """Where a run of a comparison lives; a trial that is as long as the final runs may become one of them."""
    name = f"{'trial-' if short_trial else ''}lr-x{rates.scale:g}"
    if rates.auxiliary != 1:
        name += f"-auxiliary-x{rates.auxiliary:g}"
    return folder / contestant.name / name / f"seed-{seed}"


def chosen_rates(plan: Mapping[str, Any], contestant: Contestant) -> Rates:
    """What a comparison's ``plan.json`` has decided for a contestant; the usual rates where it has not."""
    factors = (plan.get(name, {}).get(contestant.name, 1.0) for name in ("scales", "auxiliary_scales"))
    return Rates(*map(float, factors))


def open_session(
    config: CompareConfig, data: TrainingData, run: PlannedRun, *, say: Say, world: World = ALONE
) -> TrainingSession:
    """Opens the folder of a run, where it goes on from its last checkpoint.

    Raises:
        KalmaGroveError: The folder is of another run, or in use.
    """
    train_config = config.train_config(run.contestant, rates=run.rates, seed=run.seed, steps=run.steps)
    return TrainingSession(train_config, data, run.path, world=world, warn=lambda line: say(f"passed over {line}"))


def known_loss(run: PlannedRun) -> float | None:
    """Validation loss of a run that has its result, infinity where it diverged; None for one that has none yet."""
    result = RunFolder(run.path).read_result() if run.path.is_dir() else None
    return None if result is None else valid_loss_of(result)


def conclude(run: PlannedRun, session: TrainingSession, say: Say) -> float:
    """Reads what a run came to: a final one gets its result, and its test split is read once.

    Returns:
        Validation loss in nats a token; infinity for a run that diverged.
    """
    known = known_loss(run)
    if known is not None:
        return known
    if not run.is_final:
        loss = evaluate_run(session.run, ("valid",))["valid"]["loss"] if session.run.done else math.inf
        return float(loss) if math.isfinite(loss) else math.inf
    result = evaluate_run(session.run, ("valid", "test")) if session.run.done else None
    if result is None or not math.isfinite(result["test"]["loss"]):
        if session.world.is_first:
            session.folder.write_result({"diverged": True, "seconds": session.seconds, "step": session.run.step})
        session.world.wait()
        say(f"{run.name} diverged at step {session.run.step}")
        return math.inf
    session.finish(result | {"diverged": False})
    say(f"{run.name}: test perplexity {result['test']['perplexity']:.2f}")
    return float(result["valid"]["loss"])
