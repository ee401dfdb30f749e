"""What a step of each optimiser costs, in paired rounds: time, the optimiser's share of it, and state memory.

    python benchmarks/optimizer_times.py                     llama-small, 8,192 tokens a step
    python benchmarks/optimizer_times.py --preset llama-mini --batch_size 8 --context_length 256 --rounds 40

The optimisers train copies of one model in one process and take turns (A, B, C, A, B, C, ...), so that a noisy machine
disturbs all alike; a ratio is that of the mean times, since some optimisers do extra work in some steps only. Rounds
should be a multiple of 10, so that each of those is met equally often. Writes JSON with --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from kalmagrove.files import write_json_atomic
from kalmagrove.models.build import build_model, model_config
from kalmagrove.precision import autocast, choose_device, choose_precision
from kalmagrove.training.environment import describe_environment
from optimizer_lab.methods import METHODS
from optimizer_lab.runs import state_bytes
from step import random_tokens

WARMUP_ROUNDS = 3


class Contestant:
    """A model with one of the optimisers."""

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        self.device = choose_device(options.device)
        self.precision = choose_precision(options.precision, self.device)
        sizes = {"vocab_size": options.vocab_size, "max_position_embeddings": options.context_length}
        model = build_model(model_config(options.preset, sizes), seed=0)
        self.model = model.to(self.device).train()
        self.optimizers = METHODS[method].build(self.model, METHODS[method].learning_rates[0])

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Seconds of a step on ``tokens`` (batch, context + 1), and of its optimiser."""
        tokens = tokens.to(self.device)
        started = self._now()
        with autocast(self.precision, self.device):
            loss = self.model.token_loss_sum(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()  # type: ignore[operator]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before = self._now()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ended = self._now()
        return ended - started, ended - before

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(contestants: dict[str, Contestant], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every measured step and optimiser step, by method; all take turns."""
    seconds: dict[str, dict[str, list[float]]] = {m: {"step": [], "optimizer": []} for m in contestants}
    for step in range(WARMUP_ROUNDS + options.rounds):
        tokens = random_tokens(options, step)
        for method, contestant in contestants.items():
            whole, own = contestant.step(tokens)
            if step >= WARMUP_ROUNDS:
                seconds[method]["step"].append(whole)
                seconds[method]["optimizer"].append(own)
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-small")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    contestants = {method: Contestant(method, options) for method in options.methods}
    seconds = measure(contestants, options)
    memory = {method: sum(map(state_bytes, contestant.optimizers)) for method, contestant in contestants.items()}
    means = {method: statistics.fmean(values["step"]) for method, values in seconds.items()}
    references = [method for method in ("adamw", "muon") if method in means]
    print(f"{'optimiser':<10}{'ms/step':>9}{'own ms':>8}{'share':>7}{'state MB':>10}", end="")
    print("".join(f"{f'over {reference}':>13}" for reference in references))
    for method, mean in means.items():
        own = statistics.fmean(seconds[method]["optimizer"])
        print(f"{method:<10}{mean * 1e3:>9.0f}{own * 1e3:>8.1f}{own / mean:>7.1%}", end="")
        print(f"{memory[method] / 1e6:>10.1f}", end="")
        print("".join(f"{mean / means[reference]:>12.3f}x" for reference in references), flush=True)
    if options.out is not None:
        described = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        record = {
            "options": described,
            "environment": describe_environment(),
            "seconds": seconds,
            "state_bytes": memory,
        }
        write_json_atomic(options.out, record)


if __name__ == "__main__":
    main()
