"""`kalmagrove compress` against other ways to make a dense model smaller: perplexity at equal size.

    python benchmarks/compression.py --source runs/smollm2-135m --out runs/compression

The rivals are written from their papers: truncated SVD; ASVD (Yuan et al., arXiv:2312.05821: columns scaled by the
inputs' size); SVD-LLM (arXiv:2403.07378: whitened by the Cholesky factor of the inputs' second moment); Basis Sharing
(arXiv:2410.03765: query, key, value, gate and up of two neighbouring layers over one whitened basis); and units of the
feed-forward cut by what they send on, with the matrix behind them fitted anew by least squares. "svd-llm compact" is
SVD-LLM with our storage of factors, which keeps a larger rank in the same number of parameters: what it lacks to ours
is the choice of ranks and of directions. All see the same calibration windows; sizes count all parameters of the model,
embeddings included. Time is that of a forward of 256 tokens over the dense model's, both in turns. With --refit all are
trained as long, by the same loss, optimiser and rate; ours alone takes the better of two fits on the held-out text.

With --bits 8 4 every model is also scored with its matrices rounded to so many bits (see weight_rounding.py), and its
bytes are counted: what pruning by rank and rounding bring together.

Every result is a file in --out; what is there is not computed again. The table is printed and written to table.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.build import compressed_model
from kalmagrove.compression.calibration import CalibrationText, loss_of, read_calibration_text
from kalmagrove.compression.compress import fit_layers
from kalmagrove.compression.direct import fit_directly, put_in
from kalmagrove.compression.measures import measure
from kalmagrove.compression.model import has_bias
from kalmagrove.compression.moment_store import MomentStore
from kalmagrove.compression.options import CompressOptions
from kalmagrove.compression.planning import make_plan
from kalmagrove.compression.refit import parse_refit, refit
from kalmagrove.compression.sites import Matrix, find_matrices
from kalmagrove.compression.source import open_source
from kalmagrove.compression.whitening import cholesky_root
from kalmagrove.compression.work import WorkFolder
from kalmagrove.files import remove, write_json_atomic, write_text_atomic
from kalmagrove.models.merging import dense_weight
from kalmagrove.precision import autocast
from weight_rounding import round_weights

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTS = {"wikitext": DATA / "wikitext" / "test.txt.xz", "textbooks": DATA / "textbooks" / "test.txt.xz"}
SHARED_KINDS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
LAYERS_A_BASIS = 2
TIMED_TOKENS, TIMED_ROUNDS = 256, 8

Split = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a matrix (out, in) and A to the full left and right factors, best directions first."""


