"""Adapts a trained base to domains by full fine-tuning, LoRA and task cores; prints gain and forgetting.

    python benchmarks/adaptors.py --domains biomedical --seeds 0
    python benchmarks/adaptors.py --base runs/book --seeds 0 1 2 --tokens 1m

Needs ../shared/data and the extra "peft". Without --base a kalmagrove-mini is trained on the textbooks first. All
methods adapt the base's dense form, see the same tokens in the same order, and are tuned alike: each at its rates of
--lr_scales with the first seed on the validation split, the best rate with the other seeds. Gain is the fall of the
domain's validation loss in nats a token, forgetting the rise of that of the base's own text. A run leaves one JSON file
and is not repeated; the table comes at the end, from the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.adaptors import Adaptors
from kalmagrove.adaptors.gradients import text_bases
from kalmagrove.commands.parsing import open_data, say
from kalmagrove.data.batches import batch_at, evaluation_windows
from kalmagrove.data.packing import PackedText, open_packed
from kalmagrove.models.convert import as_decoder, load_model
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.merging import merge
from kalmagrove.models.scoring import nats_of_windows
from kalmagrove.optim.schedules import learning_rate_factor
from kalmagrove.precision import autocast, choose_precision
from kalmagrove.report.statistics import Interval, mean_interval
from kalmagrove.training.checkpoint_model import train_config_of
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig, parse_count
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.trainer import train
from parallel import stored, workers

SHARED = Path(__file__).parents[2] / "shared" / "data"
DOMAINS = ("biomedical", "legal", "technical")
VALIDATION_TOKENS, GRADIENT_TOKENS, WARMUP_PART = 65536, 65536, 0.1
CPU = torch.device("cpu")
RATES = {"full": 1e-3, "lora": 7e-3, "xs": 3e-2, "core": 4e-3, "dense": 2e-3}
METHODS = ("full-0", "lora-1", "lora-4", "lora-8", "lora-16", "core-12", "core-64", "core-128", "dense-7", "xs-14")

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One adaptation.

    Attributes:
        method: full-0, or a rank behind lora, core (diagonal, the gradient's bases), dense (the same bases) or xs
            (dense, the weights' bases: LoRA-XS).
        domain: Folder of the shared texts.
        lr_scale: Multiplies the method's usual rate.
        seed: Of the order of the data and of LoRA's first factor.
        tokens: Of the training.
        batch_size: Sequences of a step.
        context_length: Tokens of a sequence.
    """

    method: str
    domain: str
    lr_scale: float
    seed: int
    tokens: int
    batch_size: int = 8
    context_length: int = 256

    @property
    def name(self) -> str:
        """Of its file."""
        sizes = f"{self.tokens}-{self.batch_size}-{self.context_length}"
        return f"{sizes}/{self.domain}/{self.method}-x{self.lr_scale:g}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // (self.batch_size * self.context_length)

    def batches(self, data: PackedText, steps: range) -> Iterator[Tensor]:
        """Tokens of steps, (sequences, context + 1)."""
        tokens, sizes = data.tokens("train"), {"context_length": self.context_length, "batch_size": self.batch_size}
        for step in steps:
            yield torch.from_numpy(batch_at(tokens, **sizes, seed=self.seed, step=step))


def run_job(job: Job, *, base: Path, data: dict[str, Path], out: Path) -> Record:
    """The record of a job: read where it exists, else adapted and written."""
    return stored(out / f"{job.name}.json", lambda: adapt(job, base, data))


def adapt(job: Job, base: Path, data: dict[str, Path]) -> Record:
    """Adapts the base and scores it on the domain's and on its own validation split."""
    opened = {name: open_packed(folder, verify=False) for name, folder in data.items() if name in (job.domain, "base")}
    model = merge(as_decoder(load_model(base))).requires_grad_(False)
    before = {name: validation_loss(model, text, job.context_length) for name, text in opened.items()}
    parameters = trained_parameters(job, model, opened[job.domain])
    train_parameters(job, model, parameters, opened[job.domain])
    after = {name: validation_loss(model, text, job.context_length) for name, text in opened.items()}
    return {
        **asdict(job),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "gain": before[job.domain] - after[job.domain],
        "forgetting": after["base"] - before["base"],
        "base_loss": before[job.domain],
        "data_fingerprint": opened[job.domain].fingerprint,
        "environment": describe_environment(),
    }


def validation_loss(model: KalmaGroveForCausalLM, data: PackedText, context_length: int) -> float:
    """Mean nats a token of the first part of the validation split."""
    tokens = data.tokens("valid")[: VALIDATION_TOKENS + 1]
    windows = evaluation_windows(tokens, context_length=context_length, stride=context_length)
    sizes = {"vocab_size": model.config.vocab_size, "device": CPU, "precision": choose_precision("auto", CPU)}
    nats, count = nats_of_windows(model, windows, **sizes)
    return nats / count


