"""``kalmagrove scale sweep``: trains a ladder with several workers and writes the table of its runs."""

from __future__ import annotations

import json
import multiprocessing
import queue
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalmagrove.data.packing import PackedText, open_packed
from kalmagrove.errors import KalmaGroveError
from kalmagrove.files import finite_or_null, write_json_atomic, write_text_atomic
from kalmagrove.scaling.ladder import SweepConfig, all_runs, best_scales, checks, rungs
from kalmagrove.scaling.points import TABLE
from kalmagrove.scaling.progress import SweepProgress
from kalmagrove.scaling.share import FolderShare, Share
from kalmagrove.scaling.worker import known_losses, loss_of, outcome_rows, tuning_report, work
from kalmagrove.training.config import NEUTRAL_OPTIONS, plain_options, usual_options
from kalmagrove.training.environment import describe_environment, keep_freed_memory, usable_cores
from kalmagrove.training.run_folder import open_run_folder
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.watching import SWEEP_FACTS

Say = Callable[[str], None]
SECONDS_BETWEEN_LOOKS = 0.5
GROWING_OPTIONS = frozenset(
    {"families", "sizes", "tokens", "rank_ratios", "seeds", "repeated_sizes", "trials", "checked_size"}
)
"""Options that say which runs there are and not what a run is, so that a ladder may get more of them."""


def sweep(
    config: SweepConfig, data: PackedText, folder: Path, *, workers: int, storage: str | None, command: str, say: Say
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
        say: Told what a person wants to know, a line at a time.

    Returns:
        What ``sweep.json`` holds.

    Raises:
        Interrupted: A signal came; every run was saved.
        KalmaGroveError: The folder belongs to another ladder, or a run cannot be done.
    """
    options = plain_options(config)
    may_change = NEUTRAL_OPTIONS | GROWING_OPTIONS
    with open_run_folder(folder, options, allow_changed=may_change, usual=usual_options(config)) as root:
        root.write_config(options)
    share = open_share(config, data, folder, storage)
    losses, done = known_losses(config, share)
    if len(done) < len(all_runs(config, losses)) or len(best_scales(config, losses)) < len(config.family_list()):
        _train(config, data, folder, share, workers=workers, storage=storage, say=say)
    return write_tables(config, data, folder, share, command=command)


def open_share(config: SweepConfig, data: PackedText, folder: Path, storage: str | None) -> Share:
    """How the workers of a ladder divide its runs."""
    if storage is None:
        return FolderShare(folder)
    from kalmagrove.scaling.study import open_study

    return open_study(storage, config, data.fingerprint)


def default_workers() -> int:
    """One for each GPU, else one for each core, since small models use one core best."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return usable_cores()


def _train(
    config: SweepConfig,
    data: PackedText,
    folder: Path,
    share: Share,
    *,
    workers: int,
    storage: str | None,
    say: Say,
) -> None:
    context = multiprocessing.get_context("spawn")
    lines: Any = context.Queue()
    processes = [
        context.Process(target=_worker, args=(config, data.folder, folder, storage, place, workers, lines))
        for place in range(workers)
    ]
    with StopRequest() as stop, SweepProgress(config, folder, share, data.vocab_size) as progress:
        for process in processes:
            process.start()
        try:
            failure = _wait(processes, lines, progress, stop)
        finally:
            _end(processes)
    if stop.number is not None:
        raise Interrupted(stop.number, "stopped and saved every run; the same command goes on from there")
    if failure is not None:
        raise KalmaGroveError(failure)


def _wait(processes: list[Any], lines: Any, progress: SweepProgress, stop: StopRequest) -> str | None:
    """Shows what the workers say until all have ended; returns the first error."""
    while True:
        ended = not any(process.is_alive() for process in processes)
        with suppress(queue.Empty):
            while True:
                kind, line = lines.get(timeout=0.0 if ended else SECONDS_BETWEEN_LOOKS)
                if kind == "error":
                    return str(line)
                progress.say(line)
        killed = next((p for p in processes if p.exitcode is not None and p.exitcode < 0), None)
        if killed is not None and stop.number is None:
            reason = " (out of memory?)" if killed.exitcode == -signal.SIGKILL else ""
            killer = f"a worker was killed by signal {-killed.exitcode}{reason}"
            return f"{killer}; the same command goes on, perhaps with fewer --workers"
        if ended or stop.number is not None:
            return None
        progress.update()


def _end(processes: list[Any]) -> None:
    """Workers that still run save and end."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join()


def _worker(
    config: SweepConfig, data_folder: Path, folder: Path, storage: str | None, place: int, workers: int, lines: Any
) -> None:
    import torch

    keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    gpus = torch.cuda.device_count()
    if gpus > 1 and config.loop.device == "auto":
        config = replace(config, loop=replace(config.loop, device=f"cuda:{place % gpus}"))
    try:
        data = open_packed(data_folder, verify=False)
        share = open_share(config, data, folder, storage)
        work(config, data, folder, share, say=lambda line: lines.put(("line", line)))
    except Interrupted as error:
        sys.exit(error.exit_code)
    except (KalmaGroveError, OSError) as error:
        lines.put(("error", str(error)))
        sys.exit(1)


def write_tables(config: SweepConfig, data: PackedText, folder: Path, share: Share, *, command: str) -> dict[str, Any]:
    """``runs.jsonl`` for the fit, and ``sweep.json`` with everything around it."""
    losses, done = known_losses(config, share)
    best = best_scales(config, losses)
    ladder = rungs(config, best)
    rows = outcome_rows(config, ladder, done, data)
    write_text_atomic(folder / TABLE, "".join(json.dumps(finite_or_null(row)) + "\n" for row in rows))
    known = {key: loss_of(result) for key, result in done.items()}
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
