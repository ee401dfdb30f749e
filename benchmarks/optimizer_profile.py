"""Which operations the step of an optimiser spends its time in, by torch's profiler.

    python benchmarks/optimizer_profile.py                                      Kalma on llama-small
    python benchmarks/optimizer_profile.py --methods kalma muon --hidden_size 384 --num_hidden_layers 10

Forward and backward run outside the profile. A number of steps that is a multiple of 30 meets turns of the bases and
refreshes of P as often as a long run does. On a GPU also the launches of kernels are counted.
"""

from __future__ import annotations

import argparse
from collections import Counter

from torch.profiler import ProfilerActivity, profile

from kalmagrove.precision import synchronize
from optimizer_lab.methods import METHODS
from optimizer_times import add_model_options, contestant
from paired import Contestant, random_tokens

WARMUP_STEPS = 4
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def profile_steps(own: Contestant, steps: int, batch: tuple[int, int, int]) -> tuple[Counter[str], Counter[str]]:
    """Microseconds of each operation itself, and how often it ran, summed over the steps of the optimisers."""
    device = next(own.model.parameters()).device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    microseconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for step in range(WARMUP_STEPS + steps):
        own.backward(random_tokens(step, *batch).to(device))
        synchronize(device)
        with profile(activities=activities) as record:
            own.update()
            synchronize(device)
        if step < WARMUP_STEPS:
            continue
        for event in record.key_averages():
            own_time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            microseconds[event.key] += own_time
            counts[event.key] += event.count
    return microseconds, counts


def main() -> None:
    """Profiles and prints, a table a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["kalma"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args()
    batch = (options.batch_size, options.context_length, options.vocab_size)
    for method in options.methods:
        microseconds, counts = profile_steps(contestant(method, options), options.steps, batch)
        launches = sum(counts[name] for name in LAUNCHES)
        total = sum(microseconds.values())
        print(f"{method}: {total / options.steps / 1e3:.2f} ms a step", end="")
        print(f", {launches / options.steps:.0f} launches" if launches else "")
        for name, own in microseconds.most_common(options.rows):
            share, each, count = own / total, own / options.steps / 1e3, counts[name] / options.steps
            print(f"{share:>7.1%}{each:>9.3f} ms{count:>8.1f}x  {name[:90]}")


if __name__ == "__main__":
    main()
