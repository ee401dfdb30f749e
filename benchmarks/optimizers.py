"""Trains the same model with each optimiser and prints the losses; goes on where it was stopped.

    python benchmarks/optimizers.py --data books.txt --scales llama-1.7m-2k --seeds 0
    python benchmarks/optimizers.py --methods kalma soap --seeds 0 1 2 --out runs/optimizers

Each method is tried at its four learning rates with the first seed, and at up to four further ones while the best is at
the edge; the best goes on with the other seeds. Kalma at its best rate is also trained for parts of the length
(--lengths), each with its whole schedule, which tells how many of a rival's steps it needs. A run leaves one JSON file
under --out, named by its text and options too, and is not repeated; a table, a summary and two pictures come at the end
of each scale. SOAP needs the extra "benchmarks". Two runs go side by side, one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from kalmagrove.commands.parsing import open_data
from kalmagrove.data.packing import open_packed
from kalmagrove.files import write_json_atomic
from kalmagrove.training.config import DataConfig, plain_options
from optimizer_lab.methods import METHODS
from optimizer_lab.pictures import save_pictures
from optimizer_lab.runs import SCALES, Job, train_config, train_job
from optimizer_lab.summary import Record, steps_needed, summarize, table, valid_loss
from parallel import stored, workers
from tuning import Tuned, tune


def run_job(job: Job, *, data_folder: Path, out: Path) -> Record:
    """The record of a job: read where it exists, else trained and written."""
    data, method = open_packed(data_folder, verify=False), METHODS[job.method]
    options = json.dumps([plain_options(train_config(job, method)), data.fingerprint], sort_keys=True)
    path = out / f"{job.name}-{hashlib.sha256(options.encode()).hexdigest()[:8]}.json"
    return stored(path, partial(train_job, job, method, data))


def describe(record: Record) -> str:
    """One line of the table."""
    loss = f"{valid_loss(record):.4f}" if math.isfinite(valid_loss(record)) else "diverged"
    spikes = "-" if record["spikes"] is None else f"{record['spikes']:.2g}"
    return (
        f"{record['scale']:<18}{record['method']:<8}{record['lr']:>8g}{record['seed']:>5}{loss:>10}"
        f"{record['step_seconds'] * 1e3:>9.0f}{record['optimizer_seconds'] * 1e3:>9.1f}{spikes:>7}"
    )


def compare_at(scale: str, options: argparse.Namespace, run_all: Callable[[list[Job]], list[Record]]) -> None:
    """Tunes every method with the first seed, repeats the best rate with the others, and shortens Kalma's runs."""
    first = options.seeds[0]
    trials: list[Record] = []

    def run_trials(jobs: list[Job]) -> list[Record]:
        found = run_all(jobs)
        trials.extend(found)
        return found

    def trial(method: str, lr: float) -> Job:
        return Job(scale, method, lr, first, options.part)

    tuned: dict[str, Tuned] = {}
    for method in options.methods:
        rates = METHODS[method].learning_rates
        tuned |= tune(run_trials, {method: partial(trial, method)}, valid_loss, rates)
    best = {method: found.factor for method, found in tuned.items()}
    repeats = run_all([Job(scale, m, lr, seed, options.part) for m, lr in best.items() for seed in options.seeds])
    shorter = run_all(
        [
            Job(scale, options.candidate, best[options.candidate], seed, options.part * length)
            for length in sorted(options.lengths)
            for seed in options.seeds
        ]
        if options.candidate in best
        else []
    )
    summaries = [summarize(trials, repeats, method, tuned[method].is_at_edge) for method in options.methods]
    own = [r for r in repeats if r["method"] == options.candidate] + shorter
    needed = {
        method: steps_needed(own, [r for r in repeats if r["method"] == method], options.part)
        for method in options.methods
        if own and method != options.candidate
    }
    print("\n" + table(scale, summaries, needed, options.candidate) + "\n", flush=True)
    folder = options.out / scale
    write_json_atomic(
        folder / f"summary-part{options.part:g}.json",
        {
            "summaries": [asdict(summary) for summary in summaries],
            "steps_needed": {method: asdict(part) if part else None for method, part in needed.items()},
        },
    )
    save_pictures(scale, repeats, folder / f"part{options.part:g}.png")


def main() -> None:
    """Runs what is missing and prints everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="file or folder of text; left out: the standard library of this Python")
    parser.add_argument("--scales", nargs="+", choices=list(SCALES), default=["llama-1.7m-2k"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--part", type=float, default=1.0, help="part of each scale's tokens")
    parser.add_argument("--candidate", choices=list(METHODS), default="kalma", help="the method that is shortened")
    parser.add_argument("--lengths", nargs="*", type=float, default=[0.35, 0.5, 0.65, 0.8, 0.95])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    options = parser.parse_args()
    data = open_data(DataConfig(source=options.data))
    run = partial(run_job, data_folder=data.folder, out=options.out)
    print(f"{'scale':<18}{'method':<8}{'lr':>8}{'seed':>5}{'valid':>10}{'ms/step':>9}{'optim ms':>9}{'spikes':>7}")
    with workers(run, describe, options.workers) as run_all:
        for scale in options.scales:
            compare_at(scale, options, run_all)


if __name__ == "__main__":
    main()
