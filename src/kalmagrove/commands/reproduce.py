"""``kalmagrove reproduce``: the paper's Table 1 and its fourteen claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import command_text, make_parser, open_data, parse, print_json
from kalmagrove.commands.processes import add_nproc, check_worker_count, started_processes, together
from kalmagrove.errors import UsageError
from kalmagrove.quantities import parse_list
from kalmagrove.reproduction.answers import Answer

EXAMPLES = """\
  kalmagrove reproduce --scale smoke --out runs/smoke                      (minutes on two cores, shows the way)
  kalmagrove reproduce --scale laptop --data texts/ --only base,large --out runs/laptop
  kalmagrove reproduce --scale paper --dry_run --flops_per_second 3e15
  kalmagrove reproduce --scale paper --nproc 8 --out runs/paper            (WikiText-103 from the Hub)

The same command in the same folder goes on where it stopped; with --only it does a part, and claims.md says what is
missing. For several machines: torchrun ... -m kalmagrove reproduce ..., and the ladder afterwards by one process."""


def make_reproduce_parser() -> ArgumentParser:
    """The flags of ``kalmagrove reproduce``."""
    parser = make_parser(
        "reproduce",
        "Train the paper's Table 1, its ablations, synthetic tasks and scaling laws again, and answer its claims.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument(
        "--scale",
        type=str,
        default="smoke",
        help="smoke (minutes on two cores), laptop (ten hours on two cores), paper (8 GPUs), or a file like these",
    )
    parser.add_argument("--data", type=str, default=None, help="the text; left out: the scale's")
    parser.add_argument("--other_text", type=str, default=None, help="a second text, on which Table 1 is scored too")
    parser.add_argument("--data_folder", type=str, default=None, help="where packed token files are kept")
    parser.add_argument("--only", type=str, default=None, help="studies divided by commas, such as base,large,ladder")
    parser.add_argument("--out", type=str, default=None, help="folder of the runs and the page; not for --dry_run")
    parser.add_argument("--dry_run", action="store_true", help="print runs, tokens and FLOPs, and train nothing")
    parser.add_argument("--flops_per_second", type=float, default=None, help="of the whole machine: --dry_run's hours")
    add_nproc(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="runs at a time, each in a process of its own; left out: comparisons take turns, the ladder uses all",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Trains what is missing and prints the claims."""
    options = parse(make_reproduce_parser(), words)
    speed = options.flops_per_second
    if speed is not None and not (options.dry_run and 0 < speed < float("inf")):
        raise UsageError(f"--flops_per_second is for --dry_run and must be positive, got {speed:g}")
    if options.out is None and not options.dry_run:
        raise UsageError("kalmagrove reproduce needs --out, the folder of the runs")
    check_worker_count(options.workers)
    from kalmagrove.reproduction.plan import load_plan

    plan = load_plan(options.scale, source=options.data, other_text=options.other_text, folder=options.data_folder)
    only = [] if options.only is None else parse_list(options.only)
    chosen = plan.only(only) if only else plan
    if options.dry_run:
        from kalmagrove.reproduction.cost import cost_page, study_costs

        costs = study_costs(chosen)
        if options.json:
            print_json([asdict(cost) for cost in costs])
        else:
            print(cost_page(costs, speed))
        return
    if started_processes("reproduce", words, options.nproc):
        return
    from kalmagrove.reproduction.run import reproduce
    from kalmagrove.training.environment import keep_freed_memory

    keep_freed_memory()
    folder = Path(options.out)
    with together("auto") as (world, said):
        answers = reproduce(
            plan,
            folder,
            only=only,
            open_data=open_data,
            command=_command(words),
            say=said,
            world=world,
            workers=options.workers,
        )
    if not world.is_first:
        return
    if options.json:
        print_json([asdict(answer) for answer in answers])
        return
    show_answers(answers, folder)


def show_answers(answers: Sequence[Answer], folder: Path) -> None:
    """Prints a line for each claim, and where the page is."""
    for answer in answers:
        print(f"{answer.name:<4} {answer.verdict:<13} {answer.claim}: {answer.ours}")
    print(f"page: {folder / 'claims.md'}")


def _command(words: Sequence[str]) -> str:
    """What repeats all of it, whichever part was done last and however it was shown."""
    kept = [word for word in words if not word.startswith("--only=")]
    if "--only" in kept:
        place = kept.index("--only")
        del kept[place : place + 2]
    return command_text("reproduce", kept)
