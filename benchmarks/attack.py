"""Tries to break the comparison: other texts, contexts, batches and lengths, and a baseline that is tuned further.

    python benchmarks/attack.py --texts texts/ --page docs/results/attack.md
    python benchmarks/attack.py --texts texts/ --settings usual "four times the tokens" --seeds 0 1 2

Each setting trains llama with AdamW and with Kalma, and slim and kalmagrove with Kalma; the learning rate of each is
tuned on the first seed with full runs. In the usual setting x1, x2 and x4 are tried and up to four further while the
best is at the edge, and then that of embeddings, head and vectors alone, x0.25, x1 and x4 of it and further likewise;
in each other setting half, once and twice the rates that were best there, and further likewise. The test split is read
in the runs at the chosen rates alone. --texts is a folder with one for each text (textbooks, technical, biomedical,
shakespeare). A run leaves one JSON file and its weights under --out, named by its text and all of its options, and is
not repeated: leave the package as it is meanwhile. All of it takes about three hours on two slow cores with the default
size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kalmagrove.commands.parsing import open_data
from kalmagrove.comparison.config import Rates
from kalmagrove.data.packing import PackedText, open_packed
from kalmagrove.errors import UsageError
from kalmagrove.files import write_json_atomic, write_text_atomic
from kalmagrove.models.accounting import count_parameters
from kalmagrove.quantities import parse_count
from kalmagrove.report.statistics import mean_interval, ratio_interval
from kalmagrove.reproduction.answers import shown
from kalmagrove.training.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    TrainConfig,
    plain_options,
)
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.trainer import score_split
from parallel import diverged_in_training, stored, workers
from tuning import tune

Record = dict[str, Any]
MODELS: dict[str, tuple[str, OptimizerName]] = {
    "llama": ("llama", "adamw"),
    "llama+kalma": ("llama", "kalma"),
    "slim": ("slim", "kalma"),
    "kalmagrove": ("kalmagrove", "kalma"),
}
"""Family and optimiser by the name in the table."""
RIVALS = ("llama", "llama+kalma", "slim")
VOCABULARY = 512
FIRST_RATES, NEAR_RATES = (1.0, 2.0, 4.0), (0.5, 1.0, 2.0)
FIRST_AUXILIARY_RATES, AUXILIARY_STEP = (0.25, 1.0, 4.0), 4.0
TAIL_PART, TAIL_SAMPLES = 0.2, 20
"""The last part of a run over which a baseline's weights are averaged, and of how many steps in it."""
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "pico": {
        "deeper": {"hidden_size": 48, "num_hidden_layers": 8},
        "wider": {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 176},
    },
    "nano": {
        "deeper": {"hidden_size": 80, "num_hidden_layers": 6},
        "wider": {"hidden_size": 128, "num_hidden_layers": 2},
    },
}
"""Other shapes of llama by size, with within 6 % as many parameters as its usual one."""


@dataclass(frozen=True)
class Setting:
    """What is different from the usual.

    Attributes:
        name: Of the setting.
        text: Folder below --texts; None is the built-in corpus of Python code.
        tokens: Training tokens.
        batch_size: Sequences of a step.
        context_length: Tokens of a sequence.
        seed_shift: Added to every seed.
        baseline: Options of the optimiser that llama alone gets.
        shape: Name of the shape that llama alone gets.
        tail_average: Whether llama is scored with the mean of its last weights.
    """

    name: str
    text: str | None = "textbooks"
    tokens: str = "1m"
    batch_size: int = 8
    context_length: int = 256
    seed_shift: int = 0
    baseline: dict[str, Any] = field(default_factory=dict)
    shape: str | None = None
    tail_average: bool = False

    @property
    def is_of_llama(self) -> bool:
        """Whether the others do what they usually do."""
        return bool(self.baseline or self.shape or self.tail_average)


