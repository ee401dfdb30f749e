"""``kalmagrove train``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import build, make_parser, open_data, parse, say
from kalmagrove.training.config import TrainConfig

SHORT = {"--data": "--data.source", "--tokens": "--loop.tokens", "--preset": "--model.preset", "--seed": "--loop.seed"}
EXAMPLES = """\
  kalmagrove train --out runs/first                        (built-in corpus, kalmagrove-mini)
  kalmagrove train --data book.txt --preset llama-tiny --optim.name adamw --tokens 5m --out runs/book
  kalmagrove train --config runs/book/config.yaml --optim.lr 0.01 --out runs/book-2
  kalmagrove train --data wikitext:wikitext-103-raw-v1 --data.tokenizer gpt2 --preset kalmagrove-base \\
      --loop.context_length 1024 --tokens 1b --out runs/wikitext

--data, --tokens, --preset and --seed are short for --data.source, --loop.tokens, --model.preset and --loop.seed.
The same command in the same folder goes on where it stopped."""


def make_train_parser() -> ArgumentParser:
    """The flags of ``kalmagrove train``."""
    parser = make_parser("train", "Train one model, or go on with a run that stopped.", EXAMPLES)
    parser.add_class_arguments(TrainConfig)
    parser.add_argument("--out", type=str, required=True, help="the run folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Trains one model into a run folder."""
    parser = make_train_parser()
    options = build(parser, parse(parser, words, SHORT))
    config = TrainConfig(data=options.data, model=options.model, optim=options.optim, loop=options.loop)
    from kalmagrove.training.environment import keep_freed_memory
    from kalmagrove.training.trainer import train

    keep_freed_memory()
    result = train(config, open_data(config.data), Path(options.out), say=say)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    test = result["test"]
    print(
        f"{options.out}: test perplexity {test['perplexity']:.2f}, {test['bits_per_byte']:.3f} bits per byte, after "
        f"{result['tokens']:,} tokens in {result['seconds']:.0f} s of training steps"
    )
