"""``kalmagrove info``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import build, make_parser, parse, print_json
from kalmagrove.errors import UsageError
from kalmagrove.training.config import ModelConfig, OptimizerName

if TYPE_CHECKING:
    from kalmagrove.models.config import KalmaGroveConfig

SHORT = {"--preset": "--model.preset"}
EXAMPLES = """\
  kalmagrove info --preset kalmagrove-base
  kalmagrove info --preset llama-small --vocab_size 8192 --context_length 256 --batch_size 32
  kalmagrove info --folder runs/book
  kalmagrove info --preset kalmagrove-large --batch_size 64 --world_size 8 --parallel fsdp"""


def make_info_parser() -> ArgumentParser:
    """The flags of ``kalmagrove info``."""
    parser = make_parser("info", "Parameters, FLOPs a token and memory of a model, before it is trained.", EXAMPLES)
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_argument("--folder", type=str, default=None, help="a run or model folder in the place of a preset")
    parser.add_argument("--adaptor", type=str, default=None, help="of the folder: an adaptor's name, or its folder")
    parser.add_argument("--vocab_size", type=int, default=None, help="left out: the preset's")
    parser.add_argument("--context_length", type=int, default=None, help="tokens; left out: the preset's")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences of a training step")
    parser.add_argument("--optim", type=str, default="kalma", help="kalma, muon, soap or adamw, for the memory")
    parser.add_argument("--precision", type=str, default="bf16", help="bf16 or fp32: for the training memory")
    parser.add_argument("--world_size", type=int, default=1, help="devices that share a step: memory is of each")
    parser.add_argument("--parallel", type=str, default="ddp", help="ddp or fsdp, with more than one device")
    parser.add_argument("--activation_checkpointing", action="store_true", help="make activations again")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Prints what a model costs."""
    parser = make_info_parser()
    options = build(parser, parse(parser, words, SHORT))
    _check(options)
    facts = _compressed_facts(options) or describe(options)
    if options.json:
        print_json(facts)
        return
    if "architecture" in facts:
        _show_compressed(facts)
    else:
        _show(facts)


