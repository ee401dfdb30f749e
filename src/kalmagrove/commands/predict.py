"""``kalmagrove predict``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from kalmagrove.commands.parsing import check_new_file, make_parser, parse, print_json, require_left_out, say
from kalmagrove.errors import UsageError
from kalmagrove.files import write_text_atomic

if TYPE_CHECKING:
    from kalmagrove.evaluation.modality_model import ModalityModel, Predictions

EXAMPLES = """\
  kalmagrove predict runs/iris --data new.csv --target species
  kalmagrove predict runs/houses --data test.csv --target price --quantiles 0.05,0.95 --out prices.csv
  kalmagrove predict runs/houses --data gaps.csv --out complete.csv"""
OUT_SUFFIXES = (".csv", ".jsonl")
FOR_TABLES = ("target", "quantiles", "orders", "seed")
USUAL = {"quantiles": "0.1,0.5,0.9", "orders": 8, "seed": 0, "batch_size": 64, "max_new_tokens": 64}
"""Values of the flags that are not for every model, where they are left out."""


def make_predict_parser() -> ArgumentParser:
    """The flags of ``kalmagrove predict``."""
    parser = make_parser(
        "predict",
        "A column of a table's rows from their other cells, with scores where it is known; without --target every "
        "missing cell is filled in. Or the labels of images, or answers to texts with images and rows.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument("model", type=str, help="a run folder or a model folder, trained on examples")
    parser.add_argument("--data", type=str, required=True, help="rows or images, as for train")
    parser.add_argument("--target", type=str, default=None, help="the column; left out: every missing cell")
    parser.add_argument("--out", type=Path, default=None, help="a new .csv or .jsonl; left out: printed as CSV")
    parser.add_argument("--quantiles", type=str, default=None, help=_help("quantiles", "of numbers and dates"))
    parser.add_argument("--orders", type=int, default=None, help=_help("orders", "of known columns to average over"))
    parser.add_argument("--seed", type=int, default=None, help=_help("seed", "of the orders"))
    parser.add_argument("--batch_size", type=int, default=None, help=_help("batch_size", "sequences at once"))
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=None,
        help=_help("max_new_tokens", "most tokens of an answer to a text with images and rows"),
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", type=str, default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON, and without --out the rows too")
    return parser


def _help(flag: str, text: str) -> str:
    return f"{text}; left out: {USUAL[flag]}"


def run(words: Sequence[str]) -> None:
    """Predicts, prints or writes, and scores."""
    given = parse(make_predict_parser(), words)
    options = _with_usual(given)
    quantiles = parse_quantiles(options.quantiles)
    if min(options.orders, options.batch_size, options.max_new_tokens) < 1 or not 0 <= options.seed < 2**63:
        raise UsageError("need --orders >= 1, --batch_size >= 1, --max_new_tokens >= 1 and --seed between 0 and 2**63")
    if options.out is not None:
        check_new_file(options.out, OUT_SUFFIXES)
    from kalmagrove.evaluation.modality_model import open_modality_model

    opened = open_modality_model(options.model, device=options.device, precision=options.precision)
    _refuse_what_does_nothing(opened.schema.get("modality"), given)
    found = _predict(opened, options, quantiles)
    for note in found.notes:
        say(note)
    _put_out(found, options)


def _with_usual(given: Namespace) -> Namespace:
    """The flags, with their usual values where they were left out."""
    return Namespace(**given.as_dict() | {name: usual for name, usual in USUAL.items() if given[name] is None})


def parse_quantiles(text: str) -> list[float]:
    """Levels divided by commas.

    Raises:
        UsageError: One is no number between 0 and 1.
    """
    try:
        levels = [float(item) for item in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0 < level < 1 for level in levels):
        raise UsageError(f"--quantiles must be numbers between 0 and 1, divided by commas; got {text!r}")
    return levels


def _refuse_what_does_nothing(modality: Any, given: Namespace) -> None:
    if modality == "image":
        require_left_out(given, FOR_TABLES, "is for tables; of images the label is predicted: leave it out")
    if modality == "mixed":
        require_left_out(given, FOR_TABLES, "is for tables; leave it out")
        require_left_out(given, ("batch_size",), "is for tables and images; leave it out")
    if modality in ("image", "table"):
        require_left_out(given, ("max_new_tokens",), "is for answers to texts with images and rows; leave it out")
    if modality == "table" and given.target is None:
        require_left_out(given, ("quantiles",), "is of one column; name it with --target")


def _predict(opened: ModalityModel, options: Namespace, quantiles: list[float]) -> Predictions:
    modality = opened.schema.get("modality")
    if modality == "image":
        from kalmagrove.evaluation.image_predictions import predict_images

        return predict_images(opened, options.data, batch_size=options.batch_size)
    if modality == "mixed":
        from kalmagrove.evaluation.mixed_answers import predict_answers

        return predict_answers(opened, options.data, max_new_tokens=options.max_new_tokens)
    if modality != "table":
        raise UsageError(f"{options.model} was trained on {modality}, not on a table or on images")
    from kalmagrove.data.tables.codec import open_codec
    from kalmagrove.evaluation.table_files import complete_table, predict_table
    from kalmagrove.evaluation.table_predictions import PredictionTerms

    codec = open_codec(opened.schema, opened.tokenizer)
    terms = PredictionTerms(options.orders, options.seed, options.batch_size, opened.precision)
    if options.target is None:
        # JSON tells numbers from text; in a CSV a cell stays as it was written.
        typed = options.json if options.out is None else options.out.suffix.lower() == ".jsonl"
        return complete_table(opened.model, codec, options.data, terms=terms, typed=typed)
    return predict_table(opened.model, codec, options.data, target=options.target, quantiles=quantiles, terms=terms)


def _put_out(found: Predictions, options: Namespace) -> None:
    from kalmagrove.evaluation.table_files import write_rows

    if options.out is not None:
        write_text_atomic(options.out, write_rows(found.rows, options.out.suffix.lower()))
    if options.json:
        result: dict[str, Any] = {"scores": found.scores}
        print_json(result | ({"rows": found.rows} if options.out is None else {"out": str(options.out)}))
        return
    if options.out is None:
        sys.stdout.write(write_rows(found.rows, ".csv"))
    else:
        print(f"{options.out}: {len(found.rows):,} rows")
    for line in describe_scores(found.scores):
        # Rows on the standard output stay a table.
        (say if options.out is None else print)(line)


def describe_scores(scores: dict[str, Any]) -> list[str]:
    """A line for each score."""
    names = {
        "accuracy": "accuracy",
        "log_loss": "log loss",
        "auc": "AUC",
        "rmse": "RMSE",
        "mae": "MAE",
        "r2": "R2",
        "nats": "nats of bins",
        "bits_per_dimension": "bits a pixel",
    }
    return [f"{title:<13}{scores[name]:.4f}" for name, title in names.items() if name in scores]
