"""What the sub-commands' parsers share: configuration files, short names for long flags, and clear errors."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from kalmagrove.commands.progress import DataProgress
from kalmagrove.data.packing import PackedText, default_data_folder, prepare
from kalmagrove.data.synthetic.options import is_synthetic
from kalmagrove.errors import UsageError, first_line
from kalmagrove.files import finite_or_null
from kalmagrove.training.config import USUAL_VOCABULARY, DataConfig

if TYPE_CHECKING:
    from kalmagrove.data.training_data import TrainingData

MOST_CONFIG_VALUES = 10_000
"""Of a configuration file; ours have about a hundred."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of examples."""


def make_parser(command: str, description: str, examples: str, *, configurable: bool = True) -> ArgumentParser:
    """A parser with ``--config`` and ``--print_config`` and with examples under its help."""
    parser = ArgumentParser(
        prog=f"kalmagrove {command}",
        description=description,
        epilog=f"examples:\n{examples.rstrip()}",
        exit_on_error=False,
        formatter_class=_HelpFormatter,
    )
    if configurable:
        parser.add_argument("--config", action="config", help="a YAML file; flags after it override it")
    return parser


def parse(parser: ArgumentParser, words: Sequence[str], short: Mapping[str, str] | None = None) -> Namespace:
    """Parses, with short names replaced by the flags that they stand for.

    Raises:
        UsageError: A flag is unknown (the nearest is offered), its value is wrong, or a file of flags is no such file.
    """
    _check_config_files(words)
    _name_short_flags(parser, short or {})
    try:
        return parser.parse_args([_expand(word, short or {}) for word in words])
    except ArgumentError as error:
        raise UsageError(_explain(str(error), parser)) from None
    except UsageError:
        raise
    # What a configuration file holds reaches the parser's own code, which has no common error for it.
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"the options cannot be read ({reason}); mend the file that --config names") from error


def build(parser: ArgumentParser, namespace: Namespace) -> Any:
    """The dataclasses of a parsed command line.

    Raises:
        UsageError: Values do not fit together.
    """
    try:
        return parser.instantiate(namespace)
    except UsageError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UsageError(first_line(error)) from error


def after_second_word(command: str, second: str, words: Sequence[str]) -> Sequence[str]:
    """The flags of a command of two words, such as data prepare.

    Raises:
        UsageError: Another word stands there, or none.
    """
    if words and words[0] == second:
        return words[1:]
    if words and words[0] in ("-h", "--help"):
        return words
    given = f"got {words[0]!r}" if words else "got nothing"
    raise UsageError(f"kalmagrove {command} needs the word {second}, {given}; see kalmagrove {command} {second} --help")


def say(line: str) -> None:
    """A line for a person, beside the command's output."""
    print(line, file=sys.stderr, flush=True)


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Standard JSON, which every reader takes; floats that are not finite are null."""
    return json.dumps(finite_or_null(value), indent=indent, allow_nan=False)


def command_text(name: str, words: Sequence[str]) -> str:
    """The command that a page names to do the same again."""
    return f"kalmagrove {name} {shlex.join(word for word in words if word != '--json')}"


def check_new_file(out: Path, suffixes: Sequence[str]) -> None:
    """That a file can be written as --out.

    Raises:
        UsageError: It has another ending, exists, or would lie in a folder that does not.
    """
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"--out {out} must end in {' or '.join(suffixes)}")
    if out.exists():
        raise UsageError(f"--out {out} exists already; choose another name or remove it")
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}; make it first")


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """A command's output as JSON, in one line where ``indent`` is None."""
    print(json_text(value, indent=indent))


def require_left_out(options: Namespace, names: Sequence[str], reason: str) -> None:
    """That flags which would do nothing were not given.

    Args:
        options: Of a parser in which these flags have no default.
        names: The flags.
        reason: Why one does nothing, and what to do, behind its name.

    Raises:
        UsageError: One was given.
    """
    for name in names:
        if options[name] is not None:
            raise UsageError(f"--{name} {reason}")


def open_text(config: DataConfig) -> PackedText:
    """As :func:`open_data`, for what takes text alone.

    Raises:
        UsageError: The data is something else, or as for :func:`open_data`.
    """
    data = open_data(config)
    if not isinstance(data, PackedText):
        raise UsageError(f"this command takes text; {config.source} is a {data.modality}")
    return data


