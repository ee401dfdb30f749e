"""``kalmagrove scale fit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import command_text, make_parser, parse, print_json, say
from kalmagrove.errors import UsageError

EXAMPLES = """\
  kalmagrove scale fit runs/ladder
  kalmagrove scale fit runs.csv --out runs/law
  kalmagrove scale fit ladder.jsonl ranks.jsonl --out runs/law
  kalmagrove scale fit runs.jsonl --baseline llama --resamples 4000 --out runs/law"""


def make_scale_fit_parser() -> ArgumentParser:
    """The flags of ``kalmagrove scale fit``."""
    parser = make_parser(
        "scale fit",
        "Fit scaling laws to finished runs: loss against parameters, tokens and rank, with intervals.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="folder of a sweep; or .csv, .json, .jsonl with a row a run: parameters, tokens, loss; family, seed; "
        "of several, all runs together",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="a folder for fit.json, fit.md and fit.svg; of a sweep: its law/"
    )
    parser.add_argument(
        "--baseline", type=str, nargs="+", default=[], help="the families that the others are compared with"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--repeated", action="store_true", help="fit what repeated tokens are worth (unique_tokens)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Fits and prints."""
    options = parse(make_scale_fit_parser(), words)
    if options.resamples < 1:
        raise UsageError(f"--resamples must be at least 1, got {options.resamples}")
    if options.seed < 0:
        raise UsageError(f"--seed must not be negative, got {options.seed}")
    from kalmagrove.scaling.pages import LAW_FOLDER, markdown, write_pages
    from kalmagrove.scaling.points import read_points
    from kalmagrove.scaling.summary import facts_of_sweep, summarise

    summary = summarise(
        read_points(*options.runs),
        resamples=options.resamples,
        seed=options.seed,
        repeated=options.repeated,
        baselines=options.baseline,
        say=say,
    )
    summary["command"] = command_text("scale fit", words)
    out = options.out
    if len(options.runs) == 1:
        summary |= facts_of_sweep(options.runs[0])
        out = out or (options.runs[0] / LAW_FOLDER if options.runs[0].is_dir() else None)
    if out is not None:
        write_pages(summary, out)
    if options.json:
        print_json(summary)
        return
    print(markdown(summary), end="")
