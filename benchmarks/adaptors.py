"""Adapts a trained base to domains by full fine-tuning, LoRA and task cores; prints gain and forgetting.

    python benchmarks/adaptors.py --domains biomedical --seeds 0
    python benchmarks/adaptors.py --base runs/book --seeds 0 1 2 --tokens 1m
    python benchmarks/adaptors.py --base runs/book --tokens 250k --page docs/results/adaptors.md

Needs the extra "peft", and in --texts a folder for each text: textbooks/ and the domains. Without --base a
kalmagrove-mini is trained on the textbooks first. All methods adapt the base's dense form, see the same tokens in the
same order, and are tuned alike: each at its rates of --lr_scales with the first seed on the validation split, further
rates while the best is at the edge, and the best rate with the other seeds. Cores between the gradient's bases read
the first tokens of the training once more before it, to find the bases: no other text, but more time, which the table
shows. Gain is the fall of the domain's test loss in nats a token, forgetting the rise of that of the base's own text;
shares of LoRA's gain are paired by seed. A run leaves one JSON file and is not repeated; the table comes at the end,
from the files. With --page it is put into that page too, and the numbers of the runs into the .json file beside it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.adaptors import Adaptors, model_fingerprint
from kalmagrove.adaptors.gradients import text_bases
from kalmagrove.commands.parsing import open_data, say
from kalmagrove.data.batches import batch_at, evaluation_windows
from kalmagrove.data.packing import PackedText, open_packed
from kalmagrove.models.convert import as_decoder, load_model
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.merging import merge
from kalmagrove.models.scoring import nats_of_windows
from kalmagrove.optim.build import keep_state
from kalmagrove.optim.schedules import learning_rate_factor
from kalmagrove.precision import autocast, choose_precision
from kalmagrove.quantities import parse_count
from kalmagrove.report.statistics import Interval, mean_interval
from kalmagrove.training.checkpoint_model import train_config_of
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.trainer import train
from marked import fill_page, keep_records
from parallel import stored, workers
from tuning import tune

DOMAINS = ("biomedical", "legal", "technical")
SCORED_TOKENS, GRADIENT_TOKENS, WARMUP_PART = 65536, 65536, 0.1
CPU = torch.device("cpu")
ROUNDS = 4
RATES = {"full": 1e-3, "lora": 7e-3, "xs": 3e-2, "core": 4e-3, "rounds": 2e-3, "dense": 2e-3}
METHODS = (
    "full-0",
    "lora-1",
    "lora-4",
    "lora-16",
    "lora-16x3",
    "core-12",
    "core-128",
    "rounds-8",
    "rounds-32",
    "xs-14",
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One adaptation.

    Attributes:
        method: full-0, or a rank behind lora, core (diagonal, the gradient's bases), rounds (the same, so many more
            in each of four parts of the training), dense (the gradient's bases) or xs (dense, the weights' bases:
            LoRA-XS). With x3 behind it the training reads its tokens three times.
        domain: Folder of the shared texts.
        lr_scale: Multiplies the method's usual rate.
        seed: Of the order of the data and of LoRA's first factor.
        tokens: Of the training.
        batch_size: Sequences of a step.
        context_length: Tokens of a sequence.
        base: Fingerprint of the base.
    """

    method: str
    domain: str
    lr_scale: float
    seed: int
    tokens: int
    batch_size: int = 8
    context_length: int = 256
    base: str = ""

    @property
    def name(self) -> str:
        """Of its file."""
        sizes = f"{self.tokens}-{self.batch_size}-{self.context_length}"
        return f"{self.base[:8]}-{sizes}/{self.domain}/{self.method}-x{self.lr_scale:g}-seed{self.seed}"

    @property
    def kind(self) -> str:
        """The method without its rank."""
        return self.method.split("-")[0]

    @property
    def rank(self) -> int:
        """Of the method."""
        return int(self.method.split("-")[1].split("x")[0])

    @property
    def passes(self) -> int:
        """Through the tokens."""
        return int(self.method.partition("x")[2] or 1) if self.kind != "xs" else 1

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.passes * self.steps_of_a_pass

    @property
    def steps_of_a_pass(self) -> int:
        """Optimiser steps that read all tokens once."""
        return self.tokens // (self.batch_size * self.context_length)

    def batches(self, data: PackedText, steps: range) -> Iterator[Tensor]:
        """Tokens of steps, (sequences, context + 1)."""
        tokens = data.tokens("train")
        for step in steps:
            batch = batch_at(
                tokens,
                context_length=self.context_length,
                batch_size=self.batch_size,
                seed=self.seed,
                step=step % self.steps_of_a_pass,
            )
            yield torch.from_numpy(batch)


def run_job(job: Job, *, base: Path, data: dict[str, Path], out: Path) -> Record:
    """The record of a job: read where it exists, else adapted and written."""
    return stored(out / f"{job.name}.json", lambda: adapt(job, base, data))


