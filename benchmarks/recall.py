"""Associative recall at a distance: what a resolution still finds, and from where on it does not.

    python benchmarks/recall.py
    python benchmarks/recall.py --length 256 --steps 500 --seeds 0

A text is noise with pairs (key, value) in it; each key comes once more, some tokens later, and its value must follow.
Small models of two layers are trained on the answers alone, one for each resolution; the table is the share of right
answers on new texts by the distance between a pair and its question. A run leaves one JSON file and is not repeated.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalmagrove.models.build import build_model, model_config
from kalmagrove.optim.build import build_optimizers, scale_learning_rates
from kalmagrove.optim.schedules import learning_rate_factor
from kalmagrove.report.statistics import mean_interval
from kalmagrove.training.environment import describe_environment
from parallel import stored, workers

Scales = list[tuple[int, int | None]]
RESOLUTIONS: dict[str, Scales] = {
    "full": [(1, None)],
    "window 64": [(1, 64)],
    "64, then blocks of 4": [(1, 64), (4, None)],
    "64, then blocks of 16": [(1, 64), (16, None)],
    "256, then blocks of 16": [(1, 256), (16, None)],
    "64, blocks of 4 to 256, of 16": [(1, 64), (4, 256), (16, None)],
}
SYMBOLS = 64
"""Keys, and as many values, and as many symbols of noise."""
NEAREST = 8


@dataclass(frozen=True)
class Job:
    """One model.

    Attributes:
        resolution: Name of its scales.
        seed: Of the start and the texts.
        length: Tokens of a text.
        steps: Of the optimiser.
        batch_size: Texts of a step.
        pairs: Pairs in a text.
    """

    resolution: str
    seed: int
    length: int
    steps: int
    batch_size: int
    pairs: int

    @property
    def name(self) -> str:
        """Of its file."""
        scales = "_".join(f"{stride}-{reach or 'all'}" for stride, reach in RESOLUTIONS[self.resolution])
        return f"{self.length}-{self.steps}-{self.batch_size}-{self.pairs}/{scales}-seed{self.seed}"


def draw_texts(job: Job, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Texts (batch, length), and how far back the pair of each answer lies, (batch, length); 0 is no answer."""
    slots = job.length // 2
    tokens = draw.integers(2 * SYMBOLS, 3 * SYMBOLS, (job.batch_size, job.length))
    distances = np.zeros_like(tokens)
    farthest = math.log2(slots - 1)
    for row in range(job.batch_size):
        free = np.ones(slots, dtype=bool)
        keys = draw.permutation(SYMBOLS)[: job.pairs]
        values = draw.integers(SYMBOLS, 2 * SYMBOLS, job.pairs)
        for key, value in zip(keys, values, strict=True):
            apart = int(2 ** draw.uniform(math.log2(NEAREST / 2), farthest))
            starts = np.flatnonzero(free[:-apart] & free[apart:])
            if not len(starts):
                continue
            first = int(draw.choice(starts))
            for slot in (first, first + apart):
                tokens[row, 2 * slot : 2 * slot + 2] = key, value
                free[slot] = False
            distances[row, 2 * (first + apart) + 1] = 2 * apart
    return torch.from_numpy(tokens), torch.from_numpy(distances)


def train(job: Job) -> dict[str, Any]:
    """Trains one model and asks it on new texts."""
    options = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "vocab_size": 3 * SYMBOLS,
        "max_position_embeddings": job.length,
        "resolutions": [{"num_heads": 2, "head_dim": 16, "scales": RESOLUTIONS[job.resolution]}],
    }
    model = build_model(model_config("kalmagrove", options), job.seed).train()
    optimizers = build_optimizers("kalma", model, lr=3e-3)
    draw = np.random.default_rng([job.seed, 1])
    for step in range(job.steps):
        scale_learning_rates(optimizers, learning_rate_factor("linear", step, job.steps, job.steps // 10))
        tokens, distances = draw_texts(job, draw)
        loss = model(tokens, labels=tokens.masked_fill(distances == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return asdict(job) | {"right": ask(model.eval(), job), "environment": describe_environment()}


@torch.no_grad()
def ask(model: torch.nn.Module, job: Job) -> dict[str, float]:
    """Share of right answers by the power of two that the distance is below."""
    draw = np.random.default_rng([job.seed, 2])
    right: dict[int, list[bool]] = {}
    for _ in range(16):
        tokens, distances = draw_texts(job, draw)
        guesses = model(tokens).logits[:, :-1].argmax(dim=-1)
        asked = distances[:, 1:] > 0
        found = (guesses == tokens[:, 1:])[asked]
        for distance, is_right in zip(distances[:, 1:][asked].tolist(), found.tolist(), strict=True):
            right.setdefault(2 ** math.floor(math.log2(distance)), []).append(is_right)
    return {str(2 * low): sum(answers) / len(answers) for low, answers in sorted(right.items())}


def run_job(job: Job, *, out: Path) -> dict[str, Any]:
    """The record of a job: read where it exists, else trained and written."""
    return stored(out / f"{job.name}.json", lambda: train(job))


def describe(record: dict[str, Any]) -> str:
    """One line of progress."""
    shares = "  ".join(f"<{bound} {share:.2f}" for bound, share in record["right"].items())
    return f"{record['resolution']:<30} seed {record['seed']}  {shares}"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a resolution, a column a distance."""
    bounds = list(records[0]["right"])
    lines = [f"| tokens between | {' | '.join(f'< {bound}' for bound in bounds)} |", "| :-- |" + " --: |" * len(bounds)]
    for name in dict.fromkeys(record["resolution"] for record in records):
        own = [record["right"] for record in records if record["resolution"] == name]
        shares = [mean_interval([right[bound] for right in own]).mean for bound in bounds]
        lines.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", nargs="+", choices=list(RESOLUTIONS), default=list(RESOLUTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"))
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("length", "steps", "batch_size", "pairs")}
    jobs = [Job(resolution=name, seed=seed, **sizes) for name in options.resolutions for seed in options.seeds]
    with workers(partial(run_job, out=options.out), describe, options.workers) as run_all:
        records = run_all(jobs)
    print("\n" + table(records))


if __name__ == "__main__":
    main()
