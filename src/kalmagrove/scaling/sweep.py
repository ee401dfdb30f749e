"""``kalmagrove scale sweep``: trains a ladder with several workers and writes the table of its runs."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalmagrove.data.packing import PackedText, open_packed
from kalmagrove.files import finite_or_null, write_json_atomic, write_text_atomic
from kalmagrove.locks import FolderInUse
from kalmagrove.scaling.ladder import GROWING_OPTIONS, SweepConfig, all_runs, best_scales, checks, rungs
from kalmagrove.scaling.points import TABLE
from kalmagrove.scaling.progress import SweepProgress
from kalmagrove.scaling.share import FolderShare, Share
from kalmagrove.scaling.worker import known_losses, outcome_rows, tuning_report, work
from kalmagrove.training.config import NEUTRAL_OPTIONS, plain_options, usual_options
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run_folder import RunFolder, open_run_folder, valid_loss_of
from kalmagrove.training.watching import SWEEP_FACTS
from kalmagrove.training.worker_processes import Send, loop_of_worker, run_workers

SECONDS_FOR_THE_FOLDER = 20.0
"""Machines that begin together take turns; a folder that is held for longer is in use."""


def sweep(
    config: SweepConfig, data: PackedText, folder: Path, *, workers: int, storage: str | None, command: str
) -> dict[str, Any]:
    """Trains every run of a ladder, or goes on where an earlier call stopped, perhaps with a ladder that has grown.

    Several machines may do this at once: on one folder that all see, or each on its own with one ``storage``.

    Args:
        config: The ladder.
        data: Its packed text.
        folder: Gets ``runs/``, ``runs.jsonl`` and ``sweep.json``.
        workers: Processes on this machine.
        storage: A journal file or the URL of an SQL database with the study of all machines; None: the folder.
        command: Repeats the sweep; kept in ``sweep.json``.

    Returns:
        What ``sweep.json`` holds.

    Raises:
        Interrupted: A signal came; every run was saved.
        KalmaGroveError: The folder belongs to another ladder, or a run cannot be done.
    """
    options = plain_options(config)
    may_change = NEUTRAL_OPTIONS | GROWING_OPTIONS
    with _claimed(folder, options, may_change, usual_options(config)) as root:
        root.write_config(options)
    share = open_share(config, data, folder, storage)
    losses, done = known_losses(config, share)
    if len(done) < len(all_runs(config, losses)) or len(best_scales(config, losses)) < len(config.family_list()):
        _train(config, data, folder, share, workers=workers, storage=storage)
    return write_tables(config, data, folder, share, command=command)


def _claimed(folder: Path, options: dict[str, Any], may_change: frozenset[str], usual: dict[str, Any]) -> RunFolder:
    """The sweep's folder, held for a moment: machines that begin together wait for one another."""
    end = time.monotonic() + SECONDS_FOR_THE_FOLDER
    while True:
        try:
            return open_run_folder(folder, options, allow_changed=may_change, usual=usual)
        except FolderInUse:
            if time.monotonic() > end:
                raise
            time.sleep(random.uniform(0.05, 0.2))


def open_share(config: SweepConfig, data: PackedText, folder: Path, storage: str | None) -> Share:
    """How the workers of a ladder divide its runs."""
    if storage is None:
        return FolderShare(folder, data.fingerprint)
    from kalmagrove.scaling.study import open_study

    return open_study(storage, config, data.fingerprint)


def _train(
    config: SweepConfig,
    data: PackedText,
    folder: Path,
    share: Share,
    *,
    workers: int,
    storage: str | None,
) -> None:
    with SweepProgress(config, folder, share, data.vocab_size) as progress:
        run_workers(
            _work,
            (config, data.folder, folder, storage),
            workers=workers,
            heard={"line": progress.say},
            looked=progress.update,
        )


def _work(place: int, send: Send, config: SweepConfig, data_folder: Path, folder: Path, storage: str | None) -> None:
    config = replace(config, loop=loop_of_worker(config.loop, place))
    data = open_packed(data_folder, verify=False)
    work(config, data, folder, open_share(config, data, folder, storage), say=lambda line: send("line", line))


def write_tables(config: SweepConfig, data: PackedText, folder: Path, share: Share, *, command: str) -> dict[str, Any]:
    """``runs.jsonl`` for the fit, and ``sweep.json`` with everything around it."""
    losses, done = known_losses(config, share)
    best = best_scales(config, losses)
    ladder = rungs(config, best)
    rows = outcome_rows(config, ladder, done, data)
    write_text_atomic(folder / TABLE, "".join(json.dumps(finite_or_null(row)) + "\n" for row in rows))
    known = {key: valid_loss_of(result) for key, result in done.items()}
    facts = {
        "format": 1,
        "command": command,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "runs": len(rows),
        "planned_runs": len(ladder),
        "models": describe_models(config, data),
        "data": describe_data(data),
        "tuning": tuning_report(config, best, checks(config, best), known),
        "environment": describe_environment(),
        "config": plain_options(config),
    }
    write_json_atomic(folder / SWEEP_FACTS, facts)
    return facts


def describe_models(config: SweepConfig, data: PackedText) -> dict[str, Any]:
    """What a planner needs to build larger models of the same families."""
    return {
        "vocab_size": data.vocab_size,
        "context_length": config.loop.context_length,
        "tokens_per_step": config.loop.tokens_per_step,
        "head_dim": config.head_dim,
        "sizes": list(config.sizes),
        "families": {f.name: {"preset": f.preset, "optim": f.optim} for f in config.family_list()},
    }


def describe_data(data: PackedText) -> dict[str, Any]:
    """The text of a ladder."""
    return {
        "source": data.source or "the standard library of the running Python (built-in corpus)",
        "fingerprint": data.fingerprint,
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
        "train_tokens": data.splits["train"].tokens,
        "bytes_per_token": data.splits["train"].bytes / data.splits["train"].tokens,
    }