def adapt(job: Job, base: Path, data: dict[str, Path]) -> Record:
    """Adapts the base and scores it on the domain's splits and on its own text's."""
    opened = {name: open_packed(folder, verify=False) for name, folder in data.items() if name in (job.domain, "base")}
    model = merge(as_decoder(load_model(base))).requires_grad_(False)
    before = losses(job, model, opened)
    began = time.monotonic()
    if job.kind == "rounds":
        parameters = train_in_rounds(job, model, opened[job.domain])
    else:
        parameters = trained_parameters(job, model, opened[job.domain])
        train_steps(job, model, optimizer_of(job, parameters), opened[job.domain], range(job.steps))
    seconds = time.monotonic() - began
    after = losses(job, model, opened)
    lost = not all(map(math.isfinite, after.values()))
    return {
        **asdict(job),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "seconds": seconds,
        "base_loss": before["test"],
        "diverged": lost,
        "valid_gain": None if lost else before["valid"] - after["valid"],
        "gain": None if lost else before["test"] - after["test"],
        "forgetting": None if lost else after["base"] - before["base"],
        "data_fingerprint": opened[job.domain].fingerprint,
        "environment": describe_environment(),
    }


def losses(job: Job, model: KalmaGroveForCausalLM, opened: dict[str, PackedText]) -> dict[str, float]:
    """Mean nats a token of the first part of the domain's valid and test split and of the base's test split."""
    found = {}
    for name, text, split in (("valid", job.domain, "valid"), ("test", job.domain, "test"), ("base", "base", "test")):
        tokens = opened[text].tokens(split)[: SCORED_TOKENS + 1]
        windows = evaluation_windows(tokens, context_length=job.context_length, stride=job.context_length)
        sizes = {"vocab_size": model.config.vocab_size, "device": CPU, "precision": choose_precision("auto", CPU)}
        nats, count = nats_of_windows(model, windows, **sizes)
        found[name] = nats / count
    return found