def trained_parameters(job: Job, model: KalmaGroveForCausalLM, data: PackedText) -> list[nn.Parameter]:
    """Puts the method's parameters into the model."""
    kind, rank = job.method.split("-")[0], int(job.method.split("-")[1])
    if kind == "full":
        return list(model.requires_grad_(True).parameters())
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(job.seed)
            lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
            return [p for p in get_peft_model(model, lora).parameters() if p.requires_grad]
    adaptors = Adaptors(model)
    bases = None
    if kind in ("core", "dense"):
        count = -(-GRADIENT_TOKENS // (job.batch_size * job.context_length))
        batches = job.batches(data, range(job.steps, job.steps + count))
        bases = text_bases(model, adaptors.layers, batches, partial(loss_sum, model), rank)
    own_rank = rank if bases is None else None
    cores = adaptors.add_adaptor(job.method, own_rank, core="diagonal" if kind == "core" else "dense", bases=bases)
    adaptors.set_adaptor(job.method)
    return list(cores.values())


def loss_sum(model: KalmaGroveForCausalLM, tokens: Tensor) -> Tensor:
    """Summed nats of a batch, (sequences, context + 1)."""
    return model.token_loss_sum(tokens[:, :-1], tokens[:, 1:])


def train_parameters(job: Job, model: KalmaGroveForCausalLM, parameters: list[nn.Parameter], data: PackedText) -> None:
    """AdamW with a linear schedule, the same for every method."""
    peak = RATES[job.method.split("-")[0]] * job.lr_scale
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    for step, tokens in enumerate(job.batches(data, range(job.steps))):
        factor = learning_rate_factor("linear", step, job.steps, round(WARMUP_PART * job.steps))
        optimizer.param_groups[0]["lr"] = peak * factor
        with autocast(choose_precision("auto", CPU), CPU):
            loss = loss_sum(model, tokens)
        (loss / tokens[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def describe(record: Record) -> str:
    """One line of progress."""
    return (
        f"{record['domain']:<12}{record['method']:<10}{record['parameters']:>9,}  x{record['lr_scale']:<6g}seed "
        f"{record['seed']}  gain {record['gain']:.4f}  forgetting {record['forgetting']:+.4f}"
    )


def table(domain: str, records: dict[str, list[Record]]) -> str:
    """Gain and forgetting of each method, and the gain relative to each LoRA's."""
    gains = {method: mean_interval([record["gain"] for record in runs]) for method, runs in records.items()}
    loras = [method for method in records if method.startswith("lora")]
    rows = [
        f"| {domain} | trained | gain, nats | forgetting, nats | " + " | ".join(f"of {name}" for name in loras) + " |"
    ]
    rows.append("| :-- |" + " --: |" * (3 + len(loras)))
    for method, runs in records.items():
        forgetting = mean_interval([record["forgetting"] for record in runs]).mean
        shares = [f"{gains[method].mean / gains[name].mean:.0%}" for name in loras]
        trained = runs[0]["parameters"]
        rows.append(
            f"| {method} | {trained:,} | {shown(gains[method])} | {forgetting:+.4f} | " + " | ".join(shares) + " |"
        )
    return "\n".join(rows)


def shown(gain: Interval) -> str:
    """The mean, and the interval where there are enough seeds."""
    bounds = "" if gain.bounds is None else f" ({gain.bounds[0]:.4f} to {gain.bounds[1]:.4f})"
    return f"{gain.mean:.4f}{bounds}"


def trained_base(out: Path) -> Path:
    """A kalmagrove-mini of the textbooks, trained once."""
    config = TrainConfig(
        data=DataConfig(source=str(SHARED / "textbooks")),
        model=ModelConfig(preset="kalmagrove-mini"),
        optim=OptimConfig(),
        loop=LoopConfig(tokens="5m"),
    )
    train(config, open_data(config.data), out / "base", say=say)
    return out / "base"


def main() -> None:
    """Runs what is missing and prints everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a run folder; left out: trained on the textbooks")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--lr_scales", nargs="+", type=float, default=[0.15, 0.5, 1.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", default="1m")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/adaptors"))
    options = parser.parse_args()
    base = options.base or trained_base(options.out)
    tokenizer = str(base / "model")
    data = {name: open_data(DataConfig(str(SHARED / name), tokenizer=tokenizer)).folder for name in options.domains}
    data["base"] = open_data(train_config_of(RunFolder(base)).data).folder
    job = partial(Job, tokens=parse_count(options.tokens))
    run = partial(run_job, base=base, data=data, out=options.out)
    tables = []
    with workers(run, describe, options.workers) as run_all:
        for domain in options.domains:
            first, *others = options.seeds
            trials = run_all([job(m, domain, x, first) for m in options.methods for x in options.lr_scales])
            best = {
                method: max((r for r in trials if r["method"] == method), key=lambda r: r["gain"])
                for method in options.methods
            }
            rest = run_all([job(m, domain, best[m]["lr_scale"], seed) for m in options.methods for seed in others])
            runs = {m: [best[m], *(r for r in rest if r["method"] == m)] for m in options.methods}
            tables.append(table(domain, runs))
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
