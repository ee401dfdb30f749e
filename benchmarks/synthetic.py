"""Trains model families on the two synthetic tasks at several contexts and prints how far they stay above the optimum.

    python benchmarks/synthetic.py
    python benchmarks/synthetic.py --families llama kalmagrove --size mini --contexts 128 512 --tokens 3m --seeds 0 1 2
    python benchmarks/synthetic.py --optim kalma --out runs/synthetic-kalma
    python benchmarks/synthetic.py --page docs/results/synthetic.md

Every run has the same tokens and the same tokens a step, whatever its context. The markov source is the same at every
context; a document of recall is half a context long on average, and its pairs and questions grow with it, so that
answers are as frequent at every context. Each text is twice as long as what is read of it. All models are tuned alike:
on each task and context each tries all learning rates of --lr_scales with the first seed, and further ones while the
best is at the edge; the other seeds have the one with the least validation loss. A run leaves one JSON file under --out
and is not repeated; tables come at the end, from the files. With --page nothing is trained: the records are added to
the .json file beside the page, and its tables, between ``<!-- table KIND:TASK:GROUP -->`` and ``<!-- end -->``, are
written again; a page that does not exist yet is begun. GROUP is size, tokens and tokens a step, e.g. tiny-1m-2048.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kalmagrove.commands.parsing import open_data
from kalmagrove.data.packing import open_packed
from kalmagrove.data.synthetic.options import parse_synthetic
from kalmagrove.evaluation.synthetic import entropy_rate
from kalmagrove.files import write_json_atomic, write_text_atomic
from kalmagrove.models.accounting import count_parameters
from kalmagrove.models.presets import FAMILIES, SIZES
from kalmagrove.quantities import parse_count
from kalmagrove.report.statistics import Interval, mean_interval
from kalmagrove.training.config import BASELINE_FAMILIES, DataConfig, LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.environment import describe_environment
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.trainer import score_split
from parallel import diverged_in_training, stored, workers
from tuning import tune

Record = dict[str, Any]

TOKENS_A_PAIR = 32
"""Tokens of the context for each pair of a document of recall; it has three times as many questions."""
TASKS = {
    "markov": "synthetic:markov,states=512,levels=3,symbols=256,length=1024",
    "recall": "synthetic:recall,keys=32,values=32,distractors=32",
}
MARK = re.compile(
    r"(<!-- table (?P<kind>excess|recall|rate):(?P<task>\w+):(?P<group>[\w-]+) -->\n).*?(<!-- end -->)", re.S
)
HEADING = """# Synthetic tasks

Loss above the best possible one, on two made languages whose optimum is known exactly
(`kalmagrove train --data synthetic:markov` and `--data synthetic:recall`); means over seeds with 95 % intervals.
"""
TITLES = {"rate": "Entropy rate", "excess": "Loss above the optimum", "recall": "Answers by distance"}


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        task: markov or recall.
        source: The task with its options.
        family: Of the model.
        size: Of the model.
        optimizer: Name of the optimiser.
        lr_scale: Multiplies the optimiser's usual learning rates.
        context: Tokens of a window.
        seed: Of the start and the order of the data.
        tokens: Training tokens, as on the command line.
        tokens_per_step: Of an optimiser step.
    """

    task: str
    source: str
    family: str
    size: str
    optimizer: str
    lr_scale: float
    context: int
    seed: int
    tokens: str
    tokens_per_step: int

    @property
    def group(self) -> str:
        """What all runs of a table share."""
        return f"{self.size}-{self.tokens}-{self.tokens_per_step}"

    @property
    def name(self) -> str:
        """Of its file."""
        model = f"{self.family}-{self.optimizer}-x{self.lr_scale:g}"
        return f"{self.group}/{self.task}-{self.context}/{model}-seed{self.seed}"


def run_job(job: Job, *, folders: dict[str, Path], out: Path) -> Record:
    """The record of a job: read where it exists, else trained and written."""
    record = stored(out / f"{job.name}.json", lambda: train(job, folders[job.source]))
    if record["source"] != job.source:
        raise SystemExit(f"{out / job.name}.json is of {record['source']}, not {job.source}; choose another --out")
    return record