def open_data(config: DataConfig, *, may_prepare: bool = True) -> TrainingData:
    """The packed data of a configuration: reused where it was made before, else made now.

    A source that is itself a packed folder, as one that was copied from another machine, is taken as it is.

    Args:
        config: Which data.
        may_prepare: Whether it may be made now.

    Raises:
        UsageError: An option asks for what a packed folder has decided already, or there is none and none may be made.
    """
    # Examples need torch, and help texts must be quick.
    from kalmagrove.data.training_data import is_training_data, open_training_data

    if config.source is not None and is_training_data(Path(config.source).expanduser()):
        packed = open_training_data(Path(config.source).expanduser())
        _require_usual(config, f"data.source {config.source} is packed already, with", packed.vocab_size)
        return packed
    if config.modality != "text":
        return _open_examples(config, may_prepare)
    if is_synthetic(config.source):
        _require_usual(config, f"data.source {config.source} comes with")
    assert config.vocab_size is not None
    folder = default_data_folder(
        config.source, config.vocab_size, config.tokenizer, config.seed, root=Path(config.folder)
    )
    _require_here(folder, may_prepare)
    with DataProgress() as progress:
        return prepare(
            config.source,
            folder,
            vocab_size=config.vocab_size,
            tokenizer=config.tokenizer,
            seed=config.seed,
            progress=progress,
        )


def _open_examples(config: DataConfig, may_prepare: bool) -> TrainingData:
    from kalmagrove.data.example_sources import default_examples_folder, example_source
    from kalmagrove.data.example_store import prepare_examples

    assert config.source is not None
    options = config.modality_options()
    folder = default_examples_folder(config.modality, config.source, config.seed, options, root=Path(config.folder))
    _require_here(folder, may_prepare)
    with DataProgress() as progress:
        source = example_source(config.modality, config.source, seed=config.seed, options=options, progress=progress)
        return prepare_examples(source, folder, progress=progress)


def _require_here(folder: Path, may_prepare: bool) -> None:
    if not may_prepare and not folder.exists():
        raise UsageError(f"the packed data {folder} is not here; run this in the folder where it was made")


def _require_usual(config: DataConfig, reason: str, vocab_size: int | None = None) -> None:
    """A text that has its own tokeniser and splits is not given others."""
    usual = {
        "tokenizer": (None,),
        "vocab_size": (USUAL_VOCABULARY[config.modality], vocab_size),
        "seed": (DataConfig.seed,),
    }
    for name, allowed in usual.items():
        if getattr(config, name) not in allowed:
            raise UsageError(f"{reason} its own {name}; leave data.{name} out")


def _check_config_files(words: Sequence[str]) -> None:
    """An alias can make a small file a huge value, so what it stands for is counted before it is built."""
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        path = Path(value if equals else following)
        if flag != "--config" or not path.is_file():
            continue
        root = None
        # What else is wrong with the file is said by the parser.
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None and _expanded_size(root, {}) > MOST_CONFIG_VALUES:
            raise UsageError(f"{path} stands for more than {MOST_CONFIG_VALUES:,} values; write fewer aliases")


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The values of a node when every alias is written out."""
    if id(node) not in sizes:
        # A node inside itself has no end.
        sizes[id(node)] = math.inf
        items = [] if isinstance(node.value, str) else node.value
        parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in parts)
    return sizes[id(node)]


def _name_short_flags(parser: ArgumentParser, short: Mapping[str, str]) -> None:
    """In the help: the parser takes --data for a file of all options that begin with it, which ours is not."""
    for action in parser._actions:
        for flag in short.keys() & set(action.option_strings):
            action.help, action.metavar = f"short for {short[flag]}", short[flag].rpartition(".")[2].upper()


def _expand(word: str, short: Mapping[str, str]) -> str:
    flag, equals, value = word.partition("=")
    return short[flag] + equals + value if flag in short else word


def _explain(message: str, parser: ArgumentParser) -> str:
    """The parser's message in one or two lines, with the nearest flag where one was not known."""
    text = " ".join(message.split())
    unknown = re.search(r"(?:[Uu]nrecognized arguments:|Option|Key) '?(--)?([\w.\-]+)", text)
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    if unknown is not None and f"--{unknown[2].removeprefix('--')}" not in flags:
        flag = f"--{unknown[2].removeprefix('--')}"
        nearest = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
        return f"unknown flag {flag}" + (f"; did you mean {nearest[0]}?" if nearest else f"; see {parser.prog} --help")
    wrong = re.match(r'Parser key "([\w.]+)": (.*?)(?:Given value: |Got value: )(.*)', text)
    if wrong is not None:
        expected = sorted(set(re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", wrong[2])))
        kinds = [name or choices.replace("'", "") for name, choices in expected if name != "NoneType"]
        return f"--{wrong[1]}: {wrong[3]!r} is not {' or '.join(kinds) or 'valid'}"
    return text if len(text) < 300 else text[:297] + "..."
