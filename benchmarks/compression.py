"""`kalmagrove compress` against other ways to make a dense model smaller: perplexity at equal size.

    python benchmarks/compression.py --source runs/smollm2-135m --out runs/compression
    python benchmarks/compression.py --source runs/smollm2-135m --out runs/compression --keep 0.6 --refit 10m
    python benchmarks/compression.py --source runs/smollm2-135m --out runs/compression --page results/compression.md

The rivals are written from their papers: truncated SVD; ASVD (Yuan et al., arXiv:2312.05821: columns scaled by the
inputs' size, without its search of ranks); SVD-LLM (arXiv:2403.07378: whitened by the Cholesky factor of the inputs'
second moment), alone and "followed", each layer fitted to what the compressed layers before it give, as ours is; Basis
Sharing (arXiv:2410.03765: query, key, value, gate and up of two neighbouring layers over one whitened basis); and units
of the feed-forward cut by what they send on, with the matrix behind them fitted anew by least squares. Beside them
stands ours with parts left out: "svd-llm compact" has our storage of factors only, "equal ranks" also our directions
and the better of two fits on held-out text, "ranks alone" also our choice of ranks and of who shares a basis; and
"kalmagrove" may take away units of a feed-forward too.
All see the same calibration windows; sizes count all parameters of the model, embeddings included. Time is that of a
forward of 256 tokens over the dense model's, both in turns. With --refit all are trained as long, by the same loss,
optimiser and rate, which was not tuned for any of them.

Two of the three test texts are of the kinds that were calibrated on, the third is not. The line below a table is the
perplexity of ours over that of the rival that is best on this text, with the 95 % interval over its test windows.

With --bits 8 4 every model is also scored with its matrices rounded to so many bits (see weight_rounding.py), and its
bytes are counted: what pruning by rank and rounding bring together.

Every result is a file in --out; what is there is not computed again. The tables are printed; with --page nothing is
computed, and what there is is put into that page, and its numbers into the .json file beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression_lab.methods import METHODS, NO_REFIT, OURS, RIVALS, Task
from kalmagrove.compression.calibration import CalibrationText, loss_of, read_windows
from kalmagrove.compression.measures import measure
from kalmagrove.compression.moment_store import MomentStore
from kalmagrove.compression.refit import parse_refit, refit
from kalmagrove.compression.sites import find_matrices
from kalmagrove.compression.source import open_source
from kalmagrove.compression.work import WorkFolder
from kalmagrove.data.sources import iter_documents
from kalmagrove.files import remove, write_json_atomic
from kalmagrove.precision import autocast
from kalmagrove.report.statistics import mean_interval
from marked import fill_page, keep_records
from weight_rounding import round_weights

CALIBRATED = ("wikitext", "textbooks")
TEXTS = (*CALIBRATED, "biomedical")
TIMED_TOKENS, TIMED_ROUNDS = 256, 8


def parsed() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", required=True, help="a Llama-style folder")
    parser.add_argument("--texts", type=Path, default=Path("texts"), help="has wikitext/, textbooks/ and biomedical/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--calibration_tokens", type=int, default=65536, help="half of each text's train split")
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--test_tokens", type=int, default=10**9, help="most of each test text")
    parser.add_argument("--refit", default=None, help="the same for all: 10m or tokens")
    parser.add_argument("--bits", type=int, nargs="*", default=[], help="also with weights of so many bits: 8 4")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--page", type=Path)
    return parser.parse_args()


def read_texts(options: argparse.Namespace, vocab_size: int) -> tuple[CalibrationText, dict[str, Tensor]]:
    """Calibration from both train splits, and the windows of both test splits."""
    common = {"context_length": options.context_length, "vocab_size": vocab_size}
    halves = [
        read_file(
            options.texts / name / "train.txt.xz", options.source, tokens=options.calibration_tokens // 2, **common
        )
        for name in CALIBRATED
    ]
    tests = {}
    for name in TEXTS:
        path = options.texts / name / "test.txt.xz"
        # An eighth more is read for a check; the test uses all of it.
        tokens = min(options.test_tokens, int(_count_tokens(path, options.source) / 1.13))
        both = read_file(path, options.source, tokens=tokens, **common)
        tests[name] = torch.cat((both.train, both.valid))
    return CalibrationText(*(torch.cat([getattr(h, part) for h in halves]) for part in ("train", "valid"))), tests


def read_file(path: Path, source: str, **common: int) -> CalibrationText:
    """Windows from the beginning of a file, which is one split."""
    return read_windows(iter_documents(str(path)), str(path), source, **common)


def _count_tokens(path: Path, source: str) -> int:
    from kalmagrove.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    return sum(len(tokenizer.encode(document, add_special_tokens=False).ids) for document in iter_documents(str(path)))


def main() -> None:
    """Runs what is not there yet and writes the table."""
    options = parsed()
    if options.page is not None:
        write_page(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    dense = open_source(options.source).model
    matrices = find_matrices(dense)
    text, tests = read_texts(options, int(dense.config.vocab_size))
    identity = {"tokens": options.calibration_tokens, "context": options.context_length, "source": options.source}
    terms = identity | {"test_tokens": options.test_tokens, "precision": options.precision}
    WorkFolder(options.out / "terms", terms).close()
    store = MomentStore(WorkFolder(options.out / "moments", identity), matrices)
    dense.requires_grad_(False)
    store.gather(dense, text.train, seed=0, precision=options.precision, progress=lambda: None)
    score_once(options, "dense", 1.0, lambda: dense, text, tests)
    for keep in options.keep:
        task = Task(dense, matrices, store, text, keep, options.precision, options.out / "work")
        if task.share <= 0:
            raise SystemExit(f"embeddings and norms alone are more than {keep:.0%} of the parameters")
        for method in options.methods:
            score_once(options, method, keep, partial(METHODS[method], task), text, tests)
    print("\n\n".join(tables(options).values()))


def score_once(
    options: argparse.Namespace,
    method: str,
    keep: float,
    build: Callable[[], PreTrainedModel],
    text: CalibrationText,
    tests: dict[str, Tensor],
) -> None:
    """Builds, scores and perhaps refits one model, and keeps the numbers."""
    plain = plain_path(options.out, method, keep)
    refitted = refitted_path(plain, options.refit)
    wanted = options.refit is not None and method not in ("dense", *NO_REFIT)
    unrounded = [bits for bits in options.bits if method not in NO_REFIT and not rounded_path(plain, bits).exists()]
    if plain.exists() and (not wanted or refitted.exists()) and not unrounded:
        return
    began = time.monotonic()
    model = build().eval()
    seconds = time.monotonic() - began
    if not plain.exists():
        found = scores(model, options, text, tests) | {"seconds": seconds}
        if method != "dense":
            found["time_ratio"] = time_ratio(model, open_source(options.source).model.eval(), text, options.precision)
        if method in NO_REFIT:
            found["parameters"] = stored_parameters(model, keep)
        write_json_atomic(plain, found)
        print(plain.stem, described(found), flush=True)
    for bits in unrounded:
        coarse = copy.deepcopy(model)
        size = round_weights(coarse, bits)
        write_json_atomic(rounded_path(plain, bits), scores(coarse, options, text, tests) | {"bytes": size})
        print(rounded_path(plain, bits).stem, flush=True)
    if wanted and not refitted.exists():
        teacher = open_source(options.source).model.requires_grad_(False)
        result = refit(
            model, teacher, text.train, text.valid, parse_refit(options.refit),
            batch_size=options.batch_size, seed=0, precision=options.precision, folder=refitted.with_suffix(".work"),
        )  # fmt: skip
        found = scores(model, options, text, tests) | {"refit_tokens": result.tokens, "refit_seconds": result.seconds}
        write_json_atomic(refitted, found)
        remove(refitted.with_suffix(".work"))
        print(refitted.stem, described(found), flush=True)


def described(found: dict[str, Any]) -> str:
    """A line of progress."""
    return "  ".join(f"{name} {value:,.5g}" for name, value in found.items() if isinstance(value, int | float))


def plain_path(out: Path, method: str, keep: float) -> Path:
    """Where the numbers of a model are."""
    return out / f"{method.replace(' ', '-')}-{keep:g}.json"


def refitted_path(plain: Path, length: str | None) -> Path:
    """Where the numbers of a refitted model are."""
    return plain.with_name(f"{plain.stem}-refit-{length}.json")


def rounded_path(plain: Path, bits: int) -> Path:
    """Where the numbers of a model of few bits are."""
    return plain.with_name(f"{plain.stem}-int{bits}.json")


def stored_parameters(model: PreTrainedModel, keep: float) -> int:
    """Of a model whose factors are only multiplied out: what they were chosen to hold."""
    return round(keep * sum(parameter.numel() for parameter in model.parameters()))


@torch.no_grad()
def time_ratio(model: PreTrainedModel, dense: PreTrainedModel, text: CalibrationText, precision: str) -> float:
    """Median time of a forward over the dense model's, both in turns."""
    tokens, ratios = text.valid[:1, :TIMED_TOKENS], []
    with autocast("bf16" if precision == "bf16" else "fp32", tokens.device):
        for _ in range(TIMED_ROUNDS):
            seconds = []
            for one in (model, dense):
                began = time.perf_counter()
                one(input_ids=tokens)
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
    # The first round warms up.
    return statistics.median(ratios[1:])


