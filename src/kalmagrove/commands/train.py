"""``kalmagrove train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import build, make_parser, open_data, parse, print_json
from kalmagrove.commands.processes import add_nproc, started_processes, together
from kalmagrove.training.config import TrainConfig, config_of

SHORT = {
    "--data": "--data.source",
    "--modality": "--data.modality",
    "--preset": "--model.preset",
    **{f"--{name}": f"--loop.{name}" for name in ("tokens", "seed", "save_every", "compile")},
}
EXAMPLES = """\
  kalmagrove train --out runs/first                        (built-in corpus, kalmagrove-mini)
  kalmagrove train --data book.txt --preset llama-tiny --optim.name adamw --tokens 5m --out runs/book
  kalmagrove train --config runs/book/config.yaml --optim.lr 0.01 --out runs/book-2
  kalmagrove train --data wikitext:wikitext-103-raw-v1 --data.tokenizer gpt2 --preset kalmagrove-base \\
      --loop.context_length 1024 --tokens 1b --out runs/wikitext

  kalmagrove train --nproc 4 --loop.parallel fsdp --preset kalmagrove-large --out runs/large

--data, --modality, --preset, --tokens, --seed, --save_every and --compile are short for --data.source, --data.modality,
--model.preset, --loop.tokens, --loop.seed, --loop.save_every and --loop.compile.
The same command in the same folder goes on where it stopped, with any number of processes. For several machines:
torchrun ... -m kalmagrove train ..."""


def make_train_parser() -> ArgumentParser:
    """The flags of ``kalmagrove train``."""
    parser = make_parser("train", "Train one model, or go on with a run that stopped.", EXAMPLES)
    parser.add_class_arguments(TrainConfig)
    parser.add_argument("--out", type=str, required=True, help="the run folder")
    add_nproc(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Trains one model into a run folder."""
    parser = make_train_parser()
    options = build(parser, parse(parser, words, SHORT))
    config = config_of(TrainConfig, options)
    if started_processes("train", words, options.nproc):
        return
    from kalmagrove.evaluation.perplexity import describe_perplexity
    from kalmagrove.training.environment import keep_freed_memory
    from kalmagrove.training.trainer import train

    keep_freed_memory()
    with together(config.loop.device) as (world, said):
        data = world.one_here_before_the_others(lambda: open_data(config.data))
        result = train(config, data, Path(options.out), say=said, world=world)
    if not world.is_first:
        return
    if options.json:
        print_json(result)
        return
    test = result["test"]
    perplexity = describe_perplexity(test["perplexity"])
    print(
        f"{options.out}: test perplexity {perplexity}, {test['bits_per_byte']:.3f} bits per byte, "
        f"after {result['tokens']:,} tokens in {result['seconds']:.0f} s of training steps"
    )