USUAL = Setting("usual")
SETTINGS = [
    USUAL,
    replace(USUAL, name="other seeds", seed_shift=100),
    *(replace(USUAL, name=text, text=text) for text in ("technical", "biomedical", "shakespeare")),
    replace(USUAL, name="Python code", text=None),
    replace(USUAL, name="context 64", context_length=64, batch_size=32),
    replace(USUAL, name="context 1024", context_length=1024, batch_size=2),
    replace(USUAL, name="a quarter of the batch", batch_size=2),
    replace(USUAL, name="four times the batch", batch_size=32),
    replace(USUAL, name="four times the tokens", tokens="4m"),
    replace(USUAL, name="baseline: no weight decay", baseline={"weight_decay": 0.0}),
    replace(USUAL, name="baseline: beta2 0.99", baseline={"beta2": 0.99}),
    replace(USUAL, name="baseline: cosine", baseline={"schedule": "cosine"}),
    replace(USUAL, name="baseline: short warm-up", baseline={"warmup": 0.02}),
    replace(USUAL, name="baseline: deeper", shape="deeper"),
    replace(USUAL, name="baseline: wider", shape="wider"),
    replace(USUAL, name="baseline: tail average", tail_average=True),
    replace(
        USUAL, name="baseline: tail average of a constant rate", tail_average=True, baseline={"schedule": "constant"}
    ),
]


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        is_final: Whether it is scored on the test split too; such a run shares its file with the trial that it was.
    """

    setting: Setting
    model: str
    rates: Rates
    seed: int
    size: str
    data_folder: Path
    fingerprint: str
    out: Path
    is_final: bool = False

    @property
    def averages_tail(self) -> bool:
        """Whether it is scored with the mean of its last weights."""
        return self.setting.tail_average and self.model == "llama"

    @property
    def path(self) -> Path:
        """Its record; settings that ask a model for the same run share it."""
        options = json.dumps([plain_options(train_config(self)), self.averages_tail], sort_keys=True)
        digest = hashlib.sha256(options.encode()).hexdigest()[:8]
        folder = self.out / self.size / self.fingerprint[:8]
        return folder / f"{self.model}-x{self.rates.scale:g}-seed{self.seed + self.setting.seed_shift}-{digest}.json"


def train_config(job: Job) -> TrainConfig:
    """The run of a job; what a baseline gets, the others do not."""
    setting, is_baseline = job.setting, job.model == "llama"
    family, optimizer = MODELS[job.model]
    shape: dict[str, Any] = SHAPES[job.size][setting.shape] if setting.shape and is_baseline else {}
    return TrainConfig(
        model=ModelConfig(preset=f"{family}-{job.size}", **shape),
        optim=OptimConfig(
            name=optimizer,
            lr_scale=job.rates.scale,
            auxiliary_lr=job.rates.auxiliary * OptimConfig.auxiliary_lr,
            **(setting.baseline if is_baseline else {}),
        ),
        loop=LoopConfig(
            tokens=setting.tokens,
            batch_size=setting.batch_size,
            context_length=setting.context_length,
            seed=job.seed + setting.seed_shift,
        ),
    )


def new_run(job: Job) -> TrainingRun:
    """The run before its first step."""
    return TrainingRun(train_config(job), open_packed(job.data_folder, verify=False))


def tail_steps(total: int) -> set[int]:
    """The steps after which weights are kept for an average, evenly over the last part, the last one among them."""
    length = round(total * TAIL_PART)
    return {total - length * place // TAIL_SAMPLES for place in range(TAIL_SAMPLES)}


def train(job: Job) -> Record:
    """Trains one model, keeps its weights and scores it on the validation split."""
    environment, run = describe_environment(), new_run(job)
    averaged = tail_steps(run.total_steps) if job.averages_tail else set()
    tail: list[dict[str, torch.Tensor]] = []

    def keep_weights() -> None:
        if run.step in averaged:
            tail.append({name: value.clone() for name, value in run.model.state_dict().items()})

    diverged = diverged_in_training(run, keep_weights)
    if tail and not diverged:
        run.model.load_state_dict({name: torch.stack([w[name] for w in tail]).mean(0) for name in tail[0]})
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    save_file(weights, job.path.with_suffix(".safetensors"))
    return {
        "model": job.model,
        "lr_scale": job.rates.scale,
        "auxiliary_scale": job.rates.auxiliary,
        "seed": job.seed + job.setting.seed_shift,
        "parameters": count_parameters(run.model).total,
        "valid": None if diverged else finite_scores(run, "valid"),
        "data_fingerprint": run.data.fingerprint,
        "environment": environment,
    }


def finite_scores(run: TrainingRun, split: str) -> Record | None:
    """Scores of a split; None where the loss is no number, as if the run had diverged."""
    scores = score_split(run, split).to_dict()
    return scores if math.isfinite(scores["loss"]) else None


def run_job(job: Job) -> Record:
    """The record of a job: read where it exists, else trained and written; the test split is added to a final one."""
    record = stored(job.path, partial(train, job))
    if job.is_final and "test" not in record:
        run = new_run(job)
        run.model.load_state_dict(load_file(job.path.with_suffix(".safetensors")))
        record["test"] = None if record["valid"] is None else finite_scores(run, "test")
        write_json_atomic(job.path, record)
    return record | {"setting": job.setting.name}


def describe(record: Record) -> str:
    """One line of progress."""
    loss = "diverged" if record["valid"] is None else f"valid {record['valid']['loss']:.4f}"
    rates = Rates(record["lr_scale"], record["auxiliary_scale"])
    return f"{record['setting']}: {record['model']} {shown_rates(rates)} seed {record['seed']}: {loss}"


RunAll = Callable[[list[Job]], list[Record]]


@dataclass(frozen=True)
class Tuning:
    """What was chosen in a setting.

    Attributes:
        rates: The best of each model.
        at_edge: The models of which a best rate is still at the edge of what was tried.
    """

    rates: dict[str, Rates]
    at_edge: set[str]


def tune_usual(run_all: RunAll, base: Job) -> Tuning:
    """The best rates of each model: of all together first, then of embeddings, head and vectors alone."""

    def trial(model: str, scale: float, auxiliary: float = 1.0) -> Job:
        return replace(base, model=model, rates=Rates(scale, auxiliary))

    scales = tune(run_all, {model: partial(trial, model) for model in MODELS}, valid_loss, FIRST_RATES)
    trials = {model: partial(trial, model, scale.factor) for model, scale in scales.items()}
    auxiliary = tune(run_all, trials, valid_loss, FIRST_AUXILIARY_RATES, step=AUXILIARY_STEP)
    rates = {model: Rates(scales[model].factor, auxiliary[model].factor) for model in MODELS}
    return Tuning(rates, {model for model in MODELS if scales[model].is_at_edge or auxiliary[model].is_at_edge})


def tune_near(run_all: RunAll, base: Job, usual: Tuning) -> Tuning:
    """The best rates around the usual setting's; of the models that do what they usually do, those."""

    def trial(model: str, factor: float) -> Job:
        near = usual.rates[model]
        return replace(base, model=model, rates=Rates(near.scale * factor, near.auxiliary))

    models = ["llama"] if base.setting.is_of_llama else list(MODELS)
    scales = tune(run_all, {model: partial(trial, model) for model in models}, valid_loss, NEAR_RATES)
    rates = usual.rates | {model: trial(model, scale.factor).rates for model, scale in scales.items()}
    kept = usual.at_edge - set(models)
    return Tuning(rates, kept | {model for model, scale in scales.items() if scale.is_at_edge})


