"""``kalmagrove scale``: sweep, fit and plan, each in a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from kalmagrove.errors import UsageError

WORDS = {
    "sweep": "train a ladder of models, sizes x tokens for each family",
    "fit": "fit scaling laws to finished runs, with intervals",
    "plan": "the best model for a budget, or what a loss costs",
}
_HELP = """usage: kalmagrove scale WORD [options]

Scaling laws: what more parameters and more tokens buy, and for which family of models.

words:
{words}

Each has its own help: kalmagrove scale WORD --help

examples:
  kalmagrove scale sweep --config configs/scaling/smoke.yaml --out runs/ladder
  kalmagrove scale fit runs/ladder
  kalmagrove scale plan runs/ladder --flops 1e18
  kalmagrove report scaling runs/ladder
"""


def run(words: Sequence[str]) -> None:
    """Runs the second word's command.

    Raises:
        UsageError: There is no such word.
    """
    if words and words[0] in ("-h", "--help"):
        print(_HELP.format(words="\n".join(f"  {name:<9} {text}" for name, text in WORDS.items())))
        return
    if not words or words[0] not in WORDS:
        given = f"got {words[0]!r}" if words else "got nothing"
        raise UsageError(f"kalmagrove scale needs one of the words {', '.join(WORDS)}, {given}")
    importlib.import_module(f"kalmagrove.commands.scale_{words[0]}").run(words[1:])
