"""``kalmagrove export``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import make_parser, open_data, parse
from kalmagrove.errors import UsageError
from kalmagrove.training.extras import require_extra

EXAMPLES = """\
  kalmagrove export runs/book --out book-dense
  kalmagrove export runs/grove-llama --format llama --out book-llama
  kalmagrove export runs/grove-llama --format gguf --out book.gguf
  kalmagrove export runs/book --checkpoint best --out book-best"""


def make_export_parser() -> ArgumentParser:
    """The flags of ``kalmagrove export``."""
    parser = make_parser(
        "export",
        "A model as a plain dense folder, or as a file for llama.cpp: Grove's weights are multiplied out. Or the model "
        "of a checkpoint, as it is.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument("model", type=str, help="a run folder, a model folder or a Hub name")
    parser.add_argument("--out", type=Path, required=True, help="the new folder, or the new file")
    parser.add_argument(
        "--format",
        type=str,
        default="auto",
        help="llama or gpt2: a folder that every tool opens; dense: ours without Grove; auto: the first that fits; "
        "gguf: one file for llama.cpp",
    )
    parser.add_argument(
        "--checkpoint",
        type=str,
        default=None,
        help="of a run folder: last, best or a step; the folder is like the run's own model, with Grove's factors",
    )
    parser.add_argument("--adaptor", type=str, default=None, help="an adaptor to merge: its name, or its folder")
    return parser


def run(words: Sequence[str]) -> None:
    """Writes the folder."""
    options = parse(make_export_parser(), words)
    if options.checkpoint is not None:
        if options.format != "auto" or options.adaptor is not None:
            raise UsageError("--checkpoint takes the model as it is; export the new folder for --format and --adaptor")
        from kalmagrove.training.checkpoint_model import export_checkpoint

        step = export_checkpoint(
            Path(options.model), options.checkpoint, options.out, open_data=partial(open_data, may_prepare=False)
        )
        print(f"{options.out}: the model after step {step}")
        return
    from kalmagrove.adaptors.opening import open_with_adaptor
    from kalmagrove.exporting.folders import export_folder, export_gguf

    opened = partial(open_with_adaptor, adaptor=options.adaptor)
    if options.format == "gguf":
        require_extra("gguf", "gguf", "--format gguf")
        written = export_gguf(options.model, options.out, open_model=opened)
    else:
        written = export_folder(options.model, options.out, form=options.format, open_model=opened)
    print(f"{options.out}: {written}")
