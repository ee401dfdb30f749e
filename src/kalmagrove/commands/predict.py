"""``kalmagrove predict``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from kalmagrove.commands.parsing import make_parser, parse, say
from kalmagrove.errors import UsageError
from kalmagrove.files import write_text_atomic

if TYPE_CHECKING:
    from kalmagrove.evaluation.modality_model import ModalityModel, Predictions

EXAMPLES = """\
  kalmagrove predict runs/iris --data new.csv --target species
  kalmagrove predict runs/houses --data test.csv --target price --quantiles 0.05,0.95 --out prices.csv
  kalmagrove predict runs/houses --data gaps.csv --out complete.csv"""
OUT_SUFFIXES = (".csv", ".jsonl")


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
    parser.add_argument("--quantiles", type=str, default="0.1,0.5,0.9", help="of numbers and dates")
    parser.add_argument("--orders", type=int, default=8, help="orders of the known columns to average over")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--batch_size", type=int, default=64, help="sequences at once")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", type=str, default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON, and without --out the rows too")
    return parser


def run(words: Sequence[str]) -> None:
    """Predicts, prints or writes, and scores."""
    options = parse(make_predict_parser(), words)
    quantiles = parse_quantiles(options.quantiles)
    if min(options.orders, options.batch_size) < 1 or not 0 <= options.seed < 2**63:
        raise UsageError("need --orders >= 1, --batch_size >= 1 and --seed between 0 and 2**63")
    _check_out(options.out)
    from kalmagrove.evaluation.modality_model import open_modality_model

    opened = open_modality_model(options.model, device=options.device, precision=options.precision)
    found = _predict(opened, options, quantiles)
    for note in found.notes:
        say(note)
    _put_out(found, options)


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


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix not in OUT_SUFFIXES:
        raise UsageError(f"--out {out} must end in {' or '.join(OUT_SUFFIXES)}")
    if out.exists():
        raise UsageError(f"--out {out} exists already; choose another name or remove it")
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}; make it first")


def _predict(opened: ModalityModel, options: Namespace, quantiles: list[float]) -> Predictions:
    modality = opened.schema.get("modality")
    if modality == "image":
        if options.target is not None:
            raise UsageError("--target is for tables; of images the label is predicted: leave it out")
        from kalmagrove.evaluation.image_predictions import predict_images

        return predict_images(opened, options.data, batch_size=options.batch_size)
    if modality == "mixed":
        if options.target is not None:
            raise UsageError("--target is for tables; leave it out")
        from kalmagrove.evaluation.mixed_answers import predict_answers

        return predict_answers(opened, options.data)
    if modality != "table":
        raise UsageError(f"{options.model} was trained on {modality}, not on a table or on images")
    from kalmagrove.data.tables.codec import open_codec
    from kalmagrove.evaluation.table_files import complete_table, predict_table
    from kalmagrove.evaluation.table_predictions import PredictionTerms

    codec = open_codec(opened.schema, opened.tokenizer)
    terms = PredictionTerms(options.orders, options.seed, options.batch_size, opened.precision)
    if options.target is None:
        return complete_table(opened.model, codec, options.data, terms=terms)
    return predict_table(opened.model, codec, options.data, target=options.target, quantiles=quantiles, terms=terms)


def _put_out(found: Predictions, options: Namespace) -> None:
    from kalmagrove.evaluation.table_files import write_rows

    if options.out is not None:
        write_text_atomic(options.out, write_rows(found.rows, options.out.suffix))
    if options.json:
        result: dict[str, Any] = {"scores": found.scores}
        print(
            json.dumps(result | ({"rows": found.rows} if options.out is None else {"out": str(options.out)}), indent=2)
        )
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
