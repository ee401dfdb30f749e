"""``kalmagrove adapt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from kalmagrove.adaptation.config import AdaptConfig, BaseConfig
from kalmagrove.adaptors.options import DEFAULT_RATES, AdaptorOptions
from kalmagrove.commands.parsing import build, make_parser, open_text, parse, print_json, require_left_out, say
from kalmagrove.training.config import DataConfig, LoopConfig, OptimConfig, TrackerName

SHORT = {f"--{name}": f"--loop.{name}" for name in ("tokens", "seed")} | {"--lr": "--optim.lr"}
DEFAULTS = {
    "loop.tokens": "1m",
    "loop.batch_size": 8,
    "optim.name": "adamw",
    "optim.weight_decay": 0.0,
}
NOT_OF_AN_ADAPTOR = {
    *("auxiliary_lr", "core_lr", "damping", "refresh_every"),
    *("activation_checkpointing", "compile", "gradient_metrics", "grow_rank", "parallel"),
}
EXAMPLES = f"""\
  kalmagrove adapt runs/book --data law/ --name legal
  kalmagrove generate runs/book "The tenant" --adaptor legal
  kalmagrove adapt runs/book --data medicine.txt --name medical --rank 32 --tokens 4m
  kalmagrove adapt path/to/a/hugging-face-folder --data law/ --name legal --out runs/legal

--tokens, --seed and --lr are short for --loop.tokens, --loop.seed and --optim.lr, which left out is
{DEFAULT_RATES["gradient"]:g} between the gradient's bases and {DEFAULT_RATES["weights"]:g} between the weights'.
The same command in the same folder goes on where it stopped."""


def make_adapt_parser() -> ArgumentParser:
    """The flags of ``kalmagrove adapt``."""
    parser = make_parser(
        "adapt", "Train a small adaptor for a domain over a frozen model, or go on with one that stopped.", EXAMPLES
    )
    parser.add_argument("model", type=str, help="a run folder, a model folder or a Hub name; it is not changed")
    parser.add_argument("--data", type=str, required=True, help="the domain's text, as for train")
    parser.add_argument("--name", type=str, required=True, help="of the adaptor")
    parser.add_argument("--rank", type=int, default=AdaptorOptions.rank, help="directions of each layer")
    parser.add_argument(
        "--core", type=str, default=AdaptorOptions.core, help="diagonal: a number a direction; dense: one a pair"
    )
    parser.add_argument(
        "--bases",
        type=str,
        default=AdaptorOptions.bases,
        help="gradient: where the text pulls, kept in the file; weights: the model's own, a file of cores alone",
    )
    parser.add_argument(
        "--gradient_tokens",
        type=int,
        default=None,
        help=f"read before each round to find the gradient's bases; left out: {AdaptorOptions.gradient_tokens}",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=AdaptorOptions.rounds,
        help="parts of the training, each with rank more directions; left out: 4, or 1 where cores cannot grow",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="the run folder; left out: adaptors/NAME in the model's folder"
    )
    parser.add_argument("--data_folder", type=str, default=DataConfig.folder, help="where packed text is kept")
    parser.add_argument("--data_seed", type=int, default=0, help="divides a text that has no splits")
    parser.add_class_arguments(OptimConfig, "optim", skip=NOT_OF_AN_ADAPTOR)
    parser.add_class_arguments(LoopConfig, "loop", skip=NOT_OF_AN_ADAPTOR)
    parser.add_argument("--track", type=TrackerName | None, default=None, help="tensorboard or trackio, too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(DEFAULTS)
    return parser


def run(words: Sequence[str]) -> None:
    """Trains one adaptor into a run folder."""
    parser = make_adapt_parser()
    options = build(parser, parse(parser, words, SHORT))
    adaptor = _adaptor_options(options)
    from kalmagrove.adaptation.adapting import adapt
    from kalmagrove.adaptors.fingerprint import model_fingerprint
    from kalmagrove.adaptors.opening import default_run_folder
    from kalmagrove.models.convert import load_model, model_folder
    from kalmagrove.training.environment import keep_freed_memory

    folder = default_run_folder(options.model, adaptor.name) if options.out is None else options.out
    keep_freed_memory()
    config = AdaptConfig(
        data=DataConfig(
            options.data, tokenizer=model_folder(options.model), seed=options.data_seed, folder=options.data_folder
        ),
        model=BaseConfig(options.model, model_fingerprint(load_model(options.model))),
        adaptor=adaptor,
        optim=options.optim,
        loop=options.loop,
        track=options.track,
    )
    _show(adapt(config, open_text(config.data), folder, say=say), folder, as_json=options.json)


def _adaptor_options(options: Namespace) -> AdaptorOptions:
    if options.bases == "weights":
        require_left_out(options, ("gradient_tokens",), "is for --bases gradient; leave it out")
    names = [item.name for item in fields(AdaptorOptions)]
    return AdaptorOptions(**{name: options[name] for name in names if options[name] is not None})


def _show(result: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    from kalmagrove.evaluation.perplexity import describe_perplexity

    before, after = (describe_perplexity(scores["test"]["perplexity"]) for scores in (result["base"], result))
    print(
        f"{folder}: test perplexity {before} -> {after} with {result['parameters']['trained']:,} trained parameters, "
        f"after {result['tokens']:,} tokens in {result['seconds']:.0f} s of training steps"
    )
