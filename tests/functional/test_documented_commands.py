"""Every command line in the README, the docs and the help texts is accepted by its parser."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from kalmagrove.commands.parsing import parse

ROOT = Path(__file__).parents[2]
PARSERS = {
    "compare": ("compare", "make_compare_parser"),
    "train": ("train", "make_train_parser"),
    "eval": ("evaluate", "make_eval_parser"),
    "generate": ("generate", "make_generate_parser"),
    "predict": ("predict", "make_predict_parser"),
    "draw": ("draw", "make_draw_parser"),
    "serve": ("serve", "make_serve_parser"),
    "info": ("info", "make_info_parser"),
    "export": ("export", "make_export_parser"),
    "report": ("report", "make_report_parser"),
    "report scaling": ("report", "make_report_scaling_parser"),
    "data prepare": ("data", "make_data_parser"),
    "watch": ("watch", "make_watch_parser"),
    "adapt": ("adapt", "make_adapt_parser"),
    "compress": ("compress", "make_compress_parser"),
    "reproduce": ("reproduce", "make_reproduce_parser"),
    "scale sweep": ("scale_sweep", "make_scale_sweep_parser"),
    "scale fit": ("scale_fit", "make_scale_fit_parser"),
    "scale plan": ("scale_plan", "make_scale_plan_parser"),
}


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
    words = shlex.split(line)[1:]
    command = command_of(words)
    module = importlib.import_module(f"kalmagrove.commands.{PARSERS[command][0]}")
    arguments = words[len(command.split()) :]
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        written = ROOT / arguments[place]
        config = tmp_path / "config.yaml"
        config.write_text(written.read_text() if written.exists() else "loop:\n  batch_size: 8\n")
        arguments[place] = str(config)
    parse(getattr(module, PARSERS[command][1])(), arguments, getattr(module, "SHORT", None))


def test_the_flags_are_a_contract() -> None:
    """Renaming or dropping a flag breaks users: change the list on purpose, and say so in the changelog."""
    flags = []
    for name, (module_name, make) in PARSERS.items():
        parser = getattr(importlib.import_module(f"kalmagrove.commands.{module_name}"), make)()
        options = sorted({flag for action in parser._actions for flag in action.option_strings})
        flags.append(f"{name}: {' '.join(options)}")
    assert flags == (Path(__file__).parent / "flags.txt").read_text().splitlines()
