"""``kalmagrove export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import make_parser, parse

EXAMPLES = """\
  kalmagrove export runs/book --out book-dense
  kalmagrove export runs/grove-llama --format llama --out book-llama"""


def make_export_parser() -> ArgumentParser:
    """The flags of ``kalmagrove export``."""
    parser = make_parser(
        "export", "A model as a plain dense folder: Grove's weights are multiplied out.", EXAMPLES, configurable=False
    )
    parser.add_argument("model", type=str, help="a run folder, a model folder or a Hub name")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument(
        "--format",
        type=str,
        default="auto",
        help="llama or gpt2: a folder that every tool opens; dense: ours without Grove; auto: the first that fits",
    )
    parser.add_argument("--adaptor", type=str, default=None, help="a task core to merge")
    return parser


def run(words: Sequence[str]) -> None:
    """Writes the folder."""
    options = parse(make_export_parser(), words)
    from kalmagrove.models.exporting import export_folder

    family = export_folder(options.model, options.out, form=options.format, adaptor=options.adaptor)
    print(f"{options.out}: {family}")
