"""Attention alone: seconds of forward and backward, and of decoding, by length of the text.

    python benchmarks/attention.py                                    256 to 16,384 tokens
    python benchmarks/attention.py --device cuda --lengths 1024 8192 --compile

Each row is an equal number of heads over one text: causal by torch's fused kernel, a sliding window of a quarter of it
and at most --reach tokens, the window and pooled blocks before it, which is what the preset kalmagrove does, and the
package's own full attention. Contestants take turns; a ratio is the median over the rounds of that to the fused kernel.
Then a whole layer decodes one token after so many others; the last column is its cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalmagrove.files import write_json_atomic
from kalmagrove.nn.arnold import MultiResolutionAttention
from kalmagrove.nn.attend import attend
from kalmagrove.nn.decoding import placement
from kalmagrove.nn.pooling import BlockPooling
from kalmagrove.nn.resolution import Resolution
from kalmagrove.precision import choose_device, synchronize
from kalmagrove.training.environment import describe_environment

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CAUSAL = "causal, fused"


def contestants(options: argparse.Namespace, length: int) -> dict[str, Attend]:
    """Functions of queries, keys and values (batch, heads, sequence, head_dim)."""
    reach, stride = reach_at(length, options), options.stride
    scales = {
        f"window {reach}": [(1, reach)],
        f"window {reach}, then blocks of {stride}": [(1, reach), (stride, None)],
    }
    own = {name: partial(_attend, Resolution(1, options.head_dim, pairs), length) for name, pairs in scales.items()}
    own["full, ours"] = partial(_attend, Resolution(1, options.head_dim), length)
    compiled = (
        {f"{name}, compiled": torch.compile(f, dynamic=False) for name, f in own.items()} if options.compile else {}
    )
    return {CAUSAL: partial(F.scaled_dot_product_attention, is_causal=True)} | own | compiled


def reach_at(length: int, options: argparse.Namespace) -> int:
    """Tokens that are seen one by one in a text of this length."""
    return min(options.reach, max(options.stride, length // 4))


def _attend(resolution: Resolution, length: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    used = resolution.used(length)
    blocks = [BlockPooling(key.shape[1], key.shape[3], stride).to(key)(key, value) for _, (stride, _) in used.coarse]
    return attend(used, query, [key, *(k for k, _ in blocks)], [value, *(v for _, v in blocks)])


def measure(own: Attend, inputs: list[Tensor]) -> tuple[float, int]:
    """Seconds of forward and backward, and on a GPU the most bytes that they allocate."""
    device = inputs[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    synchronize(device)
    started = time.perf_counter()
    own(*inputs).sum().backward()
    synchronize(device)
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    for tensor in inputs:
        tensor.grad = None
    return seconds, memory


def compare_at(length: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds, ratio to causal attention and bytes of every contestant at one length."""
    device = choose_device(options.device)
    batch = max(1, options.tokens // length)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, options.heads, length, options.head_dim)
    inputs = [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for _ in range(3)]
    all_of_them = contestants(options, length)
    seconds: dict[str, list[float]] = {name: [] for name in all_of_them}
    memory: dict[str, int] = {}
    for turn in range(options.warmup + options.rounds):
        for name, own in all_of_them.items():
            spent, memory[name] = measure(own, inputs)
            if turn >= options.warmup:
                seconds[name].append(spent)
    causal = seconds[CAUSAL]
    return {
        name: {
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, causal, strict=True)),
            "bytes": memory[name],
        }
        for name, own in seconds.items()
    }


def decode_at(length: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of a layer for one token after ``length`` others, ratio to full attention, and cache bytes."""
    device = choose_device(options.device)
    width = options.heads * options.head_dim
    reach, stride = reach_at(length, options), options.stride
    patterns: dict[str, list[tuple[int, int | None]]] = {
        "full": [(1, None)],
        f"window {reach}": [(1, reach)],
        f"window {reach}, then blocks of {stride}": [(1, reach), (stride, None)],
    }
    rows: dict[str, dict[str, float]] = {}
    for name, scales in patterns.items():
        resolution = Resolution(options.heads, options.head_dim, scales)
        layer = MultiResolutionAttention(width, [resolution], lambda _, a, b: nn.Linear(a, b, bias=False))
        layer = layer.to(device, torch.bfloat16)
        state: dict[str, Tensor] = {}
        seconds = []
        with torch.inference_mode():
            prompt = torch.randn(1, length, width, device=device, dtype=torch.bfloat16)
            layer(prompt, where=placement(length, device), state=state)
            size = sum(tensor.nbytes for tensor in state.values())
            for step in range(options.warmup + 4 * options.rounds):
                token = torch.randn(1, 1, width, device=device, dtype=torch.bfloat16)
                synchronize(device)
                started = time.perf_counter()
                layer(token, where=placement(1, device, seen=length + step), state=state)
                synchronize(device)
                seconds.append(time.perf_counter() - started)
        middle = statistics.median(seconds[options.warmup :])
        rows[name] = {
            "seconds": middle,
            "ratio": middle / rows.get("full", {"seconds": middle})["seconds"],
            "bytes": size,
        }
    return rows


def show(length: int, rows: dict[str, dict[str, float]]) -> None:
    """Prints the rows of one length."""
    for name, row in rows.items():
        memory = f"{row['bytes'] / 2**20:>9.2f}" if row["bytes"] else ""
        print(f"{length:>7}  {name:<34}{row['seconds'] * 1e3:>9.2f}{row['ratio']:>7.2f}x{memory}", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, at least one text")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--reach", type=int, default=256, help="tokens that are seen one by one, at most")
    parser.add_argument("--stride", type=int, default=16, help="tokens of a block before them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for part, measured in (("forward and backward", compare_at), ("decoding of one token", decode_at)):
        print(f"{'tokens':>7}  {part:<34}{'ms':>9}{'ratio':>8}{'MiB':>9}")
        rows[part] = {}
        for length in options.lengths:
            rows[part][str(length)] = measured(length, options)
            show(length, rows[part][str(length)])
    if options.out is not None:
        described = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        write_json_atomic(options.out, {"options": described, "environment": describe_environment(), "rows": rows})


if __name__ == "__main__":
    main()
