"""``kalmagrove compare``, the main job."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import build, make_parser, open_data, parse, say
from kalmagrove.comparison.config import CompareConfig
from kalmagrove.errors import UsageError

SHORT = {"--data": "--data.source", "--modality": "--data.modality", "--tokens": "--loop.tokens"}
EXAMPLES = """\
  kalmagrove compare --budget 10m --out runs/demo
  kalmagrove compare --data book.txt --tokens 20m --seeds 0,1,2 --trials 3 --out runs/book
  kalmagrove compare --models gpt2,llama,llama-plus,slim,kalmagrove --size mini --tokens 4m --out runs/five
  kalmagrove compare --models llama,kalmagrove --optim kalma --tokens 4m --out runs/same-optimiser

--data, --modality and --tokens are short for --data.source, --data.modality and --loop.tokens.
The same command in the same folder goes on where it stopped."""


def make_compare_parser() -> ArgumentParser:
    """The flags of ``kalmagrove compare``."""
    parser = make_parser(
        "compare", "Train several models on the same tokens and report which is better, and at what price.", EXAMPLES
    )
    parser.add_class_arguments(CompareConfig)
    parser.add_argument("--out", type=str, required=True, help="folder of the runs and the report")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Compares models and writes the report."""
    parser = make_compare_parser()
    options = build(parser, parse(parser, words, SHORT))
    config = CompareConfig(**{name: getattr(options, name) for name in CompareConfig.__dataclass_fields__})
    from kalmagrove.comparison.compare import compare
    from kalmagrove.training.environment import keep_freed_memory
    from kalmagrove.world import world_of_environment

    if world_of_environment().size > 1:
        raise UsageError("compare takes its models in turns in one process; start it without torchrun")
    keep_freed_memory()
    folder = Path(options.out)
    command = "kalmagrove compare " + shlex.join(words)
    results = compare(config, open_data(config.data), folder, command=command, say=say)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    show(folder)


def show(folder: Path) -> None:
    """Prints the table and the verdict of a comparison's folder."""
    from rich.console import Console

    from kalmagrove.report.results import load_results
    from kalmagrove.report.table import build_table, to_rich
    from kalmagrove.report.verdict import verdict

    results = load_results(folder)
    console = Console()
    console.print(to_rich(build_table(results)))
    console.print(verdict(results).sentence, highlight=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False)