def scores(
    model: PreTrainedModel, options: argparse.Namespace, text: CalibrationText, tests: dict[str, Tensor]
) -> dict[str, Any]:
    """Perplexities, mean nats a token of each test window, and what the model costs."""
    found = measure(model, text.valid, dtype=torch.float32, precision=options.precision)
    nats = {
        name: [loss_of(model, window[None], options.precision) for window in windows] for name, windows in tests.items()
    }
    perplexities = {name: math.exp(min(700.0, statistics.fmean(own))) for name, own in nats.items()}
    return {
        **perplexities,
        "nats": nats,
        "parameters": found.parameters,
        "tokens_per_second": found.tokens_per_second,
    }


def write_page(options: argparse.Namespace) -> None:
    """Tables and numbers of what there is."""
    records = [{"run": path.stem, **json.loads(path.read_text("utf-8"))} for path in sorted(options.out.glob("*.json"))]
    keep_records(options.page.with_suffix(".json"), records, ("run",))
    fill_page(options.page, tables(options), heading="# Compression\n")


def tables(options: argparse.Namespace) -> dict[str, str]:
    """A table a size: parameters, perplexities, and the time of a forward relative to the dense model's."""
    dense = json.loads((options.out / "dense-1.json").read_text())
    parts = {}
    for keep in options.keep:
        plain = read_records(options, keep)
        if not plain:
            continue
        again = read_records(options, keep, options.refit) if options.refit else {}
        texts = [*TEXTS, *(f"{name}, refitted" for name in TEXTS if options.refit)]
        lines = ["| | parameters | " + " | ".join(texts) + " | time, of dense |"]
        lines.append("| :-- |" + " --: |" * (len(texts) + 2))
        shown = [f"{dense[name]:,.2f}" for name in TEXTS] + [""] * (len(texts) - len(TEXTS))
        lines.append(f"| dense | {dense['parameters'] / 1e6:.1f} M | " + " | ".join(shown) + " | 1 |")
        for method, found in plain.items():
            shown = [perplexity_text(found[name]) for name in TEXTS]
            if options.refit:
                shown += [perplexity_text(again[method][name]) if method in again else "" for name in TEXTS]
            time_ratio = "" if method in NO_REFIT else f"{found['time_ratio']:.2f}x"
            lines.append(f"| {method} | {found['parameters'] / 1e6:.1f} M | {' | '.join(shown)} | {time_ratio} |")
        lines += ["", *lead_line("without a refit", plain), *lead_line("refitted", again)]
        parts[f"{1 - keep:.0%} removed"] = "\n".join(lines)
    rounded = rounding_table(options)
    return parts | ({"weights of few bits": rounded} if rounded else {})


