"""Trains named designs at equal tokens and prints what each costs and reaches; goes on where it was stopped.

    python benchmarks/architecture.py --data books/ --seeds 0 1
    python benchmarks/architecture.py --designs slim band-2 --tokens 20m --context_length 512 --seeds 0 1 2

A design is a file of --search, configs/search: options over a preset. Each is tried at --lr_scales times the
optimiser's usual rates with the first seed; the best goes on with the other seeds. Then all take steps in turns, for
paired times.
A run leaves one JSON file and is not repeated; a table comes at the end, from the files. Two runs go side by side, one
thread each.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from kalmagrove.commands.parsing import open_data
from kalmagrove.data.packing import open_packed
from kalmagrove.models.accounting import count_parameters, forward_macs_per_token
from kalmagrove.models.build import build_model, model_config
from kalmagrove.optim.build import build_optimizers
from kalmagrove.precision import choose_precision
from kalmagrove.report.statistics import mean_interval
from kalmagrove.training.checkpoint import latest_checkpoint, save_checkpoint
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.trainer import score_split
from paired import Contestant, median_ratio, own_loss, random_tokens, take_turns
from parallel import diverged_in_training, stored, workers

DESIGNS = Path(__file__).parents[1] / "configs" / "search"
SECONDS_BETWEEN_CHECKPOINTS = 300

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        design: Name of a file of designs.
        lr_scale: Multiplies the optimiser's usual rates.
        seed: Of the start and the order of the data.
        optimizer: Name of the optimiser.
        loop: Length and batch, as in a training configuration.
    """

    design: str
    lr_scale: float
    seed: int
    optimizer: str
    loop: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """Of its file."""
        sizes = "-".join(str(value) for _, value in self.loop)
        return f"{self.optimizer}-{sizes}/{self.design}-x{self.lr_scale:g}-seed{self.seed}"


def read_design(designs: Path, name: str) -> ModelConfig:
    """The model options of a design."""
    return ModelConfig(**yaml.safe_load((designs / f"{name}.yaml").read_text("utf-8")))


def run_job(job: Job, *, designs: Path, data_folder: Path, out: Path) -> Record:
    """The record of a job: read where it exists, else trained and written."""
    model = read_design(designs, job.design)
    return stored(out / f"{job.name}.json", lambda: train(job, model, data_folder, out / f"{job.name}-checkpoints"))


def train(job: Job, model: ModelConfig, data_folder: Path, checkpoints: Path) -> Record:
    """Trains one model and scores it on the validation and test split; goes on from a stopped job's checkpoint."""
    config = TrainConfig(
        model=model,
        optim=OptimConfig(name=job.optimizer, lr_scale=job.lr_scale),  # type: ignore[arg-type]
        loop=LoopConfig(seed=job.seed, **dict(job.loop)),
    )
    data = open_packed(data_folder, verify=False)
    run = TrainingRun(config, data)
    count = count_parameters(run.model)
    checkpoint, _ = latest_checkpoint(checkpoints)
    if checkpoint:
        run.restore(checkpoint)
    saved = time.monotonic()

    def save_in_time() -> None:
        nonlocal saved
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            save_checkpoint(checkpoints, step=run.step, **run.state(), keep_last=1)
            saved = time.monotonic()

    diverged = diverged_in_training(run, save_in_time)
    record = {
        **asdict(job),
        "parameters": count.total,
        "body_parameters": count.non_embedding,
        "macs_per_token": forward_macs_per_token(run.model_config, config.loop.context_length),
        "steps": run.step,
        "valid": math.inf if diverged else score_split(run, "valid").loss,
        "test": math.inf if diverged else score_split(run, "test").loss,
        "data_fingerprint": data.fingerprint,
        "environment": describe_environment(),
    }
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def time_designs(options: argparse.Namespace, vocab_size: int) -> dict[str, float]:
    """Median ratio of each design's step time to the reference's, over rounds in turns."""
    device = torch.device("cpu")
    names = list(dict.fromkeys([options.reference, *options.designs]))
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": options.context_length}
    contestants = {}
    for name in names:
        design = read_design(options.search, name)
        model = build_model(model_config(design.preset, sizes | design.overrides()), seed=0).train()
        optimizers = build_optimizers(options.optimizer, model, lr=1e-3)
        contestants[name] = Contestant(model, optimizers, choose_precision("auto", device), own_loss)
    shape = (options.batch_size, options.context_length, vocab_size)
    times = take_turns(contestants, options.rounds, lambda step: random_tokens(step, *shape))
    return {name: median_ratio(own.step, times[options.reference].step) for name, own in times.items()}


