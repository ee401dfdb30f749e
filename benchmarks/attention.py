"""Attention alone: seconds of forward and backward and the memory they take, by length of the text.

    python benchmarks/attention.py                                    256 to 16,384 tokens
    python benchmarks/attention.py --device cuda --lengths 1024 8192 --compile

Each row is an equal number of heads over one text: all of them causal (torch's fused kernel), a sliding window, the
mean of blocks, or half and half, which is what the preset kalmagrove does. With --compile, on a GPU, FlexAttention
with the same windows runs beside them. Contestants take turns; a ratio is the median over the rounds of that to causal
attention.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kalmagrove.files import write_json_atomic
from kalmagrove.nn.arnold import BlockPooling, Resolution, attend
from kalmagrove.precision import choose_device, synchronize
from kalmagrove.training.environment import describe_environment

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CAUSAL = "causal, fused"


def contestants(options: argparse.Namespace, length: int, device: torch.device) -> dict[str, Attend]:
    """Functions of queries, keys and values (batch, heads, sequence, head_dim)."""
    local = Resolution(1, options.head_dim, window=options.window)
    coarse = Resolution(1, options.head_dim, stride=options.stride)
    both = {
        CAUSAL: partial(F.scaled_dot_product_attention, is_causal=True),
        f"window {options.window}": partial(_pooled_attend, local),
        f"stride {options.stride}": partial(_pooled_attend, coarse),
        "half and half": partial(_half_and_half, local, coarse),
    }
    if options.compile:
        both |= {f"{name}, compiled": torch.compile(own, dynamic=False) for name, own in both.items() if name != CAUSAL}
        both |= {f"FlexAttention {name}": own for name, own in _flex(options, length, device).items()}
    return both


def _pooled_attend(resolution: Resolution, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if resolution.stride > 1:
        pool = BlockPooling(key.shape[1], resolution.head_dim, resolution.stride).to(key)
        key, value = pool(key, value)
    return attend(resolution, query, key, value)


def _half_and_half(local: Resolution, coarse: Resolution, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    groups = zip((local, coarse), *(t.chunk(2, dim=1) for t in (query, key, value)), strict=True)
    return torch.cat([_pooled_attend(*group) for group in groups], dim=1)


def _flex(options: argparse.Namespace, length: int, device: torch.device) -> dict[str, Attend]:
    """The same patterns by FlexAttention; the blocks' means are made outside."""

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - options.window)

    def finished(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key + 1) * options.stride - 1 <= query

    compiled = torch.compile(flex_attention, dynamic=False)
    blocks = length // options.stride
    local = create_block_mask(in_window, None, None, length, length, device=str(device))
    coarse = create_block_mask(finished, None, None, length, blocks, device=str(device))

    def pooled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (t.unflatten(2, (blocks, options.stride)).mean(3) for t in (key, value))
        return compiled(query, key, value, block_mask=coarse)

    return {f"window {options.window}": partial(compiled, block_mask=local), f"stride {options.stride}": pooled}


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
    all_of_them = contestants(options, length, device)
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


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 8192, 16384])
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, at least one text")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'tokens':>7}  {'attention':<28}{'ms':>9}{'ratio':>8}{'MiB':>8}")
    for length in options.lengths:
        rows[str(length)] = compare_at(length, options)
        for name, row in rows[str(length)].items():
            memory = f"{row['bytes'] / 2**20:>8.0f}" if row["bytes"] else ""
            print(f"{length:>7}  {name:<28}{row['seconds'] * 1e3:>9.2f}{row['ratio']:>7.2f}x{memory}", flush=True)
    if options.out is not None:
        described = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        write_json_atomic(options.out, {"options": described, "environment": describe_environment(), "lengths": rows})


if __name__ == "__main__":
    main()
