"""``kalmagrove generate``."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import make_parser, parse, print_json

EXAMPLES = """\
  kalmagrove generate runs/book "Once upon a time" --max_new_tokens 200
  kalmagrove generate runs/book "def main" --temperature 0.7 --top_p 0.9 --seed 3"""


def make_generate_parser() -> ArgumentParser:
    """The flags of ``kalmagrove generate``."""
    parser = make_parser("generate", "Text from a prompt, streamed.", EXAMPLES, configurable=False)
    parser.add_argument("model", type=str, help="a run folder, a model folder or a Hub name")
    parser.add_argument("prompt", type=str, help="the beginning of the text")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens; 0 is all")
    parser.add_argument("--top_p", type=float, default=0.95, help="only the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of tokens")
    parser.add_argument("--adaptor", type=str, default=None, help="an adaptor of the model: its name, or its folder")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--json", action="store_true", help="print prompt and text as JSON at the end")
    return parser


def run(words: Sequence[str]) -> None:
    """Writes text as it is generated."""
    options = parse(make_generate_parser(), words)
    from kalmagrove.evaluation.generation import generate_text

    pieces = generate_text(
        options.model,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        device=options.device,
        adaptor=options.adaptor,
    )
    if options.json:
        print_json({"prompt": options.prompt, "text": "".join(pieces)}, indent=None)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A redirected output may know fewer characters than the model.
        sys.stdout.reconfigure(errors="replace")
    sys.stdout.write(options.prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