def search(options: argparse.Namespace, run_all: Callable[[list[Job]], list[Record]]) -> list[Record]:
    """Tunes every design's rates with the first seed, and repeats the best with the others."""
    loop = tuple((name, getattr(options, name)) for name in ("tokens", "batch_size", "context_length"))
    first = options.seeds[0]
    trials = run_all([Job(d, x, first, options.optimizer, loop) for d in options.designs for x in options.lr_scales])
    best = {
        design: min((r for r in trials if r["design"] == design), key=_loss)["lr_scale"] for design in options.designs
    }
    return run_all([Job(d, x, seed, options.optimizer, loop) for d, x in best.items() for seed in options.seeds])


def table(records: Sequence[Record], time_ratios: dict[str, float]) -> str:
    """Markdown, a row a design, the lowest validation loss first."""
    rows = []
    for design in dict.fromkeys(record["design"] for record in records):
        own = [record for record in records if record["design"] == design]
        losses = mean_interval([_loss(record) for record in own])
        bounds = "" if losses.bounds is None else f" ({losses.bounds[0]:.3f}-{losses.bounds[1]:.3f})"
        ratio = f"{time_ratios[design]:.2f}x" if design in time_ratios else ""
        rows.append(
            (
                losses.mean,
                f"| {design} | {own[0]['parameters'] / 1e6:.3f} M | {own[0]['body_parameters'] / 1e6:.3f} M | "
                f"{own[0]['macs_per_token'] / 1e6:.2f} M | {ratio} | x{own[0]['lr_scale']:g} | "
                f"{losses.mean:.4f}{bounds} |",
            )
        )
    head = "| design | parameters | body | MACs a token | time a step | lr | valid loss |"
    return "\n".join([head, "| :-- |" + " --: |" * 6, *(line for _, line in sorted(rows))])


def _loss(record: Record) -> float:
    return math.inf if record["valid"] is None else record["valid"]


def describe(record: Record) -> str:
    """One line of progress."""
    return f"{record['design']:<18} x{record['lr_scale']:<5g} seed {record['seed']}  valid {_loss(record):.4f}"


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="file or folder of text; left out: the standard library of this Python")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--search", type=Path, default=DESIGNS, help="folder of designs")
    parser.add_argument("--designs", nargs="+", help="names of its files; left out: all")
    parser.add_argument("--reference", default="llama", help="design whose time a step is 1")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--lr_scales", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--optimizer", choices=["kalma", "muon", "adamw"], default="kalma")
    parser.add_argument("--tokens", default="3m")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12, help="steps in turns for the paired times; 0 is none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/architecture"))
    options = parser.parse_args()
    known = sorted(path.stem for path in options.search.glob("*.yaml"))
    options.designs = options.designs or known
    if unknown := sorted(set(options.designs) - set(known)):
        parser.error(f"{options.search} has no {', '.join(unknown)}; it has {', '.join(known)}")
    data = open_data(DataConfig(source=options.data, vocab_size=options.vocab_size))
    run = partial(run_job, designs=options.search, data_folder=data.folder, out=options.out / data.fingerprint[:8])
    with workers(run, describe, options.workers) as run_all:
        records = search(options, run_all)
    ratios = time_designs(options, data.vocab_size) if options.rounds else {}
    print("\n" + table(records, ratios), flush=True)


if __name__ == "__main__":
    main()