def trained_parameters(job: Job, model: KalmaGroveForCausalLM, data: PackedText) -> list[nn.Parameter]:
    """Puts the method's parameters into the model."""
    kind, rank = job.kind, job.rank
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
        count = min(job.steps, -(-GRADIENT_TOKENS // (job.batch_size * job.context_length)))
        batches = job.batches(data, range(count))
        bases = text_bases(model, adaptors.layers, batches, partial(loss_sum, model), rank)
    own_rank = rank if bases is None else None
    cores = adaptors.add_adaptor(job.method, own_rank, core="diagonal" if kind == "core" else "dense", bases=bases)
    adaptors.set_adaptor(job.method)
    return list(cores.values())


def loss_sum(model: KalmaGroveForCausalLM, tokens: Tensor) -> Tensor:
    """Summed nats of a batch, (sequences, context + 1)."""
    return model.token_loss_sum(tokens[:, :-1], tokens[:, 1:])


def optimizer_of(job: Job, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW at the method's rate, the same for every method."""
    peak = RATES[job.kind] * job.lr_scale
    return torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)


def train_steps(
    job: Job, model: KalmaGroveForCausalLM, optimizer: torch.optim.AdamW, data: PackedText, steps: range
) -> None:
    """Some steps of a run whose schedule is linear over all of them."""
    (group,) = optimizer.param_groups
    peak = RATES[job.kind] * job.lr_scale
    for step, tokens in zip(steps, job.batches(data, steps), strict=True):
        group["lr"] = peak * learning_rate_factor("linear", step, job.steps, round(WARMUP_PART * job.steps))
        with autocast(choose_precision("auto", CPU), CPU):
            loss = loss_sum(model, tokens)
        (loss / tokens[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_in_rounds(job: Job, model: KalmaGroveForCausalLM, data: PackedText) -> list[nn.Parameter]:
    """Cores that gain directions before each part of the training, found in that part's own tokens."""
    adaptors, rank = Adaptors(model), job.rank
    most = -(-GRADIENT_TOKENS // (job.batch_size * job.context_length))
    optimizer: torch.optim.AdamW | None = None
    for number in range(ROUNDS):
        steps = range(number * job.steps // ROUNDS, (number + 1) * job.steps // ROUNDS)
        batches = job.batches(data, steps[:most])
        bases = text_bases(model, adaptors.layers, batches, partial(loss_sum, model), rank)
        if optimizer is None:
            cores = adaptors.add_adaptor(job.method, core="diagonal", bases=bases)
            adaptors.set_adaptor(job.method)
            optimizer = optimizer_of(job, list(cores.values()))
        else:
            former, cores = optimizer, adaptors.extend_adaptor(job.method, bases)
            optimizer = optimizer_of(job, list(cores.values()))
            keep_state(former, optimizer, extends=True)
        train_steps(job, model, optimizer, data, steps)
    return list(cores.values())


def describe(record: Record) -> str:
    """One line of progress."""
    start = (
        f"{record['domain']:<12}{record['method']:<10}{record['parameters']:>9,}  x{record['lr_scale']:<6g}seed "
        f"{record['seed']}  "
    )
    if record["diverged"]:
        return f"{start}diverged"
    return f"{start}gain {record['gain']:.4f}  forgetting {record['forgetting']:+.4f}  {record['seconds']:.0f} s"


def lost_gain(record: Record) -> float:
    """What the learning rate is chosen by, the smaller the better."""
    return math.inf if record["diverged"] else -float(record["valid_gain"])


def table(domain: str, records: dict[str, list[Record]]) -> str:
    """Gain and forgetting of each method, and the share of each LoRA's gain."""
    sound = {method: [record for record in runs if not record["diverged"]] for method, runs in records.items()}
    gains = {method: {record["seed"]: record["gain"] for record in runs} for method, runs in sound.items()}
    loras = [method for method in records if method.startswith("lora") and gains[method]]
    titles = " | ".join(f"of {name}" for name in loras)
    rows = [f"| {domain} | trained | rate | gain, nats | forgetting, nats | seconds | {titles} |"]
    rows.append("| :-- |" + " --: |" * (5 + len(loras)))
    for method, runs in sound.items():
        if not runs:
            rows.append(f"| {method} | diverged |" + " |" * (4 + len(loras)))
            continue
        means = {name: mean_interval([record[name] for record in runs]) for name in ("gain", "forgetting", "seconds")}
        shares = [shown(share_of(gains[method], gains[name]), "{:.0%}") for name in loras]
        lost = len(records[method]) - len(runs)
        rows.append(
            f"| {method}{f' ({lost} diverged)' if lost else ''} | {runs[0]['parameters']:,} | "
            f"x{runs[0]['lr_scale']:g} | {shown(means['gain'], '{:.4f}')} | {means['forgetting'].mean:+.4f} | "
            f"{means['seconds'].mean:.0f} | " + " | ".join(shares) + " |"
        )
    return "\n".join(rows)


def share_of(gains: dict[int, float], others: dict[int, float]) -> Interval | None:
    """A method's gain as a part of another's, paired by seed; None where that gained nothing."""
    seeds = sorted(gains.keys() & others.keys())
    if not seeds or any(others[seed] <= 0 for seed in seeds):
        return None
    return mean_interval([gains[seed] / others[seed] for seed in seeds])


def shown(interval: Interval | None, form: str) -> str:
    """The mean, and the interval where there are enough seeds."""
    if interval is None:
        return ""
    bounds = interval.bounds
    return form.format(interval.mean) + ("" if bounds is None else f" ({' to '.join(map(form.format, bounds))})")


def trained_base(texts: Path, out: Path) -> Path:
    """A kalmagrove-mini of the textbooks, trained once."""
    config = TrainConfig(
        data=DataConfig(source=str(texts / "textbooks")),
        model=ModelConfig(preset="kalmagrove-mini"),
        optim=OptimConfig(),
        loop=LoopConfig(tokens="5m"),
    )
    train(config, open_data(config.data), out / "base", say=say)
    return out / "base"


def trial(job: Job, lr_scale: float) -> Job:
    """The same adaptation at another learning rate."""
    return replace(job, lr_scale=lr_scale)


def main() -> None:
    """Runs what is missing and prints everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a run folder; left out: trained on the textbooks")
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="folder with a folder for each text")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--lr_scales", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", default="1m")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/adaptors"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    base = options.base or trained_base(options.texts, options.out)
    tokenizer = str(base / "model")
    data = {
        name: open_data(DataConfig(str(options.texts / name), tokenizer=tokenizer)).folder for name in options.domains
    }
    data["base"] = open_data(train_config_of(RunFolder(base)).data).folder
    identity = model_fingerprint(load_model(base))
    job = partial(Job, tokens=parse_count(options.tokens), base=identity)
    run = partial(run_job, base=base, data=data, out=options.out)
    tables: dict[str, str] = {}
    records: list[Record] = []
    with workers(run, describe, options.workers) as run_all:
        for domain in options.domains:
            first, *others = options.seeds
            trials = {m: partial(trial, job(m, domain, 1.0, first)) for m in options.methods}
            scales = tune(run_all, trials, lost_gain, options.lr_scales)
            seeds = [first, *others]
            found = run_all([job(m, domain, scales[m].factor, seed) for m in options.methods for seed in seeds])
            tables[domain] = table(domain, {m: [r for r in found if r["method"] == m] for m in options.methods})
            records += [{name: value for name, value in record.items() if name != "environment"} for record in found]
    print("\n" + "\n\n".join(tables.values()))
    if options.page is not None:
        keep_records(options.page.with_suffix(".json"), records, ("domain", "method", "seed", "tokens", "base"))
        fill_page(options.page, tables, heading="# Adaptors\n")


if __name__ == "__main__":
    main()
