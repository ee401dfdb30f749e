"""A worker of a ladder: takes a run that nobody trains, trains it, and again until none is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kalmagrove.data.packing import PackedText
from kalmagrove.files import remove
from kalmagrove.locks import FolderInUse
from kalmagrove.report.table import format_count
from kalmagrove.scaling.costs import rung_cost
from kalmagrove.scaling.ladder import Rung, SweepConfig, all_runs, trials
from kalmagrove.scaling.share import Result, Share, run_path
from kalmagrove.training.run import TrainingDiverged
from kalmagrove.training.run_folder import valid_loss_of
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.trainer import evaluate_run
from kalmagrove.training.worker_processes import train_to_the_end

SECONDS_BETWEEN_LOOKS = 1.0


def work(
    config: SweepConfig,
    data: PackedText,
    folder: Path,
    share: Share,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Trains until every run of the ladder has an outcome, here or elsewhere.

    Args:
        config: The ladder.
        data: Its text.
        folder: Gets a run folder for each run that is trained here.
        share: What the other workers know.
        say: Told about each run that is done.

    Raises:
        Interrupted: A signal came; the run was saved and may be taken by another worker.
        KalmaGroveError: A run cannot be done.
    """
    with StopRequest() as stop:
        while open_runs := runs_to_do(config, share, data.vocab_size):
            claim = share.take(open_runs)
            if stop.number is not None:
                if claim is not None:
                    claim.give_back()
                raise Interrupted(stop.number, "stopped; the same command goes on from there")
            if claim is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            try:
                with claim.held():
                    result = train_rung(config, claim.rung, data, folder, stop)
            except FolderInUse:
                claim.give_back()
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            except BaseException:
                with suppress(Exception):
                    claim.give_back()
                raise
            claim.finish(result)
            say(describe_outcome(claim.rung, result))


def runs_to_do(config: SweepConfig, share: Share, vocab_size: int) -> list[Rung]:
    """Runs without an outcome: trials first, since others wait for them, and the longest first."""
    losses, done = known_losses(config, share)
    of_trials = {rung.key for rung in trials(config, losses)}
    open_runs = [rung for rung in all_runs(config, losses) if rung.key not in done]
    return sorted(open_runs, key=lambda r: (r.key not in of_trials, -rung_cost(config, r, vocab_size).flops))


def known_losses(config: SweepConfig, share: Share) -> tuple[dict[str, float], dict[str, Result]]:
    """Validation losses of the trials, and the outcomes of all runs that are done."""
    losses: dict[str, float] = {}
    of_trials: dict[str, Result] = {}
    # A trial that is best at the edge is followed by another one.
    while wanted := [rung for rung in trials(config, losses) if rung.key not in of_trials]:
        found = share.results(wanted)
        if not found:
            break
        of_trials |= found
        losses |= {key: valid_loss_of(result) for key, result in found.items()}
    others = (rung for rung in all_runs(config, losses) if rung.key not in of_trials)
    return losses, of_trials | share.results(others)


def train_rung(config: SweepConfig, rung: Rung, data: PackedText, folder: Path, stop: StopRequest) -> dict[str, Any]:
    """Trains a run, or goes on with it; a run that diverges has an outcome too.

    Raises:
        Interrupted: A signal came; the run was saved.
        FolderInUse: Another process trains it.
    """
    session = TrainingSession(config.train_config(rung), data, run_path(folder, rung))
    try:
        done = session.folder.read_result()
        if done is not None:
            return done
        try:
            train_to_the_end(session, stop)
        except TrainingDiverged as error:
            session.folder.write_result(
                {"diverged": True, "step": session.run.step, "seconds": session.seconds, "reason": str(error)}
            )
        else:
            session.finish(evaluate_run(session.run, ("valid", "test")) | {"diverged": False})
            # The model stays; what a run needs to go on would take several times its space.
            remove(session.folder.checkpoints_path)
        return session.folder.read_result() or {}
    finally:
        session.close()


