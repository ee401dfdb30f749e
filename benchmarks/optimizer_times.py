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
from dataclasses import asdict
from pathlib import Path

from kalmagrove.files import write_json_atomic
from kalmagrove.models.build import build_model, model_config
from kalmagrove.precision import choose_device, choose_precision
from kalmagrove.training.environment import describe_environment
from optimizer_lab.methods import METHODS
from optimizer_lab.runs import state_bytes
from paired import Contestant, own_loss, random_tokens, take_turns


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of the model and its batch, which :func:`contestant` reads."""
    parser.add_argument("--preset", default="llama-small")
    parser.add_argument("--hidden_size", type=int, help="in the place of the preset's")
    parser.add_argument("--num_hidden_layers", type=int, help="in the place of the preset's")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")


def contestant(method: str, options: argparse.Namespace) -> Contestant:
    """A copy of the model with one of the optimisers."""
    device = choose_device(options.device)
    sizes = {"vocab_size": options.vocab_size, "max_position_embeddings": options.context_length}
    resized = {name: getattr(options, name) for name in ("hidden_size", "num_hidden_layers")}
    sizes |= {name: value for name, value in resized.items() if value is not None}
    model = build_model(model_config(options.preset, sizes), seed=0).to(device).train()
    optimizers = METHODS[method].build(model, METHODS[method].learning_rates[0])
    return Contestant(model, optimizers, choose_precision(options.precision, device), own_loss)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    contestants = {method: contestant(method, options) for method in options.methods}
    sizes = (options.batch_size, options.context_length, options.vocab_size)
    times = take_turns(contestants, options.rounds, lambda step: random_tokens(step, *sizes))
    memory = {method: sum(map(state_bytes, own.optimizers)) for method, own in contestants.items()}
    means = {method: statistics.fmean(own.step) for method, own in times.items()}
    references = [method for method in ("adamw", "muon") if method in means]
    print(f"{'optimiser':<10}{'ms/step':>9}{'own ms':>8}{'share':>7}{'state MB':>10}", end="")
    print("".join(f"{f'over {reference}':>13}" for reference in references))
    for method, mean in means.items():
        own = statistics.fmean(times[method].optimizer)
        print(f"{method:<10}{mean * 1e3:>9.0f}{own * 1e3:>8.1f}{own / mean:>7.1%}", end="")
        print(f"{memory[method] / 1e6:>10.1f}", end="")
        print("".join(f"{mean / means[reference]:>12.3f}x" for reference in references), flush=True)
    if options.out is not None:
        described = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        record = {
            "options": described,
            "environment": describe_environment(),
            "seconds": {method: asdict(own) for method, own in times.items()},
            "state_bytes": memory,
        }
        write_json_atomic(options.out, record)


if __name__ == "__main__":
    main()
