"""``kalmagrove eval``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import make_parser, parse

EXAMPLES = """\
  kalmagrove eval runs/book --data other.txt
  kalmagrove eval path/to/a/hugging-face-folder --data texts/ --context_length 1024 --stride 512
  kalmagrove eval runs/recall --data synthetic:recall,pairs=8 --split test"""


def make_eval_parser() -> ArgumentParser:
    """The flags of ``kalmagrove eval``."""
    parser = make_parser(
        "eval",
        "Perplexity a token and a word, and bits per byte, of a run folder or any Hugging Face folder on a text.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument("model", type=str, help="a run folder, a model folder or a Hub name")
    parser.add_argument("--data", type=str, default=None, help="a text as for train; left out: the built-in corpus")
    parser.add_argument("--split", type=str, default=None, help="only this split of the text; left out: all of it")
    parser.add_argument("--context_length", type=int, default=None, help="tokens; left out: the model's")
    parser.add_argument("--stride", type=int, default=None, help="tokens between windows; left out: the context")
    parser.add_argument("--adaptor", type=str, default=None, help="an adaptor of the model: its name, or its folder")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", type=str, default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Scores a model on a text."""
    options = parse(make_eval_parser(), words)
    from kalmagrove.evaluation.perplexity import describe_optimum
    from kalmagrove.evaluation.text import score_text

    scores = score_text(
        options.model,
        options.data,
        split=options.split,
        context_length=options.context_length,
        stride=options.stride,
        device=options.device,
        precision=options.precision,
        adaptor=options.adaptor,
    )
    if options.json:
        print(json.dumps(scores.to_dict(), indent=2))
        return
    print(f"loss            {scores.loss:.4f} nats a token over {scores.tokens:,} tokens")
    print(f"perplexity      {scores.perplexity:.3f} a token")
    print(f"word perplexity {scores.word_perplexity:.3f}")
    print(f"bits per byte   {scores.bits_per_byte:.4f}")
    for line in describe_optimum(scores.to_dict()):
        print(line)