def _check(options: Any) -> None:
    if options.optim not in get_args(OptimizerName):
        raise UsageError(f"--optim must be kalma, muon, soap or adamw, got {options.optim!r}")
    if options.parallel not in ("ddp", "fsdp"):
        raise UsageError(f"--parallel must be ddp or fsdp, got {options.parallel!r}")
    for name in ("batch_size", "vocab_size", "context_length", "world_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if options.parallel == "fsdp" and options.batch_size % options.world_size:
        raise UsageError(
            f"--batch_size {options.batch_size} is no multiple of --world_size {options.world_size}, as fsdp needs"
        )
    if options.precision not in ("bf16", "fp32"):
        raise UsageError(f"--precision must be bf16 or fp32, got {options.precision!r}")
    if options.adaptor is not None and options.folder is None:
        raise UsageError("--adaptor is of a model that is there; give its --folder")
    if options.folder is not None and (options.vocab_size or options.context_length or options.model.overrides()):
        raise UsageError("--folder is a model as it is; give --vocab_size, --context_length or --model.* with a preset")


def _compressed_facts(options: Any) -> dict[str, Any] | None:
    """The numbers of a compressed model's folder; None where it is another kind of model."""
    if options.folder is None or options.adaptor is not None:
        return None
    from kalmagrove.compression.describe import describe_compressed

    return describe_compressed(options.folder)


def _show_compressed(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{facts['name']}, compressed from a {facts['architecture']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, count in facts["parameters"].items():
        table.add_row(f"parameters, {part.replace('_', ' ')}", f"{count:,}")
    table.add_row(
        "forward FLOPs a token, attention scores left out", f"{facts['forward_flops_per_token'] / 1e6:,.1f} M"
    )
    table.add_row("matrices that are factors", f"{facts['factorised_matrices']:,}")
    table.add_row("of them, share a basis", f"{facts['matrices_that_share_a_basis']:,}")
    table.add_row("bases", f"{facts['bases']:,}")
    table.add_row("mean rank", f"{facts['mean_rank']:,.1f}")
    table.add_row("matrices of feed-forwards with fewer units", f"{facts['cut_layers']:,}")
    Console().print(table)


def describe(options: Any) -> dict[str, Any]:
    """The numbers that are shown, by name; counts, FLOPs and bytes."""
    from kalmagrove.models.accounting import (
        build_empty,
        count_parameters,
        decoding_bytes,
        projection_paths,
        training_flops_per_token,
    )

    config = _config_of(options)
    length = config.max_position_embeddings
    asked = ("batch_size", "optim", "precision", "world_size", "parallel", "activation_checkpointing")
    return {
        "name": options.model.preset if options.folder is None else options.folder,
        "context_length": length,
        **{name: getattr(options, name) for name in asked},
        "parameters": asdict(count_parameters(build_empty(config))),
        "training_flops_per_token": round(training_flops_per_token(config, length)),
        "training_memory_bytes": _training_memory(config, options),
        "decoding_cache_bytes": decoding_bytes(config, length),
        "grove_paths": {
            "training": projection_paths(config, options.batch_size * length),
            "decoding": projection_paths(config, 1, composed_before=True),
        },
        **({} if options.adaptor is None else {"adaptor": _adaptor_facts(options.folder, options.adaptor)}),
    }


def _config_of(options: Any) -> KalmaGroveConfig:
    """Of the folder or of the preset."""
    from kalmagrove.models.build import model_config
    from kalmagrove.models.convert import load_config

    if options.folder is not None:
        return load_config(options.folder)
    sizes = {"vocab_size": options.vocab_size, "max_position_embeddings": options.context_length}
    given = {key: value for key, value in sizes.items() if value is not None}
    # Any token may end documents here: it is counted, not run.
    return model_config(options.model.preset, given | options.model.overrides(), eos_token_id=0)


def _training_memory(config: KalmaGroveConfig, options: Any) -> dict[str, int]:
    """Bytes by what they are for."""
    from kalmagrove.models.training_memory import training_memory

    memory = training_memory(
        config,
        batch_size=options.batch_size,
        context_length=config.max_position_embeddings,
        optimizer=options.optim,
        precision=options.precision,
        world_size=options.world_size,
        sharded=options.parallel == "fsdp",
        activation_checkpointing=options.activation_checkpointing,
    )
    names = ("total", "parameters", "gathered", "gradients", "optimizer", "activations")
    return {name: getattr(memory, name) for name in names}


def _adaptor_facts(folder: str, adaptor: str) -> dict[str, Any]:
    """What an adaptor adds to a model, and how it was trained."""
    from kalmagrove.adaptors.opening import find_adaptor
    from kalmagrove.adaptors.storage import read_adaptor

    stored = read_adaptor(find_adaptor(folder, adaptor))
    return {
        "name": stored.name,
        "parameters": stored.parameters,
        "layers": len(stored.cores),
        "rank": stored.rank,
        "bytes": sum(path.stat().st_size for path in stored.folder.iterdir()),
        "training": stored.facts,
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(facts["name"]), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, count in facts["parameters"].items():
        table.add_row(f"parameters, {part.replace('_', ' ')}", f"{count:,}")
    table.add_row("training FLOPs a token", f"{facts['training_flops_per_token'] / 1e6:,.1f} M", end_section=True)
    for part, size in facts["training_memory_bytes"].items():
        if size > 0:
            table.add_row(f"training memory, {part}", f"{size / 2**20:,.1f} MiB")
    table.add_row(
        f"decoding cache at {facts['context_length']} tokens", f"{facts['decoding_cache_bytes'] / 2**20:,.2f} MiB"
    )
    for use, paths in facts["grove_paths"].items():
        for path in dict.fromkeys(paths.values()):
            names = ", ".join(name for name, own in paths.items() if own == path)
            table.add_row(f"Grove in {use}, {path}", names)
    if "adaptor" in facts:
        adaptor = facts["adaptor"]
        table.add_row(f"adaptor {adaptor['name']}, parameters", f"{adaptor['parameters']:,}")
        table.add_row(f"adaptor {adaptor['name']}, size", f"{adaptor['bytes'] / 2**10:,.1f} KiB")
    console = Console()
    console.print(table)
    devices = f" on each of {facts['world_size']} devices ({facts['parallel']})" if facts["world_size"] > 1 else ""
    again = ", activations made again" if facts["activation_checkpointing"] else ""
    console.print(
        f"training memory{devices} for {facts['batch_size']} sequences of {facts['context_length']} tokens, "
        f"{facts['optim']}, {facts['precision']}{again}; work space of single operations comes on top",
        highlight=False,
    )
