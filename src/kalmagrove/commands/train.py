"""``kalmagrove train``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import build, make_parser, open_data, parse, say
from kalmagrove.errors import UsageError
from kalmagrove.training.config import TrainConfig

if TYPE_CHECKING:
    from kalmagrove.world import World

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
    parser.add_argument("--nproc", type=int, default=1, help="processes on this machine, such as one for each GPU")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Trains one model into a run folder."""
    parser = make_train_parser()
    options = build(parser, parse(parser, words, SHORT))
    config = TrainConfig(**{name: getattr(options, name) for name in TrainConfig.__dataclass_fields__})
    if options.nproc < 1:
        raise UsageError(f"--nproc must be at least 1, got {options.nproc}")
    from kalmagrove.world import joined_world, world_of_environment

    if options.nproc > 1 and world_of_environment().size == 1:
        from kalmagrove.training.launch import run_in_processes

        run_in_processes(["train", *words], options.nproc)
        return
    from kalmagrove.training.environment import keep_freed_memory
    from kalmagrove.training.trainer import train

    keep_freed_memory()
    with joined_world(config.loop.device) as world, _one_voice(world):
        data = world.one_here_before_the_others(lambda: open_data(config.data))
        said = say if world.is_first else _nothing
        result = train(config, data, Path(options.out), say=said, world=world)
    if not world.is_first:
        return
    if options.json:
        print(json.dumps(result, indent=2))
        return
    test = result["test"]
    print(
        f"{options.out}: test perplexity {_shown(test['perplexity'])}, {test['bits_per_byte']:.3f} bits per byte, "
        f"after {result['tokens']:,} tokens in {result['seconds']:.0f} s of training steps"
    )


def _shown(perplexity: float | None) -> str:
    return "too large" if perplexity is None else f"{perplexity:.2f}"


def _nothing(line: str) -> None:
    """Says nothing, in the processes beside the first."""


@contextmanager
def _one_voice(world: World) -> Iterator[None]:
    """The first process says for all what happened to all; what only one of them knows, it says in one line."""
    from kalmagrove.training.run import TrainingDiverged
    from kalmagrove.training.signals import Interrupted
    from kalmagrove.training.trainer import ProcessLost
    from kalmagrove.world import is_lost_connection

    try:
        yield
    except (Interrupted, UsageError, TrainingDiverged) as error:
        if world.is_first:
            raise
        sys.exit(int(getattr(error, "exit_code", 2 if isinstance(error, UsageError) else 1)))
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise ProcessLost(f"process {world.rank} lost the connection to another one") from error
