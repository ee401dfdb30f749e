"""Training speed and memory of every preset side by side, and of transformers' own Llama in the same loop.

    python benchmarks/step.py                      width 256, 8 layers, context 512, vocabulary 4096
    python benchmarks/step.py --size mini --context_length 256 --rounds 10

Models take turns in one process (A, B, C, A, B, C, ...), so that a noisy machine disturbs all alike; a ratio is the
median of the ratios within a round. Times hold forward, backward, clipping and the optimiser. Peak memory is measured
for each model in a process of its own. Writes JSON beside the printed table with --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import to_stock
from kalmagrove.optim.build import build_optimizers
from kalmagrove.precision import autocast, choose_device, choose_precision
from kalmagrove.training.environment import describe_environment, peak_memory_bytes, reset_peak_memory

PEER = "transformers Llama"
CONTESTANTS = {
    PEER: ("llama", "adamw"),
    "gpt2 adamw": ("gpt2", "adamw"),
    "llama adamw": ("llama", "adamw"),
    "llama-plus kalma": ("llama-plus", "kalma"),
    "slim kalma": ("slim", "kalma"),
    "kalmagrove adamw": ("kalmagrove", "adamw"),
    "kalmagrove muon": ("kalmagrove", "muon"),
    "kalmagrove kalma": ("kalmagrove", "kalma"),
}
WARMUP_ROUNDS = 3


class Contestant:
    """A model with its optimisers, and one training step."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        family, optimizer = CONTESTANTS[name]
        self.device = choose_device(options.device)
        self.precision = choose_precision(options.precision, self.device)
        sizes = {"vocab_size": options.vocab_size, "max_position_embeddings": options.context_length}
        model = build_model(model_config(f"{family}-{options.size}", sizes), seed=0)
        self.is_peer = name == PEER
        self.model: nn.Module = (to_stock(model) if self.is_peer else model).to(self.device).train()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizers = build_optimizers(optimizer, self.model, lr=3e-3)  # type: ignore[arg-type]

    def step(self, tokens: Tensor) -> float:
        """Seconds of one optimiser step on ``tokens`` (batch, context + 1)."""
        started = time.perf_counter()
        with autocast(self.precision, self.device):
            loss = self._loss(tokens.to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - started

    def _loss(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.is_peer:
            # What a user of transformers writes: logits, then the loss.
            logits = self.model(input_ids=inputs, use_cache=False).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return self.model.token_loss_sum(inputs, targets) / targets.numel()  # type: ignore[operator]


def random_tokens(options: argparse.Namespace, step: int) -> Tensor:
    """A batch of random tokens: speed does not depend on the text."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(options.vocab_size, (options.batch_size, options.context_length + 1), generator=generator)


def measure_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each measured step, by contestant; all take turns."""
    contestants = {name: Contestant(name, options) for name in options.only or CONTESTANTS}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(WARMUP_ROUNDS + options.rounds):
        tokens = random_tokens(options, step)
        for name, contestant in contestants.items():
            taken = contestant.step(tokens)
            if step >= WARMUP_ROUNDS:
                seconds[name].append(taken)
    return seconds


def _measure_memory(name: str, options: argparse.Namespace, answers: Any) -> None:
    device = choose_device(options.device)
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    contestant = Contestant(name, options)
    for step in range(3):
        contestant.step(random_tokens(options, step))
    answers.put((peak_memory_bytes(device) - before, contestant.parameters))


def measure_memory(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Peak bytes that training adds to a fresh process, and the number of parameters."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_measure_memory, args=(name, options, answers))
    process.start()
    answer: tuple[int, int] = answers.get(timeout=600)
    process.join()
    return answer


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", choices=list(CONTESTANTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seconds = measure_times(options)
    reference = seconds.get("llama adamw") or next(iter(seconds.values()))
    tokens = options.batch_size * options.context_length
    rows = []
    print(f"{'model':<20}{'parameters':>12}{'ms/step':>10}{'tokens/s':>10}{'speed':>8}{'peak MiB':>10}")
    for name, times in seconds.items():
        ratio = statistics.median(theirs / own for own, theirs in zip(times, reference, strict=True))
        memory, parameters = measure_memory(name, options)
        middle = statistics.median(times)
        rows.append(
            {
                "model": name,
                "parameters": parameters,
                "seconds": times,
                "speed_ratio": ratio,
                "peak_memory_bytes": memory,
            }
        )
        print(
            f"{name:<20}{parameters:>12,}{middle * 1e3:>10.1f}{tokens / middle:>10,.0f}{ratio:>7.2f}x"
            f"{memory / 2**20:>10,.0f}"
        )
    if options.out is not None:
        described = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key != "out"
        }
        record = {"options": described, "environment": describe_environment(), "rows": rows}
        options.out.write_text(json.dumps(record, indent=2), "utf-8")


if __name__ == "__main__":
    main()