def train(job: Job, data_folder: Path) -> Record:
    """Trains one model and scores it on the validation and test split."""
    config = TrainConfig(
        model=ModelConfig(preset=f"{job.family}-{job.size}"),
        optim=OptimConfig(name=job.optimizer, lr_scale=job.lr_scale),  # type: ignore[arg-type]
        loop=LoopConfig(
            tokens=job.tokens,
            batch_size=job.tokens_per_step // job.context,
            context_length=job.context,
            seed=job.seed,
        ),
    )
    run = TrainingRun(config, open_packed(data_folder, verify=False))
    started = time.monotonic()
    diverged = diverged_in_training(run)
    seconds = time.monotonic() - started
    return {
        **asdict(job),
        "group": job.group,
        "parameters": count_parameters(run.model).total,
        "steps": run.step,
        "seconds": seconds,
        "diverged": diverged,
        **{split: None if diverged else score_split(run, split).to_dict() for split in ("valid", "test")},
        "data_fingerprint": run.data.fingerprint,
        "environment": describe_environment(),
    }


def rate_of(task: str, source: str, group: str) -> Record:
    """The entropy rate of a source, as a record."""
    return {"task": task, "source": source, "group": group, "entropy_rate": asdict(entropy_rate(source))}


def source_of(task: str, context: int, extra: str, tokens: str) -> str:
    """A task at a context, with the options of the command line in the place of the usual ones."""
    pairs = max(1, context // TOKENS_A_PAIR)
    sizes = f",pairs={pairs},queries={3 * pairs},length={max(11 * pairs, context // 2)}" if task == "recall" else ""
    prefix, *usual = f"{TASKS[task]}{sizes},tokens={2 * parse_count(tokens)}".split(",")
    options = dict(item.partition("=")[::2] for item in [*usual, *(extra.split(",") if extra else [])])
    source = ",".join([prefix, *(f"{name}={value}" for name, value in options.items())])
    parse_synthetic(source)
    return source


def untuned(options: argparse.Namespace) -> list[Job]:
    """Every model on every task at every context, with the first seed and the usual learning rate."""
    return [
        Job(
            task=task,
            source=source_of(task, context, getattr(options, task), options.tokens),
            family=family,
            size=options.size,
            optimizer=options.optim or ("adamw" if family in BASELINE_FAMILIES else "kalma"),
            lr_scale=1.0,
            context=context,
            seed=min(options.seeds),
            tokens=options.tokens,
            tokens_per_step=options.tokens_per_step,
        )
        for task in options.tasks
        for context in options.contexts
        for family in options.families
    ]


def at_rate(job: Job, lr_scale: float) -> Job:
    """The same run at another learning rate."""
    return replace(job, lr_scale=lr_scale)


def valid_loss(record: Record) -> float:
    """What the learning rate is chosen by."""
    return math.inf if record["diverged"] else float(record["valid"]["loss"])


def at_best_rate(records: Sequence[Record]) -> list[Record]:
    """Without the runs at other learning rates than a model's best on the task at the context."""
    runs = [record for record in records if "family" in record]
    best: dict[tuple[Any, ...], Record] = {}
    for record in sorted(runs, key=lambda r: (r["seed"], valid_loss(r))):
        best.setdefault(_model(record), record)
    return [r for r in records if "family" not in r or r["lr_scale"] == best[_model(r)]["lr_scale"]]


def _model(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("group", "source", "context", "family", "optimizer"))


def describe(record: Record) -> str:
    """One line of progress."""
    if "entropy_rate" in record:
        return f"{record['source']}: entropy rate {record['entropy_rate']['upper']:.4f} nats a token"
    start = (
        f"{record['task']:<7}{record['context']:>6} {label(record):<21} x{record['lr_scale']:<4g} seed {record['seed']}"
    )
    if record["diverged"]:
        return f"{start}  diverged at step {record['steps'] + 1}"
    test = record["test"]
    recalled = f"  answers {test['recall']['accuracy']:.1%}" if "recall" in test else ""
    return f"{start}  excess {test['excess']:.4f}{recalled}  {record['seconds']:.0f} s"


def label(record: Record) -> str:
    """A row's model."""
    return f"{record['family']} ({record['optimizer']})"


def rows_of(records: Sequence[Record]) -> dict[tuple[int, str], list[Record]]:
    """Runs by context and model, those that diverged left out."""
    rows: dict[tuple[int, str], list[Record]] = {}
    for context in {record["context"] for record in records}:
        sources = sorted({record["source"] for record in records if record["context"] == context})
        if len(sources) > 1:
            raise SystemExit(f"runs of {' and of '.join(sources)} cannot stand in one table; keep one of them")
    for record in sorted(records, key=lambda r: (r["context"], label(r), r["seed"])):
        if not record["diverged"]:
            rows.setdefault((record["context"], label(record)), []).append(record)
    return rows


def excess_table(records: Sequence[Record]) -> str:
    """Markdown: a row a context and model; differences to llama are paired by seed."""
    runs = [record for record in records if "family" in record]
    rows = rows_of(runs)
    lines = [
        "| context | model | parameters | rate | seeds | optimum | loss above it (95 %) | minus best llama (95 %) "
        "| seconds |",
        "| --: | :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for (context, name), own in rows.items():
        above = {record["seed"]: record["test"]["excess"] for record in own}
        first = own[0]
        lines.append(
            f"| {context} | {name} | {first['parameters'] / 1e6:.3f} M | x{first['lr_scale']:g} | {len(own)} | "
            f"{first['test']['optimum']:.4f} | {_shown(mean_interval(list(above.values())))} | "
            f"{_against_llama(context, above, rows, name)} | "
            f"{mean_interval([record['seconds'] for record in own]).mean:.0f} |"
        )
    lost = [record for record in runs if record["diverged"]]
    return "\n".join([*lines, *(f"\n{describe(record)}" for record in lost)])


def _against_llama(context: int, above: dict[int, float], rows: dict[tuple[int, str], list[Record]], name: str) -> str:
    """The difference to the best llama at the same context, paired by seed."""
    llamas = {
        other: {record["seed"]: record["test"]["excess"] for record in own}
        for (c, other), own in rows.items()
        if c == context and own[0]["family"] == "llama"
    }
    best = min(llamas, key=lambda other: mean_interval(list(llamas[other].values())).mean, default=name)
    if best == name:
        return ""
    apart = [above[seed] - llamas[best][seed] for seed in sorted(above.keys() & llamas[best].keys())]
    return _shown(mean_interval(apart)) if apart else ""


def recall_table(records: Sequence[Record]) -> str:
    """Markdown: the share of right answers, a row a context and model, a column a distance."""
    rows = rows_of([record for record in records if record["task"] == "recall" and "family" in record])
    found = {bound for own in rows.values() for r in own for bound in r["test"]["recall"]["by_distance_below"]}
    bounds = sorted(found, key=int)
    lines = [
        f"| context | model | all answers (95 %) | {' | '.join(f'< {bound} tokens' for bound in bounds)} |",
        "| --: | :-- | --: |" + " --: |" * len(bounds),
    ]
    for (context, name), own in rows.items():
        recalls = [record["test"]["recall"] for record in own]
        cells = []
        for bound in bounds:
            shares = [r["by_distance_below"][bound]["accuracy"] for r in recalls if bound in r["by_distance_below"]]
            cells.append(f"{mean_interval(shares).mean:.1%}" if shares else "")
        whole = _shown(mean_interval([100 * recall["accuracy"] for recall in recalls]), digits=1, within=(0.0, 100.0))
        lines.append(f"| {context} | {name} | {whole} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_table(records: Sequence[Record]) -> str:
    """Markdown: the entropy rates, a row a source; and what windows of each context cost at best."""
    optima: dict[str, dict[int, float]] = {}
    for record in records:
        if "family" in record and not record["diverged"]:
            optima.setdefault(record["source"], {})[record["context"]] = record["test"]["optimum"]
    lines = [
        "| source | entropy rate, nats a token (bounds, standard error) | optimum by context |",
        "| :-- | --: | :-- |",
    ]
    for record in records:
        if "entropy_rate" in record:
            rate = record["entropy_rate"]
            own = ", ".join(
                f"{context}: {best:.4f}" for context, best in sorted(optima.get(record["source"], {}).items())
            )
            error = max(rate["lower_error"], rate["upper_error"])
            lines.append(f"| `{record['source']}` | {rate['lower']:.4f} to {rate['upper']:.4f} ({error:.4f}) | {own} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "rate": rate_table,
    "excess": excess_table,
    "recall": recall_table,
}


def fill_page(page: Path, runs: Path) -> None:
    """Adds the records of the runs to the file beside the page, and writes the page's tables."""
    kept_path = page.with_suffix(".json")
    kept: list[Record] = json.loads(kept_path.read_text("utf-8")) if kept_path.exists() else []
    new = [json.loads(path.read_text("utf-8")) for path in sorted(runs.rglob("*.json"))]
    records = {_identity(record): _without_machine(record) for record in [*kept, *new] if "group" in record}
    chosen = [records[key] for key in sorted(records)]
    if not chosen:
        raise SystemExit(f"there are no records in {runs} and none in {kept_path}; run the benchmark first")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(kept_path, chosen)
    text = page.read_text("utf-8") if page.exists() else _new_page(chosen)

    def fill(match: re.Match[str]) -> str:
        own = at_best_rate([r for r in chosen if r["task"] == match["task"] and r["group"] == match["group"]])
        if not own:
            raise SystemExit(f"{page} has a table {match['task']}:{match['group']}, but there are no such runs")
        return match[1] + TABLES[match["kind"]](own) + "\n" + match[5]

    write_text_atomic(page, MARK.sub(fill, text))


def _new_page(records: Sequence[Record]) -> str:
    parts = [HEADING]
    for group, task in sorted({(record["group"], record["task"]) for record in records}):
        parts.append(f"\n## {task}, {group}\n")
        for kind in TABLES if task == "recall" else ("rate", "excess"):
            parts.append(f"\n{TITLES[kind]}:\n\n<!-- table {kind}:{task}:{group} -->\n<!-- end -->\n")
    return "".join(parts)


def _identity(record: Record) -> tuple[str, ...]:
    names = ("group", "task", "source", "family", "optimizer")
    numbers = (f"{record.get(name, -1):014.1f}" for name in ("context", "seed", "lr_scale"))
    return (*(str(record.get(name, "")) for name in names), *numbers)


def _without_machine(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "environment"}


def _shown(interval: Interval, digits: int = 4, within: tuple[float, float] = (-math.inf, math.inf)) -> str:
    bounds = interval.bounds and [min(within[1], max(within[0], bound)) for bound in interval.bounds]
    spread = "" if bounds is None else f" ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"
    return f"{interval.mean:.{digits}f}{spread}"


def run_all(options: argparse.Namespace) -> None:
    """Runs what is missing and prints the tables."""
    jobs = untuned(options)
    sources = {job.source: job for job in jobs}
    folders = {source: open_data(DataConfig(source=source)).folder for source in sources}
    records: list[Record] = []
    for number, (source, job) in enumerate(sources.items()):
        path = options.out / job.group / f"{job.task}-{job.context if job.task == 'recall' else 'all'}" / "rate.json"
        records.append(stored(path, partial(rate_of, job.task, source, job.group)))
        print(f"source {number + 1} of {len(sources)}: {describe(records[-1])}", flush=True)
    with workers(partial(run_job, folders=folders, out=options.out), describe, options.workers) as run_jobs:
        scales = tune(run_jobs, {job: partial(at_rate, job) for job in jobs}, valid_loss, options.lr_scales)
        records += run_jobs(
            [replace(at_rate(job, scales[job].factor), seed=seed) for seed in options.seeds for job in jobs]
        )
    for task in options.tasks:
        for kind in TABLES if task == "recall" else ("rate", "excess"):
            print(f"\n{task}: {TITLES[kind]}\n\n{TABLES[kind]([r for r in records if r['task'] == task])}", flush=True)


def main() -> None:
    """Runs what is missing, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["llama", "slim", "kalmagrove"])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--lr_scales", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", default="1m", help="training tokens of a run")
    parser.add_argument("--tokens_per_step", type=int, default=2048)
    parser.add_argument(
        "--optim", choices=["kalma", "muon", "adamw"], help="left out: adamw for gpt2 and llama, else kalma"
    )
    parser.add_argument(
        "--markov", default="", help="options in the place of the usual ones, such as states=64,symbols=64"
    )
    parser.add_argument("--recall", default="", help="options in the place of the usual ones, such as pairs=8")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--page", type=Path, help="only write this page from the records")
    options = parser.parse_args()
    if options.page is not None:
        fill_page(options.page, options.out)
        return
    uneven = [context for context in options.contexts if options.tokens_per_step % context]
    if uneven:
        parser.error(f"--tokens_per_step {options.tokens_per_step} is no whole number of windows of {uneven[0]} tokens")
    run_all(options)


if __name__ == "__main__":
    main()
