"""``kalmagrove report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.compare import show
from kalmagrove.commands.parsing import make_parser, parse
from kalmagrove.commands.reproduce import show_answers

EXAMPLES = """\
  kalmagrove report runs/demo
  kalmagrove report scaling runs/ladder
  kalmagrove report claims runs/laptop
  kalmagrove report runs/demo --picture docs/demo.png"""


def make_report_parser() -> ArgumentParser:
    """The flags of ``kalmagrove report``."""
    parser = make_parser("report", "Write a comparison's report again.", EXAMPLES, configurable=False)
    parser.add_argument("folder", type=str, help="the folder of a comparison")
    parser.add_argument("--picture", type=str, default=None, help="also write the loss curves as a PNG file")
    return parser


def make_report_scaling_parser() -> ArgumentParser:
    """The flags of ``kalmagrove report scaling``."""
    parser = make_parser(
        "report scaling",
        "Draw a fitted ladder: perplexity against parameters, FLOPs and seconds, and what the laws say.",
        "  kalmagrove report scaling runs/ladder",
        configurable=False,
    )
    parser.add_argument("folder", type=Path, help="folder of a sweep that was fitted, or of a fit")
    parser.add_argument("--out", type=Path, default=None, help="where to; left out: the folder of the fit")
    return parser


def make_report_claims_parser() -> ArgumentParser:
    """The flags of ``kalmagrove report claims``."""
    parser = make_parser(
        "report claims",
        "Answer the paper's claims again from the studies of kalmagrove reproduce, without training.",
        """\
  kalmagrove report claims runs/laptop
  kalmagrove report claims runs/laptop --keep results/laptop                  (what the page rests on, in small files)
  kalmagrove report claims results/laptop --out results                       (and the page from those alone)""",
        configurable=False,
    )
    parser.add_argument("folder", type=Path, help="the --out of kalmagrove reproduce, or a --keep of this command")
    parser.add_argument("--out", type=Path, default=None, help="where the page is written; left out: the folder")
    parser.add_argument("--keep", type=Path, default=None, help="also copy what the page rests on to this folder")
    return parser


def run(words: Sequence[str]) -> None:
    """Writes the report of a comparison, a ladder or a reproduction again from its results."""
    parts = {"scaling": _run_scaling, "claims": _run_claims}
    if words and words[0] in parts:
        parts[words[0]](words[1:])
        return
    options = parse(make_report_parser(), words)
    from kalmagrove.report.figures import save_png
    from kalmagrove.report.page import write_report
    from kalmagrove.report.results import load_results

    folder = Path(options.folder)
    results = load_results(folder)
    write_report(results, folder)
    if options.picture is not None:
        save_png(results, Path(options.picture))
    show(folder)


def _run_scaling(words: Sequence[str]) -> None:
    options = parse(make_report_scaling_parser(), words)
    from kalmagrove.scaling.plan import find_fit, read_fit
    from kalmagrove.scaling.report import write_scaling_report

    summary = read_fit(options.folder)
    folder = options.out or find_fit(options.folder).parent
    print(write_scaling_report(summary, folder), end="")
    print(f"\npicture: {folder / 'scaling.png'}")


def _run_claims(words: Sequence[str]) -> None:
    options = parse(make_report_claims_parser(), words)
    from kalmagrove.reproduction.evidence import load_evidence
    from kalmagrove.reproduction.origin import keep_evidence, read_origin
    from kalmagrove.reproduction.page import write_page

    folder, out = options.folder, options.out or options.folder
    origin, evidence = read_origin(folder), load_evidence(folder)
    if options.keep is not None:
        keep_evidence(folder, options.keep)
    out.mkdir(parents=True, exist_ok=True)
    show_answers(write_page(origin, evidence, out), out)
