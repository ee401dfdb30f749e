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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import to_stock
from kalmagrove.optim.build import build_optimizers
from kalmagrove.optim.kalma import Kalma
from kalmagrove.precision import choose_device, choose_precision
from kalmagrove.training.environment import describe_environment, peak_memory_bytes, reset_peak_memory
from optimizer_lab.runs import state_bytes
from paired import Contestant, median_ratio, own_loss, random_tokens, take_turns

PEER = "transformers Llama"
CONTESTANTS = {
    PEER: ("llama", "adamw"),
    "gpt2 adamw": ("gpt2", "adamw"),
    "llama adamw": ("llama", "adamw"),
    "slim adamw": ("slim", "adamw"),
    "llama-plus kalma": ("llama-plus", "kalma"),
    "slim kalma": ("slim", "kalma"),
    "kalmagrove adamw": ("kalmagrove", "adamw"),
    "kalmagrove muon": ("kalmagrove", "muon"),
    "kalmagrove kalma": ("kalmagrove", "kalma"),
}


def contestant(name: str, options: argparse.Namespace) -> Contestant:
    """A model with its optimisers, by the name of a row."""
    family, optimizer = CONTESTANTS[name]
    device = choose_device(options.device)
    sizes = {"vocab_size": options.vocab_size, "max_position_embeddings": options.context_length}
    built = build_model(model_config(f"{family}-{options.size}", sizes), seed=0)
    model: nn.Module = (to_stock(built) if name == PEER else built).to(device).train()
    optimizers = build_optimizers(optimizer, model, lr=3e-3)  # type: ignore[arg-type]
    loss = peer_loss if name == PEER else own_loss
    if options.compile:
        loss = compiled(loss, [optimizer for optimizer in optimizers if isinstance(optimizer, Kalma)])
    return Contestant(model, optimizers, choose_precision(options.precision, device), loss)


def compiled(
    loss: Callable[[nn.Module, Tensor], Tensor], watching: list[Kalma]
) -> Callable[[nn.Module, Tensor], Tensor]:
    """The loss through torch.compile, but for the steps in which Kalma looks at the inputs, as in training."""
    fast = torch.compile(loss, dynamic=False)

    def either(model: nn.Module, tokens: Tensor) -> Tensor:
        is_watched = any(optimizer.looks_next for optimizer in watching)
        for optimizer in watching:
            optimizer.set_hooks(is_watched)
        return (loss if is_watched else fast)(model, tokens)

    return either


def peer_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """What a user of transformers writes: logits, then the loss."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def batch(options: argparse.Namespace, step: int) -> Tensor:
    """Random tokens of the size that the options ask for."""
    return random_tokens(step, options.batch_size, options.context_length, options.vocab_size)


def _measure_memory(name: str, options: argparse.Namespace, answers: Any) -> None:
    device = choose_device(options.device)
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    model_in_training = contestant(name, options)
    for step in range(3):
        model_in_training.step(batch(options, step))
    answers.put((peak_memory_bytes(device) - before, sum(p.numel() for p in model_in_training.model.parameters())))


def measure_memory(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Peak bytes that training adds to a fresh process, and the number of parameters."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_measure_memory, args=(name, options, answers))
    process.start()
    answer: tuple[int, int] = answers.get(timeout=600)
    process.join()
    return answer


def count_memory(own: Contestant, tokens: Tensor) -> tuple[int, int]:
    """The same for a model that trains on a GPU already: what torch allocates in a step, and what stays between."""
    device = next(own.model.parameters()).device
    parameters = list(own.model.parameters())
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device)
    own.step(tokens)
    stays = sum(p.nbytes for p in parameters) + sum(map(state_bytes, own.optimizers))
    return peak_memory_bytes(device) - before + stays, sum(p.numel() for p in parameters)


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
    parser.add_argument("--compile", action="store_true", help="forward and backward through torch.compile")
    parser.add_argument("--times_only", action="store_true", help="do not measure memory")
    parser.add_argument("--give_memory_back", action="store_true", help="let the C library return freed memory")
    parser.add_argument("--only", nargs="*", choices=list(CONTESTANTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    contestants = {name: contestant(name, options) for name in options.only or CONTESTANTS}
    times = take_turns(contestants, options.rounds, partial(batch, options), keep_memory=not options.give_memory_back)
    seconds = {name: own.step for name, own in times.items()}
    reference = seconds.get("llama adamw") or next(iter(seconds.values()))
    tokens = options.batch_size * options.context_length
    rows = []
    print(f"{'model':<20}{'parameters':>12}{'ms/step':>10}{'tokens/s':>10}{'speed':>8}{'peak MiB':>10}")
    for name, times in seconds.items():
        ratio = median_ratio(reference, times)
        on_gpu = choose_device(options.device).type == "cuda"
        if options.times_only:
            memory, parameters = 0, sum(p.numel() for p in contestants[name].model.parameters())
        elif on_gpu:
            memory, parameters = count_memory(contestants[name], batch(options, 0))
        else:
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