def shown_rates(rates: Rates) -> str:
    """For a person: the second factor only where it is one."""
    return f"x{rates.scale:g}" + (f" (embeddings x{rates.auxiliary:g})" if rates.auxiliary != 1 else "")


def valid_loss(record: Record) -> float:
    """What the learning rate is chosen by."""
    return math.inf if record["valid"] is None else float(record["valid"]["loss"])


def row(setting: Setting, tuning: Tuning, records: list[Record]) -> str:
    """A line of the table."""
    own = {model: [record for record in records if record["model"] == model] for model in MODELS}
    scores = {
        model: {r["seed"]: r["test"]["perplexity"] for r in found if r["test"] is not None}
        for model, found in own.items()
    }
    ratios = [
        "as usual"
        if setting.is_of_llama and rival != "llama"
        else shown(ratio_interval(scores["kalmagrove"], scores[rival]))
        for rival in RIVALS
    ]
    chosen = ", ".join(shown_rates(tuning.rates[model]) + "*" * (model in tuning.at_edge) for model in MODELS)
    lost = {model: len(found) - len(scores[model]) for model, found in own.items()}
    lost_text = "".join(f" ({count} of {model} diverged)" for model, count in lost.items() if count)
    mean = mean_interval(list(scores["llama"].values())).mean if scores["llama"] else math.inf
    of_each = parse_count(setting.tokens) / own["llama"][0]["parameters"]
    cells = [f"{setting.name}{lost_text}", setting.tokens, f"{of_each:.1f}", f"{mean:.2f}", *ratios, chosen]
    return f"| {' | '.join(cells)} |"