def describe_outcome(rung: Rung, result: Mapping[str, Any]) -> str:
    """A finished run in one line."""
    loss = valid_loss_of(result)
    outcome = "diverged" if math.isinf(loss) else f"valid loss {loss:.4f} in {result.get('seconds', 0.0):.0f} s"
    return f"{describe_rung(rung)}: {outcome}"


def describe_rung(rung: Rung) -> str:
    """A run by what makes it different."""
    rank = "" if rung.rank_ratio == 1 else f", rank x{rung.rank_ratio:g}"
    rate = "" if rung.lr_scale == 1 else f", rate x{rung.lr_scale:.3g}"
    return f"{rung.family.name} {rung.size}, {format_count(rung.tokens)} tokens{rank}{rate}, seed {rung.seed}"


def outcome_rows(
    config: SweepConfig, runs: Iterable[Rung], results: Mapping[str, Result], data: PackedText
) -> list[dict[str, Any]]:
    """A row for each run that is done, with the columns of :class:`~kalmagrove.scaling.points.Point` and more."""
    return [_row(config, rung, results[rung.key], data) for rung in runs if rung.key in results]


def _row(config: SweepConfig, rung: Rung, result: Result, data: PackedText) -> dict[str, Any]:
    cost = rung_cost(config, rung, data.vocab_size)
    test = result.get("test") or {}
    loss = valid_loss_of(result)
    return {
        "family": rung.family.name,
        "size": rung.size,
        "parameters": cost.model.parameters,
        "non_embedding": cost.model.non_embedding,
        "tokens": rung.tokens,
        "unique_tokens": min(rung.tokens, data.splits["train"].tokens),
        "rank_ratio": rung.rank_ratio,
        "seed": rung.seed,
        "loss": loss if math.isfinite(loss) else None,
        "test_loss": test.get("loss"),
        "flops": cost.flops,
        "seconds": result.get("seconds"),
        "lr_scale": rung.lr_scale,
        "precision": result.get("precision"),
        "vocabulary": data.tokenizer_fingerprint[:12],
        "run": rung.key,
    }


def tuning_report(
    config: SweepConfig, best: Mapping[str, float], checked: Sequence[Rung], losses: Mapping[str, float]
) -> list[dict[str, Any]]:
    """How each family's learning rate was found, and what its check said.

    Args:
        config: The ladder.
        best: The chosen factors.
        checked: Half and double of the transferred factor.
        losses: Validation losses by the keys of finished runs.
    """
    report = []
    for family in config.family_list():
        if family.name not in best:
            continue
        tried = [
            {"size": rung.size, "lr_scale": rung.lr_scale, "valid_loss": losses.get(rung.key)}
            for rung in trials(config, losses)
            if rung.family == family
        ]
        report.append(
            {
                "family": family.name,
                "trials": tried,
                "chosen": best[family.name],
                "at_the_edge": config.trials > 1 and _at_the_edge(config, tried),
                "check": _check(config, family.name, best[family.name], checked, losses),
            }
        )
    return report


def _at_the_edge(config: SweepConfig, tried: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the best of some size is the largest or the smallest that was tried."""
    for size in config.sizes[: config.tuned_sizes]:
        losses = [trial["valid_loss"] for trial in tried if trial["size"] == size]
        if losses.index(min(losses)) in (0, len(losses) - 1):
            return True
    return False


def _check(
    config: SweepConfig, family: str, best: float, checked: Sequence[Rung], losses: Mapping[str, float]
) -> dict[str, Any] | None:
    around = [rung for rung in checked if rung.family.name == family]
    if len(around) < 2 or any(rung.key not in losses for rung in around):
        return None
    transferred = Rung(
        around[0].family,
        config.checked,
        around[0].tokens,
        around[0].rank_ratio,
        around[0].seed,
        config.transferred(best, config.checked),
    )
    if transferred.key not in losses:
        return None
    found = {f"{factor:g}": losses[rung.key] for factor, rung in zip((0.5, 2.0), around, strict=True)}
    found["1"] = losses[transferred.key]
    nearest = min(found, key=lambda factor: found[factor])
    return {
        "size": config.checked,
        "valid_loss": found,
        "best": float(nearest),
        "lost": found["1"] - found[nearest],
    }
