"""Densities of a patch in the same small decoder: bits a pixel of test images, parameters, and time a step.

    python benchmarks/patch_density.py
    python benchmarks/patch_density.py --sets digits --densities errors nade --steps 100 --seeds 0

Digits of scikit-learn in patches of 2 x 2, and squares cut out of two photographs in coloured patches of 4 x 4; a llama
of hidden size 64 with 3 layers, trained by Kalma. Nothing but the density differs. A run leaves one JSON file under
--out and is not repeated. All of it takes about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from images_lab.data import SETS
from images_lab.densities import DENSITIES
from images_lab.ours import BATCH_SIZE, VARIANTS, source_of
from kalmagrove.data.example_store import PackedExamples, prepare_examples
from kalmagrove.data.images.source import ImageSource
from kalmagrove.modalities.patch import bits_per_dimension
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.optim.build import build_optimizers, scale_learning_rates
from kalmagrove.optim.schedules import learning_rate_factor
from kalmagrove.report.statistics import mean_interval
from kalmagrove.training.environment import describe_environment
from parallel import stored

Record = dict[str, Any]
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16}


def build(data: PackedExamples, density: str, seed: int) -> KalmaGroveForCausalLM:
    """The decoder with a density."""
    options = {**SIZES, **data.model_options(), "max_position_embeddings": data.longest - 1}
    model = build_model(model_config("llama", options, eos_token_id=data.end_of_text_id), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modality = DENSITIES[density][1](SIZES["hidden_size"], **data.modalities["patch"])
        modality.apply(model._init_weights)
    model.model.modalities["patch"] = modality
    return model.train()


def fit(name: str, out: Path, density: str, seed: int, steps: int) -> Record:
    """Trains one model and scores the test images."""
    images = SETS[name]
    source = source_of(images, images.write(out / "data"), VARIANTS["llama"])
    assert isinstance(source, ImageSource)
    source.shuffles = False
    data = prepare_examples(source, out / "data" / f"{name}-packed")
    model = build(data, density, seed)
    optimizers = build_optimizers("kalma", model, lr=3e-3)
    terms: dict[str, Any] = {"context_length": data.longest - 1, "batch_size": BATCH_SIZE, "seed": seed}
    seconds = 0.0
    for step in range(steps):
        batch = data.batch("train", step=step, **terms)
        started = time.process_time()
        scale_learning_rates(optimizers, learning_rate_factor("linear", step, steps, steps // 20))
        loss = model.token_loss_sum(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds += time.process_time() - started
    nats, count = 0.0, data.splits["test"].documents
    model.eval()
    with torch.no_grad():
        for first in range(0, count, 50):
            rows = data.rows("test", range(first, min(first + 50, count)))
            nats += float(model.nats_by_kind(rows[:, :-1], rows[:, 1:])["patch"].sum())
    return {
        "set": name,
        "density": density,
        "seed": seed,
        "steps": steps,
        "bits_per_dimension": bits_per_dimension(nats / count, source.form.dimensions),
        "parameters": sum(parameter.numel() for parameter in model.model.modalities.parameters()),
        "milliseconds": 1000 * seconds / steps,
        "environment": describe_environment(),
    }


def table(records: list[Record]) -> str:
    """Markdown: a row a density; bits a pixel, parameters of the modality, and processor time of a step."""
    sets = list(dict.fromkeys(record["set"] for record in records))
    titles = " | ".join(f"{name}: bits | parameters | ms" for name in sets)
    lines = [f"| density of a patch | {titles} |", "| :-- |" + " --: |" * (3 * len(sets))]
    for density in dict.fromkeys(record["density"] for record in records):
        cells = []
        for name in sets:
            own = [record for record in records if (record["set"], record["density"]) == (name, density)]
            bits, ms = (
                mean_interval([record[key] for record in own]) for key in ("bits_per_dimension", "milliseconds")
            )
            cells += [f"{bits.mean:.3f}", f"{own[0]['parameters']:,}", f"{ms.mean:.0f}"]
        lines.append(f"| {DENSITIES[density][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=["digits", "photographs"], default=["digits", "photographs"])
    parser.add_argument("--densities", nargs="+", choices=list(DENSITIES), default=list(DENSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=300, help="of 32 images")
    parser.add_argument("--out", type=Path, default=Path("runs/patch-density"))
    options = parser.parse_args()
    records = []
    for name in options.sets:
        for density in options.densities:
            for seed in options.seeds:
                path = options.out / name / f"{density}-{options.steps}-seed{seed}.json"
                records.append(stored(path, partial(fit, name, options.out, density, seed, options.steps)))
                print(f"{name:<12} {density:<7} seed {seed}: {records[-1]['bits_per_dimension']:.4f}", flush=True)
    print("\n" + table(records))


if __name__ == "__main__":
    main()
