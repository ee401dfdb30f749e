"""``kalmagrove compare``, the main job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import build, command_text, make_parser, open_data, parse, print_json
from kalmagrove.commands.processes import add_nproc, started_processes, together
from kalmagrove.comparison.config import CompareConfig, check_workers
from kalmagrove.training.config import config_of

SHORT = {"--data": "--data.source", "--modality": "--data.modality", "--tokens": "--loop.tokens"}
EXAMPLES = """\
  kalmagrove compare --budget 10m --out runs/demo
  kalmagrove compare --data book.txt --size pico --tokens 10m --seeds 0,1,2 --trials 3 --recheck true --out runs/fair
  kalmagrove compare --models gpt2,llama,llama-plus,slim,kalmagrove --size mini --tokens 4m --out runs/five
  kalmagrove compare --models llama,kalmagrove --optim kalma --tokens 4m --out runs/same-optimiser
  kalmagrove compare --tokens 4m --seeds 0,1,2 --trials 3 --workers 8 --out runs/many-cores
  kalmagrove compare --models llama,llama+grove,llama+arnold,llama+kalma,kalmagrove --tokens 4m --out runs/parts

--data, --modality and --tokens are short for --data.source, --data.modality and --loop.tokens.
The same command in the same folder goes on where it stopped."""


def make_compare_parser() -> ArgumentParser:
    """The flags of ``kalmagrove compare``."""
    parser = make_parser(
        "compare", "Train several models on the same tokens and report which is better, and at what price.", EXAMPLES
    )
    parser.add_class_arguments(CompareConfig)
    parser.add_argument("--out", type=str, required=True, help="folder of the runs and the report")
    add_nproc(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="runs at a time, each in a process of its own; with one, the models take their steps in turns",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Compares models and writes the report."""
    parser = make_compare_parser()
    options = build(parser, parse(parser, words, SHORT))
    config = config_of(CompareConfig, options)
    check_workers(options.workers, config, options.nproc)
    if started_processes("compare", words, options.nproc):
        return
    from kalmagrove.comparison.compare import compare
    from kalmagrove.training.environment import keep_freed_memory

    keep_freed_memory()
    folder = Path(options.out)
    command = command_text("compare", words)
    with together(config.loop.device) as (world, said):
        data = world.one_here_before_the_others(lambda: open_data(config.data))
        results = compare(config, data, folder, command=command, say=said, world=world, workers=options.workers)
    if not world.is_first:
        return
    if options.json:
        print_json(results)
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
