"""``kalmagrove eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from kalmagrove.commands.parsing import make_parser, parse, print_json, require_left_out
from kalmagrove.errors import UsageError

EXAMPLES = """\
  kalmagrove eval runs/book --data other.txt
  kalmagrove eval path/to/a/hugging-face-folder --data texts/ --context_length 1024 --stride 512
  kalmagrove eval runs/recall --data synthetic:recall,pairs=8 --split test
  kalmagrove eval runs/book --tasks arc_easy,copa,lambada_openai --task_data tasks/"""
NOT_OF_TASKS = ("data", "split", "data_seed", "stride")
ONLY_OF_TASKS = ("task_data", "limit")


def make_eval_parser() -> ArgumentParser:
    """The flags of ``kalmagrove eval``."""
    parser = make_parser(
        "eval",
        "Perplexity a token and a word, and bits per byte, of a run folder or any Hugging Face folder on a text, or "
        "how many questions of evaluation tasks it answers.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument("model", type=str, help="a run folder, a model folder or a Hub name")
    parser.add_argument("--data", type=str, default=None, help="a text as for train; left out: the built-in corpus")
    parser.add_argument("--split", type=str, default=None, help="only this split of the text; left out: all of it")
    parser.add_argument(
        "--data_seed", type=int, default=None, help="divides a text without splits; left out: as a run divided its own"
    )
    parser.add_argument("--context_length", type=int, default=None, help="tokens; left out: the model's")
    parser.add_argument("--stride", type=int, default=None, help="tokens between windows; left out: the context")
    parser.add_argument(
        "--tasks", type=str, default=None, help="in the place of a text, by lm-eval: arc_easy, copa, lambada_openai"
    )
    parser.add_argument("--task_data", type=Path, default=None, help="the folder that holds TASK.jsonl for each task")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions of each task")
    parser.add_argument("--adaptor", type=str, default=None, help="an adaptor of the model: its name, or its folder")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", type=str, default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Scores a model on a text, or on tasks."""
    options = parse(make_eval_parser(), words)
    if options.tasks is not None:
        _run_tasks(options)
        return
    require_left_out(options, ONLY_OF_TASKS, "is for --tasks; name the tasks too")
    from kalmagrove.evaluation.perplexity import describe_optimum
    from kalmagrove.evaluation.text import score_text

    scores = score_text(
        options.model,
        options.data,
        split=options.split,
        data_seed=_data_seed(options),
        context_length=options.context_length,
        stride=options.stride,
        device=options.device,
        precision=options.precision,
        adaptor=options.adaptor,
    )
    if options.json:
        print_json(scores.to_dict())
        return
    print(f"loss            {scores.loss:.4f} nats a token over {scores.tokens:,} tokens")
    print(f"perplexity      {scores.perplexity:.3f} a token")
    print(f"word perplexity {scores.word_perplexity:.3f}")
    print(f"bits per byte   {scores.bits_per_byte:.4f}")
    for line in describe_optimum(scores.to_dict()):
        print(line)


def _data_seed(options: Namespace) -> int:
    """The one that divides the text: for a run's own text the run's, so that its test split was not trained on."""
    if options.data_seed is not None:
        if options.split is None:
            raise UsageError("--data_seed divides a text into splits; name one by --split")
        return int(options.data_seed)
    from kalmagrove.training.run_folder import RunFolder

    run = RunFolder(Path(options.model))
    data = run.read_config().get("data") if run.config_path.is_file() else None
    if not isinstance(data, dict) or _resolved(data.get("source")) != _resolved(options.data):
        return 0
    return int(data.get("seed", 0))


def _resolved(source: str | None) -> str | None:
    return None if source is None else str(Path(source).expanduser().resolve())


def _run_tasks(options: Namespace) -> None:
    require_left_out(options, NOT_OF_TASKS, "is for a text; leave it out with --tasks")
    if options.task_data is None:
        raise UsageError("--tasks needs --task_data, the folder that holds TASK.jsonl for each task")
    from kalmagrove.evaluation.tasks import task_names
    from kalmagrove.training.extras import require_extra

    names = task_names(options.tasks)
    require_extra("lm_eval", "eval", "--tasks")
    from kalmagrove.evaluation.harness import run_tasks

    scores = run_tasks(
        options.model,
        names,
        options.task_data,
        limit=options.limit,
        context_length=options.context_length,
        device=options.device,
        precision=options.precision,
        adaptor=options.adaptor,
    )
    if options.json:
        print_json(scores)
        return
    for name, found in scores.items():
        print(f"{name:<15} {_describe(found)}")


def _describe(found: dict[str, Any]) -> str:
    """One task's scores for a person."""
    labels = {"acc": "accuracy", "acc_norm": "length-normalised accuracy"}
    parts = [
        f"{label} {found[name]:.4f}" + (f" +- {found[f'{name}_stderr']:.4f}" if f"{name}_stderr" in found else "")
        for name, label in labels.items()
        if name in found
    ]
    if "perplexity" in found:
        parts.append(f"perplexity {found['perplexity']:.3f}")
    cut = f" (prompts cut to the context: {found['cut']:,})" if found["cut"] else ""
    return f"{', '.join(parts)} over {found['rows']:,} questions{cut}"
