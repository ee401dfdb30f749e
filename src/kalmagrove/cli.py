"""The command ``kalmagrove``: finds the sub-command, lets it run, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130, 138 and 143 after Ctrl-C, SIGUSR1 and SIGTERM, 137 where a process
of --nproc was killed.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from kalmagrove.commands.names import COMMANDS
from kalmagrove.errors import KalmaGroveError, UsageError

_HELP = """usage: kalmagrove COMMAND [options]

Train language models cheaply.

commands:
{commands}

Each has its own help: kalmagrove COMMAND --help

examples:
  kalmagrove compare --budget 10m --out runs/demo
  kalmagrove train --data book.txt --model.preset kalmagrove-mini --tokens 5m --out runs/book
  kalmagrove generate runs/book "Once upon a time"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (KalmaGroveError, OSError) as error:
        print(f"kalmagrove: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, KalmaGroveError) else 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(commands="\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())))
        return 0 if words else 2
    if words[0] == "--version":
        from kalmagrove import __version__

        print(f"kalmagrove {__version__}")
        return 0
    if words[0] not in COMMANDS:
        nearest = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown command {words[0]!r}; did you mean {nearest!r}? See kalmagrove --help")
    module = importlib.import_module(f"kalmagrove.commands.{words[0].replace('eval', 'evaluate')}")
    module.run(words[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
