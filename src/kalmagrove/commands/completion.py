"""``kalmagrove completion``: a script by which a shell completes commands and flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import make_parser, parse
from kalmagrove.errors import KalmaGroveError, UsageError

try:
    import shtab
except ImportError:
    shtab = None  # type: ignore[assignment]  # The extra is not there.

SHELLS = ("bash", "zsh", "tcsh")
FILES = ("begin", "config", "data", "data.source", "model", "other_text", "runs", "source")
FOLDERS = ("data.folder", "data_folder", "dense_out", "fit", "folder", "out", "task_data")
EXAMPLES = """\
  kalmagrove completion bash > ~/.local/share/bash-completion/completions/kalmagrove
  kalmagrove completion zsh > ~/.zfunc/_kalmagrove         (with fpath+=~/.zfunc before compinit)"""


def make_completion_parser() -> ArgumentParser:
    """The flags of ``kalmagrove completion``."""
    parser = make_parser(
        "completion", "Print a script that completes commands and flags.", EXAMPLES, configurable=False
    )
    parser.add_argument("shell", type=str, help=", ".join(SHELLS))
    return parser


def run(words: Sequence[str]) -> None:
    """Prints the script."""
    shell = parse(make_completion_parser(), words).shell
    if shell not in SHELLS:
        raise UsageError(f"there is no completion for {shell!r}; shells: {', '.join(SHELLS)}")
    if shtab is None:
        raise KalmaGroveError("completion needs shtab: pip install 'kalmagrove[completion]'")
    print(shtab.complete(whole_parser(), shell=shell))


def whole_parser() -> argparse.ArgumentParser:
    """All commands as one parser of the standard library's."""
    from kalmagrove.commands.names import COMMANDS
    from kalmagrove.commands.parsers import PARSERS, parser_of, short_names

    root = argparse.ArgumentParser("kalmagrove")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    second_words: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name, text in COMMANDS.items():
        below = commands.add_parser(name, help=text, add_help=False)
        if any(command.startswith(f"{name} ") for command in PARSERS):
            second_words[name] = below.add_subparsers()
        if name in PARSERS:
            _copy(parser_of(name), short_names(name), below)
    for command in PARSERS:
        first, _, second = command.partition(" ")
        if second:
            # Without a help text it would be hidden.
            parser = parser_of(command)
            below = second_words[first].add_parser(second, help=_first_sentence(parser.description), add_help=False)
            _copy(parser, short_names(command), below)
    return root


def _copy(parser: ArgumentParser, short: Mapping[str, str], below: argparse.ArgumentParser) -> None:
    """The flags and places of a command, with what a shell needs to know of them."""
    groups, long_to_short = parser.groups or {}, {long: name for name, long in short.items()}
    for action in parser._actions:
        # A group of options may be given as one value, which nobody types; the word scaling chooses another parser.
        if action.dest in groups or action.dest == "scaling" or action.help == argparse.SUPPRESS:
            continue
        shorts = [long_to_short[flag] for flag in action.option_strings if flag in long_to_short]
        added = below.add_argument(
            *(action.option_strings or [action.dest]), *shorts, help=_first_sentence(action.help), **_values(action)
        )
        if action.dest in FILES + FOLDERS:
            # What shtab looks for on an action.
            added.complete = shtab.FILE if action.dest in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").replace("%", "%%").split()).split(". ")[0]


def _values(action: argparse.Action) -> dict[str, Any]:
    """Whether a flag takes a value, and which ones where they are known."""
    if action.nargs == 0:
        return {"action": "store_true"}
    hint = getattr(action, "_typehint", None)
    choices = [value for part in (hint, *get_args(hint)) if get_origin(part) is Literal for value in get_args(part)]
    return ({"choices": choices} if choices else {}) | ({} if action.option_strings else {"nargs": "?"})