def page(rows: list[str], records: list[Record], options: argparse.Namespace) -> str:
    """The page as Markdown."""
    words = ["--texts", "texts/", "--size", options.size, "--seeds", *map(str, options.seeds)]
    if options.settings != [setting.name for setting in SETTINGS]:
        words += ["--settings", *options.settings]
    machines = sorted({f"{r['environment']['cpu']}, PyTorch {r['environment']['packages']['torch']}" for r in records})
    sources = sorted({r["environment"]["source"] for r in records})
    shapes = [
        f"{name} {', '.join(f'{o} {v}' for o, v in shape.items())}" for name, shape in SHAPES[options.size].items()
    ]
    return "\n".join(
        [
            "# Where it holds and where it fades",
            "",
            f"    python benchmarks/attack.py {shlex.join(words)}",
            "",
            "kalmagrove with Kalma against llama with AdamW, and llama and slim with Kalma, all of size "
            f"`{options.size}` and tuned in each setting on the first seed: in `{USUAL.name}` x1, x2, x4 of the "
            "preset's rates and up to four further while the best was at the edge, then that of embeddings, head "
            "and vectors alone, x0.25, x1, x4 and further likewise; in the others half, once and twice what was "
            "best there, and further likewise (* where a best one is at the edge still). Ratios of test "
            "perplexity, paired by seed. All of it is **screening**: fewer than 20 training tokens a parameter of"
            f" llama. Vocabularies of {VOCABULARY}. What is not said is as in the first row: {USUAL.tokens} tokens"
            f" of {USUAL.text}, {USUAL.batch_size} x {USUAL.context_length} a step. What stands behind `baseline:`"
            f" is of llama with AdamW alone, so that the other columns stay as usual. Shapes: {'; '.join(shapes)}."
            f" A tail average is the mean of the weights after {TAIL_SAMPLES} steps over the last {TAIL_PART:.0%}."
            f" {'; '.join(machines)}, one thread a run; the package's source: {', '.join(sources)}.",
            "",
            "| setting | tokens | a parameter | llama's perplexity | "
            + " | ".join(f"against {rival} (95 %)" for rival in RIVALS)
            + " | rates, in turn |",
            "| :-- |" + " --: |" * (4 + len(RIVALS)),
            *rows,
            "",
        ]
    )


def data_of(setting: Setting, options: argparse.Namespace) -> PackedText:
    """The packed text of a setting.

    Raises:
        UsageError: It is not here.
    """
    source = None if setting.text is None else options.texts / setting.text
    if source is not None and not source.exists():
        raise UsageError(f"{source} is not here; name the other settings by --settings")
    data = open_data(DataConfig(source=None if source is None else str(source), vocab_size=VOCABULARY))
    assert isinstance(data, PackedText)
    return data


def first_job(setting: Setting, data: PackedText, options: argparse.Namespace) -> Job:
    """A job of a setting, from which the others differ by model, rates and seed."""
    seed = options.seeds[0]
    return Job(setting, "llama", Rates(1.0), seed, options.size, data.folder, data.fingerprint, options.out)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder with a folder for each text")
    parser.add_argument("--settings", nargs="+", choices=[s.name for s in SETTINGS], default=[s.name for s in SETTINGS])
    parser.add_argument("--size", choices=list(SHAPES), default="pico")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/attack"))
    parser.add_argument("--page", type=Path, default=None)
    options = parser.parse_args()
    settings = [setting for setting in SETTINGS if setting.name in options.settings]
    # Before hours of training, what is missing is named.
    texts = {setting.name: data_of(setting, options) for setting in [USUAL, *settings]}
    rows, records = [], []
    with workers(run_job, describe, options.workers) as run_all:
        usual = tune_usual(run_all, first_job(USUAL, texts[USUAL.name], options))
        for setting in settings:
            base = first_job(setting, texts[setting.name], options)
            tuning = usual if setting == USUAL else tune_near(run_all, base, usual)
            finals = [
                replace(base, model=m, rates=tuning.rates[m], seed=seed, is_final=True)
                for seed in options.seeds
                for m in MODELS
            ]
            found = run_all(finals)
            records += found
            rows.append(row(setting, tuning, found))
            print(rows[-1], flush=True)
    text = page(rows, records, options)
    print(text)
    if options.page is not None:
        write_text_atomic(options.page, text)


if __name__ == "__main__":
    main()
