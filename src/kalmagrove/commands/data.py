"""``kalmagrove data prepare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import (
    after_second_word,
    build,
    make_parser,
    open_data,
    parse,
    print_json,
    say,
)
from kalmagrove.training.config import DataConfig, config_of

SHORT = {"--data": "--source"}
EXAMPLES = """\
  kalmagrove data prepare --data texts/ --vocab_size 8192
  kalmagrove data prepare --data wikitext:wikitext-103-raw-v1 --tokenizer gpt2 --folder runs/data"""


def make_data_parser() -> ArgumentParser:
    """The flags of ``kalmagrove data prepare``."""
    parser = make_parser("data prepare", "Tokenise and pack a text into token files.", EXAMPLES)
    parser.add_class_arguments(DataConfig)
    parser.add_argument("--json", action="store_true", help="print the manifest's numbers as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Tokenises and packs a text."""
    parser = make_data_parser()
    options = build(parser, parse(parser, after_second_word("data", "prepare", words), SHORT))
    config = config_of(DataConfig, options)
    data = open_data(config)
    if options.json:
        splits = {name: asdict(info) for name, info in data.splits.items()}
        print_json({"folder": str(data.folder), "fingerprint": data.fingerprint, "splits": splits})
        return
    for name, info in data.splits.items():
        print(f"{name:<6}{info.tokens:>14,} tokens {info.words:>14,} words {info.documents:>10,} documents")
    say(f"packed into {Path(data.folder)}")
