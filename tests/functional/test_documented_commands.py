"""Every command line in the README, the docs and the help texts is accepted by its parser."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from kalmagrove.commands.parsers import PARSERS, parser_of, short_names
from kalmagrove.commands.parsing import parse

ROOT = Path(__file__).parents[2]


def command_lines() -> list[str]:
    texts = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    for module_name, _ in PARSERS.values():
        texts.append(importlib.import_module(f"kalmagrove.commands.{module_name}").EXAMPLES)
    found = []
    for text in texts:
        joined = text.replace("\\\n", " ")
        found += re.findall(r"^ +(kalmagrove \w+ .*?)(?: {2,}\(.*)?$", joined, re.MULTILINE)
    return sorted(set(found))


def test_enough_commands_are_documented() -> None:
    assert len(command_lines()) > 15
    assert {command_of(shlex.split(line)[1:]) for line in command_lines()} == set(PARSERS)


def command_of(words: list[str]) -> str:
    """The command, of two words where the second is one."""
    return " ".join(words[:2]) if " ".join(words[:2]) in PARSERS else words[0]


@pytest.mark.parametrize("line", command_lines())
def test_a_documented_command_is_accepted(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.partition(" > ")[0])[1:]
    command = command_of(words)
    arguments = words[len(command.split()) :]
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        written = ROOT / arguments[place]
        config = tmp_path / "config.yaml"
        config.write_text(written.read_text() if written.exists() else "loop:\n  batch_size: 8\n")
        arguments[place] = str(config)
    parse(parser_of(command), arguments, short_names(command))


def test_the_flags_are_a_contract() -> None:
    """Renaming or dropping a flag breaks users: change the list on purpose, and say so in the changelog."""
    flags = []
    for name in PARSERS:
        options = sorted({flag for action in parser_of(name)._actions for flag in action.option_strings})
        flags.append(f"{name}: {' '.join(options)}")
    assert flags == (Path(__file__).parent / "flags.txt").read_text().splitlines()
