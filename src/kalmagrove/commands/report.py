"""``kalmagrove report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.compare import show
from kalmagrove.commands.parsing import make_parser, parse

EXAMPLES = """\
  kalmagrove report runs/demo
  kalmagrove report runs/demo --picture docs/demo.png"""


def make_report_parser() -> ArgumentParser:
    """The flags of ``kalmagrove report``."""
    parser = make_parser("report", "Write a comparison's report again.", EXAMPLES, configurable=False)
    parser.add_argument("folder", type=str, help="the folder of a comparison")
    parser.add_argument("--picture", type=str, default=None, help="also write the loss curves as a PNG file")
    return parser


def run(words: Sequence[str]) -> None:
    """Writes report.html and table.md again from a comparison's results.json."""
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