def plain_split(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """U Sigma and V^T of the matrix itself."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u * s, v


def scaled_split(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """ASVD: of the matrix with its columns scaled by the size of their inputs to the power of a half."""
    scale = inputs.diagonal().clamp_min(1e-12).sqrt().sqrt()
    left, right = plain_split(weight * scale, inputs)
    return left, right / scale


def whitened_split(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """SVD-LLM: of W S with S S^T = A."""
    root, inverse = cholesky_root(inputs)
    left, right = plain_split(weight @ root, inputs)
    return left, right @ inverse


class TwoFactors(nn.Module):
    """y = U V^T x + bias; several may hold the same V^T."""

    def __init__(self, right: nn.Linear, left: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.right = right
        self.left = linear_of(left)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.right(x))
        return y if self.bias is None else y + self.bias


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer of a matrix (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().float().contiguous().clone())
    return layer


def put_factors(model: PreTrainedModel, matrix: Matrix, right: nn.Linear, left: Tensor) -> None:
    """Replaces a linear layer."""
    dense = model.get_submodule(matrix.name)
    model.set_submodule(matrix.name, TwoFactors(right, left, dense.bias if has_bias(dense) else None))


def low_rank(model: PreTrainedModel, matrices: list[Matrix], store: MomentStore, share: float, split: Split) -> None:
    """Every matrix by itself, the same part of its parameters kept."""
    for matrix in matrices:
        weight = dense_weight(model.get_submodule(matrix.name)).double()
        inputs = store.of_layers([matrix.layer], weight.device).inputs[matrix.site].double()
        rank = max(1, int(share * weight.numel() / sum(weight.shape)))
        left, right = split(weight, inputs)
        put_factors(model, matrix, linear_of(right[:rank]), left[:, :rank])


def compact_low_rank(model: PreTrainedModel, matrices: list[Matrix], store: MomentStore, share: float) -> None:
    """SVD-LLM with r (out + in - r) numbers a matrix; they are counted so, and multiplied out here."""
    for matrix in matrices:
        weight = dense_weight(model.get_submodule(matrix.name))
        inputs = store.of_layers([matrix.layer], weight.device).inputs[matrix.site].double()
        both, budget = sum(weight.shape), share * weight.numel()
        rank = max(1, int((both - math.sqrt(both**2 - 4 * budget)) / 2))
        left, right = whitened_split(weight.double(), inputs)
        with torch.no_grad():
            weight.copy_(left[:, :rank] @ right[:rank])


def basis_sharing(model: PreTrainedModel, matrices: list[Matrix], store: MomentStore, share: float) -> None:
    """Neighbouring layers' matrices of one kind over one basis; those that write are split by themselves."""
    groups: dict[tuple[str, int], list[Matrix]] = {}
    for number, matrix in enumerate(matrices):
        alone = matrix.kind not in SHARED_KINDS
        groups.setdefault((matrix.kind, -number if alone else matrix.layer // LAYERS_A_BASIS), []).append(matrix)
    for members in groups.values():
        moments = store.of_layers([matrix.layer for matrix in members], torch.device("cpu"))
        inputs = torch.stack([moments.inputs[matrix.site].double() for matrix in members]).mean(dim=0)
        weights = [dense_weight(model.get_submodule(matrix.name)).double() for matrix in members]
        stacked = torch.cat(weights)
        left, right = whitened_split(stacked, inputs)
        rank = max(1, int(share * stacked.numel() / sum(stacked.shape)))
        shared = linear_of(right[:rank])
        for matrix, own in zip(members, left[:, :rank].split([len(weight) for weight in weights]), strict=True):
            put_factors(model, matrix, shared, own)


def cut_units(model: PreTrainedModel, matrices: list[Matrix], store: MomentStore, share: float) -> None:
    """Units of the feed-forward with the least power sent on, all other matrices staying."""
    total = sum(matrix.in_features * matrix.out_features for matrix in matrices)
    inner = [matrix for matrix in matrices if matrix.kind in ("gate_proj", "up_proj", "down_proj")]
    size = sum(matrix.in_features * matrix.out_features for matrix in inner)
    kept_share = max(0.02, 1 - (1 - share) * total / size)
    for down in (matrix for matrix in inner if matrix.kind == "down_proj"):
        inputs = store.of_layers([down.layer], torch.device("cpu")).inputs[down.site].double()
        weight = dense_weight(model.get_submodule(down.name)).double()
        power = inputs.diagonal() * weight.square().sum(dim=0)
        kept = power.topk(int(kept_share * len(power))).indices.sort().values
        _, inverse = cholesky_root(inputs[kept][:, kept])
        fitted = weight @ inputs[:, kept] @ inverse.T @ inverse
        model.set_submodule(down.name, linear_of(fitted))
        for matrix in (m for m in inner if m.layer == down.layer and m is not down):
            rows = dense_weight(model.get_submodule(matrix.name))[kept]
            model.set_submodule(matrix.name, linear_of(rows))


RIVALS: dict[str, Callable[[PreTrainedModel, list[Matrix], MomentStore, float], None]] = {
    "svd": lambda *a: low_rank(*a, plain_split),
    "asvd": lambda *a: low_rank(*a, scaled_split),
    "svd-llm": lambda *a: low_rank(*a, whitened_split),
    "svd-llm compact": compact_low_rank,
    "basis sharing": basis_sharing,
    "cut units": cut_units,
}
NO_REFIT = ("svd-llm compact",)
"""Only multiplied out here: a refit would train more numbers than are counted."""


def ours(
    dense: PreTrainedModel,
    matrices: list[Matrix],
    store: MomentStore,
    text: CalibrationText,
    keep: float,
    precision: str,
) -> PreTrainedModel:
    """As the command does it."""
    device = next(dense.parameters()).device
    options = CompressOptions(source="", out=Path("unused"), keep=keep)
    choices = make_plan(options, dense, store, text, precision, lambda stage, done: None)
    direct = fit_directly(dense, matrices, choices, lambda layers: store.of_layers(layers, device))
    following = fit_layers(dense, matrices, choices, store, text.train, precision, lambda stage, done: None)
    followed = loss_of(dense, text.valid, precision)
    put_in(dense, matrices, direct)
    better = direct if loss_of(dense, text.valid, precision) <= followed else following
    return compressed_model(dense, matrices, choices, better)


def parsed() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", required=True, help="a Llama-style folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--methods", nargs="+", default=[*RIVALS, "kalmagrove"])
    parser.add_argument("--calibration_tokens", type=int, default=65536, help="half of each text's train split")
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--test_tokens", type=int, default=10**9, help="most of each test text")
    parser.add_argument("--refit", default=None, help="the same for all: 10m or tokens")
    parser.add_argument("--bits", type=int, nargs="*", default=[], help="also with weights of so many bits: 8 4")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    return parser.parse_args()


def read_texts(options: argparse.Namespace, vocab_size: int) -> tuple[CalibrationText, dict[str, Tensor]]:
    """Calibration from both train splits, and the windows of both test splits."""
    common = {"context_length": options.context_length, "vocab_size": vocab_size}
    halves = [
        read_calibration_text(
            str(path.with_name("train.txt.xz")), options.source, tokens=options.calibration_tokens // 2, **common
        )
        for path in TEXTS.values()
    ]
    tests = {}
    for name, path in TEXTS.items():
        # An eighth more is read for a check; the test uses all of it.
        tokens = min(options.test_tokens, int(_count_tokens(path, options.source) / 1.13))
        both = read_calibration_text(str(path), options.source, tokens=tokens, **common)
        tests[name] = torch.cat((both.train, both.valid))
    return CalibrationText(*(torch.cat([getattr(h, part) for h in halves]) for part in ("train", "valid"))), tests


def _count_tokens(path: Path, source: str) -> int:
    from kalmagrove.data.sources import iter_documents
    from kalmagrove.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    return sum(len(tokenizer.encode(document, add_special_tokens=False).ids) for document in iter_documents(str(path)))


def main() -> None:
    """Runs what is not there yet and writes the table."""
    options = parsed()
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
    total = sum(parameter.numel() for parameter in dense.parameters())
    body = sum(matrix.in_features * matrix.out_features for matrix in matrices)
    for keep in options.keep:
        for method in options.methods:

            def build(method: str = method, keep: float = keep) -> PreTrainedModel:
                model = copy.deepcopy(dense)
                if method == "kalmagrove":
                    own = MomentStore(WorkFolder(options.out / f"work-{keep:g}", identity), matrices)
                    for layer in store.layers:
                        link = own.work.path / f"moments-{layer}.safetensors"
                        if not link.exists():
                            link.symlink_to((store.work.path / link.name).resolve())
                    return ours(model, matrices, own, text, keep, options.precision)
                share = (keep * total - (total - body)) / body
                if share <= 0:
                    raise SystemExit(f"embeddings and norms alone are more than {keep:.0%} of the parameters")
                RIVALS[method](model, matrices, store, share)
                return model

            score_once(options, method, keep, build, text, tests)
    table = markdown(options)
    write_text_atomic(options.out / "table.md", table)
    print(table)


def score_once(
    options: argparse.Namespace,
    method: str,
    keep: float,
    build: Callable[[], PreTrainedModel],
    text: CalibrationText,
    tests: dict[str, Tensor],
) -> None:
    """Builds, scores and perhaps refits one model, and keeps the numbers."""
    plain = options.out / f"{method.replace(' ', '-')}-{keep:g}.json"
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
        print(plain.stem, plain.read_text().replace("\n", " "), flush=True)
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
        write_json_atomic(refitted, scores(model, options, text, tests) | {"refit_tokens": result.tokens})
        remove(refitted.with_suffix(".work"))
        print(refitted.stem, refitted.read_text().replace("\n", " "), flush=True)


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
) -> dict[str, float]:
    """Perplexities, and what the model costs."""
    found = measure(model, text.valid, dtype=torch.float32, precision=options.precision)
    perplexities = {
        name: math.exp(min(700.0, loss_of(model, windows, options.precision))) for name, windows in tests.items()
    }
    return perplexities | {"parameters": found.parameters, "tokens_per_second": found.tokens_per_second}


def markdown(options: argparse.Namespace) -> str:
    """A table a size: parameters, perplexities, and the time of a forward relative to the dense model's."""
    dense = json.loads((options.out / "dense-1.json").read_text())
    parts = []
    for keep in options.keep:
        names = [*TEXTS, *([f"{name}, refitted" for name in TEXTS] if options.refit else [])]
        lines = [f"**{1 - keep:.0%} removed**", "", "| | parameters | " + " | ".join(names) + " | time, of dense |"]
        lines.append("| :-- |" + " --: |" * (len(names) + 2))
        shown = [f"{dense[name]:,.2f}" for name in TEXTS] + [""] * (len(names) - len(TEXTS))
        lines.append(f"| dense | {dense['parameters'] / 1e6:.1f} M | " + " | ".join(shown) + " | 1 |")
        for method in options.methods:
            plain = options.out / f"{method.replace(' ', '-')}-{keep:g}.json"
            if not plain.exists():
                continue
            found = json.loads(plain.read_text())
            refitted = refitted_path(plain, options.refit)
            again = json.loads(refitted.read_text()) if options.refit and refitted.exists() else {}
            shown = [f"{found[name]:,.2f}" for name in TEXTS]
            shown += [f"{again[name]:,.2f}" if again else "-" for name in TEXTS] if options.refit else []
            time_ratio = "-" if method in NO_REFIT else f"{found['time_ratio']:.2f}x"
            lines.append(f"| {method} | {found['parameters'] / 1e6:.1f} M | {' | '.join(shown)} | {time_ratio} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" + rounding_table(options)


def rounding_table(options: argparse.Namespace) -> str:
    """Bytes and perplexities with weights of few bits, smallest first; nothing where none were asked for."""
    found = []
    for keep, method in [(1.0, "dense"), *((keep, method) for keep in options.keep for method in options.methods)]:
        plain = options.out / f"{method.replace(' ', '-')}-{keep:g}.json"
        for bits in options.bits:
            path = rounded_path(plain, bits)
            if path.exists():
                found.append((json.loads(path.read_text()), f"{method}, {1 - keep:.0%} removed, int{bits}"))
    if not found:
        return ""
    lines = [
        "",
        "| weights | megabytes |" + "|".join(f" {name} " for name in TEXTS) + "|",
        "|:--|--:|" + "--:|" * len(TEXTS),
    ]
    for numbers, name in sorted(found, key=lambda item: item[0]["bytes"]):
        cells = "|".join(f" {numbers[text]:,.2f} " for text in TEXTS)
        lines.append(f"| {name} | {numbers['bytes'] / 1e6:,.1f} |{cells}|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
