"""``kalmagrove scale plan``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from kalmagrove.commands.parsing import make_parser, open_text, parse, print_json, require_left_out, say
from kalmagrove.errors import UsageError
from kalmagrove.quantities import parse_count
from kalmagrove.training.config import DataConfig

EXAMPLES = """\
  kalmagrove scale plan runs/ladder --flops 1e18
  kalmagrove scale plan runs/ladder --hours 8 --devices 2 --flops_per_second 2e14
  kalmagrove scale plan runs/ladder --hours 1 --data book.txt --measure
  kalmagrove scale plan runs/ladder --loss 3.2

Without --flops_per_second the speed is that of one worker of the sweep. --measure times a few steps of each answer on
this machine and plans again with that speed."""


def make_scale_plan_parser() -> ArgumentParser:
    """The flags of ``kalmagrove scale plan``."""
    parser = make_parser(
        "scale plan",
        "The best model for a budget by a fitted law, or what a loss costs.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument("fit", type=Path, help="folder of a sweep or of a fit")
    parser.add_argument("--flops", type=float, default=None, help="of the whole training")
    parser.add_argument("--hours", type=float, default=None, help="of the training")
    parser.add_argument("--loss", type=float, default=None, help="nats a token that are to be reached")
    parser.add_argument("--devices", type=int, default=1, help="that train together")
    parser.add_argument("--flops_per_second", type=float, default=None, help="of one device")
    parser.add_argument("--measure", action="store_true", help="time a few steps of each answer on this machine")
    parser.add_argument("--data", type=str, default=None, help="the text, as for train: repeated tokens are worth less")
    parser.add_argument("--unique_tokens", type=str, default=None, help="different tokens of the text, e.g. 12m")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Plans and prints."""
    options = parse(make_scale_plan_parser(), words)
    _check(options)
    from kalmagrove.scaling.advice import advice, markdown_of_advice
    from kalmagrove.scaling.plan import families_of, read_fit

    summary = read_fit(options.fit)
    families = families_of(summary)
    models = summary.get("models")
    found = advice(
        families,
        models,
        flops=options.flops,
        hours=options.hours,
        loss=options.loss,
        devices=options.devices,
        flops_per_second=options.flops_per_second,
        unique_tokens=_unique_tokens(options, models),
        measure=options.measure,
        say=say,
    )
    if options.json:
        print_json(found)
    else:
        print(markdown_of_advice(found))


def _check(options: Namespace) -> None:
    budgets = {name: getattr(options, name) for name in ("flops", "hours", "loss")}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise UsageError("kalmagrove scale plan needs one of --flops, --hours and --loss")
    for name in (*given, *(["flops_per_second"] if options.flops_per_second is not None else [])):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise UsageError(f"--{name} must be positive, got {value:g}")
    if options.devices < 1:
        raise UsageError(f"--devices must be at least 1, got {options.devices}")
    if options.measure:
        require_left_out(options, ("flops_per_second",), "is what --measure finds out; give one of them")
    if options.data is not None and options.unique_tokens is not None:
        raise UsageError("--data and --unique_tokens say the same; give one of them")
    if options.loss is not None and (options.data or options.unique_tokens):
        raise UsageError("--loss asks for the cheapest run on text without end; leave --data and --unique_tokens out")


def _unique_tokens(options: Namespace, models: dict[str, Any] | None) -> float | None:
    if options.unique_tokens is not None:
        return float(parse_count(options.unique_tokens))
    if options.data is None:
        return None
    vocab_size = DataConfig().vocab_size if models is None else int(models["vocab_size"])
    return float(open_text(DataConfig(source=options.data, vocab_size=vocab_size)).splits["train"].tokens)