def perplexity_text(value: float) -> str:
    """A perplexity; beyond what a word is worth, only that."""
    return f"{value:,.2f}" if value < 10_000 else "above 10,000"


def read_records(options: argparse.Namespace, keep: float, refit_length: str | None = None) -> dict[str, Any]:
    """What there is of one size, by method."""
    found = {}
    for method in options.methods:
        path = plain_path(options.out, method, keep)
        path = path if refit_length is None else refitted_path(path, refit_length)
        if path.exists():
            found[method] = json.loads(path.read_text())
    return found


def lead_line(title: str, records: dict[str, Any]) -> list[str]:
    """Our perplexity over that of the best rival on each text; nothing where there is none."""
    rivals = [method for method in RIVALS if method in records]
    if OURS not in records or not rivals:
        return []
    cells = []
    for name in TEXTS:
        best = min(rivals, key=lambda method: records[method][name])
        ours, theirs = (records[method]["nats"][name] for method in (OURS, best))
        found = mean_interval([own - other for own, other in zip(ours, theirs, strict=True)])
        low, high = found.bounds or (found.mean, found.mean)
        cells.append(f"{name} {math.exp(found.mean):.3f}x ({math.exp(low):.3f}-{math.exp(high):.3f}) of {best}")
    return [f"Ours over the best rival, {title}: " + "; ".join(cells) + ".", ""]


def rounding_table(options: argparse.Namespace) -> str:
    """Bytes and perplexities with weights of few bits, smallest first; nothing where none were asked for."""
    found = []
    for keep, method in [(1.0, "dense"), *((keep, method) for keep in options.keep for method in options.methods)]:
        plain = plain_path(options.out, method, keep)
        for bits in options.bits:
            path = rounded_path(plain, bits)
            if path.exists():
                found.append((json.loads(path.read_text()), f"{method}, {1 - keep:.0%} removed, int{bits}"))
    if not found:
        return ""
    lines = [
        "| weights | megabytes |" + "|".join(f" {name} " for name in TEXTS) + "|",
        "|:--|--:|" + "--:|" * len(TEXTS),
    ]
    for numbers, name in sorted(found, key=lambda item: item[0]["bytes"]):
        cells = "|".join(f" {numbers[text]:,.2f} " for text in TEXTS)
        lines.append(f"| {name} | {numbers['bytes'] / 1e6:,.1f} |{cells}|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
