"""``kalmagrove compress`` from beginning to end: watch, plan, factorise layer by layer, refit, write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kalmagrove.compression.build import compressed_model
from kalmagrove.compression.calibration import CalibrationText, loss_of, read_calibration_text
from kalmagrove.compression.direct import fit_directly, put_in
from kalmagrove.compression.factorise import Compact
from kalmagrove.compression.layerwise import Cut, Factors, LayerwiseFit
from kalmagrove.compression.measures import Measures, measure
from kalmagrove.compression.moment_store import MomentStore
from kalmagrove.compression.options import LONGEST_CONTEXT, CompressOptions
from kalmagrove.compression.plan import Choice
from kalmagrove.compression.planning import check_reach, make_plan
from kalmagrove.compression.refit import RefitLength, RefitResult, parse_refit, refit
from kalmagrove.compression.sites import Matrix, find_matrices
from kalmagrove.compression.source import Source, open_source, save_tokenizer_of, tokenizer_folder
from kalmagrove.compression.work import WorkFolder, fingerprint_of
from kalmagrove.errors import UsageError
from kalmagrove.files import require_free_folder, whole_folder, write_json_atomic
from kalmagrove.models.compressed import CompressedForCausalLM, to_dense
from kalmagrove.models.convert import write_folder
from kalmagrove.precision import Precision, choose_device, choose_precision

Progress = Callable[[str, float], None]
"""Called with a stage and the part of it that is done."""


@dataclass(frozen=True)
class CompressResult:
    """What came of it.

    Attributes:
        before: Of the dense model.
        after: Of the compressed one, on the same windows.
        factorised: Matrices that became factors.
        shared: Of them, those whose basis others read too.
        cut: Feed-forwards that lost units.
        units_kept: The part of their units that stays.
        followed: Whether each layer was fitted to what the compressed layers before it give; else to what the dense
            ones gave, where that was better.
        refit: What the refit did, or None.
    """

    before: Measures
    after: Measures
    factorised: int
    shared: int
    cut: int
    units_kept: float
    followed: bool
    refit: RefitResult | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compress(options: CompressOptions, progress: Progress = lambda stage, done: None) -> CompressResult:
    """Writes a compressed model.

    What is done is kept in a folder beside the output, ``OUT.work``; the same call goes on from there, and the folder
    goes when the output is whole.

    Args:
        options: What is wanted.
        progress: Of a stage.

    Raises:
        UsageError: An option does not fit the model, or the output exists.
        KalmaGroveError: The source or the text cannot be used.
        OSError: The disk is full or cannot be written.
    """
    length = None if options.refit is None else parse_refit(options.refit)
    for folder in (options.out, options.dense_out):
        if folder is not None:
            require_free_folder(folder.resolve())
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    if device.type == "mps":
        # Its factorisations need float64.
        if options.device != "auto":
            raise UsageError(f"--device {options.device} has no float64, which a compression needs; give --device cpu")
        device = torch.device("cpu")
    source = open_source(options.source)
    dense = source.model.to(device)
    text = _read_text(options, source)
    matrices = find_matrices(dense)
    before = measure(dense, text.valid, dtype=source.dtype, precision=precision)
    check_reach(options, dense, matrices, before.perplexity)
    with WorkFolder(options.work_path, _identity(options, source, text, precision)) as work:
        store = MomentStore(work, matrices)
        _gather(store, dense, text.train, options.seed, precision, progress)
        choices = make_plan(options, dense, store, text, precision, progress)
        factors, followed = _better_fit(dense, matrices, choices, store, text, precision, progress)
        model = compressed_model(dense, matrices, choices, factors)
        result = None if length is None else _refitted(model, options, length, text, precision, work, progress)
        # As they will be read again: rounded to the source's type.
        model = model.to(source.dtype).to(torch.float32)
        after = measure(model, text.valid, dtype=source.dtype, precision=precision)
        factorised = [choice for choice in choices if not choice.is_dense and not choice.group.is_units]
        cut = [choice for choice in choices if not choice.is_dense and choice.group.is_units]
        summary = CompressResult(
            before,
            after,
            factorised=sum(len(choice.group.members) for choice in factorised),
            shared=sum(len(choice.group.members) for choice in factorised if len(choice.group.members) > 1),
            cut=len(cut),
            units_kept=sum(c.rank for c in cut) / sum(c.group.full_rank for c in cut) if cut else 1.0,
            followed=followed,
            refit=result,
        )
        _write(model.to(source.dtype), source, options, summary)
        work.remove()
    return summary


def _refitted(
    model: CompressedForCausalLM,
    options: CompressOptions,
    length: RefitLength,
    text: CalibrationText,
    precision: Precision,
    work: WorkFolder,
    progress: Progress,
) -> RefitResult:
    """Fits a compressed model to its source's logits and hidden states."""
    return refit(
        model,
        open_source(options.source).model.to(next(model.parameters()).device),
        text.train,
        text.valid,
        length,
        batch_size=options.batch_size,
        seed=options.seed,
        precision=precision,
        folder=work.path / "refit",
        progress=lambda done: progress("refitting", done),
    )


def _better_fit(
    dense: PreTrainedModel,
    matrices: list[Matrix],
    choices: list[Choice],
    store: MomentStore,
    text: CalibrationText,
    precision: Precision,
    progress: Progress,
) -> tuple[dict[int, Factors], bool]:
    """The better on the validation windows of the fit to the dense model's inputs and of the one that follows the
    compressed layers, and whether it is the second."""
    device = next(dense.parameters()).device
    direct = fit_directly(dense, matrices, choices, lambda layers: store.of_layers(layers, device))
    following = fit_layers(dense, matrices, choices, store, text.train, precision, progress)
    following_loss = loss_of(dense, text.valid, precision)
    put_in(dense, matrices, direct)
    if loss_of(dense, text.valid, precision) <= following_loss:
        return direct, False
    return following, True


def fit_layers(
    dense: PreTrainedModel,
    matrices: list[Matrix],
    choices: list[Choice],
    store: MomentStore,
    windows: Tensor,
    precision: Precision,
    progress: Progress,
) -> dict[int, Factors]:
    """Factors of all matrices; each layer's are kept, and taken from the work folder where they are there.

    Args:
        dense: Its layers are changed.
        matrices: All of them.
        choices: Of all groups.
        store: Of the moments; its work folder keeps the factors.
        windows: (windows, context + 1).
        precision: "bf16" or "fp32".
        progress: Of the layers.
    """
    fit = LayerwiseFit(dense, matrices, choices, windows[:, :-1], precision=precision)
    device = next(dense.parameters()).device
    factors: dict[int, Factors] = {}
    for place, layer in enumerate(store.layers):
        kept = store.work.read_tensors(f"factors-{layer}")
        if kept is not None:
            own = _unpacked(kept, device)
            fit.skip(layer, own)
        else:
            own = fit.fit(layer, store.of_layers(fit.layers_of(layer), device))
            store.work.write_tensors(f"factors-{layer}", _packed(own))
        factors |= own
        progress("factorising layers", (place + 1) / len(store.layers))
    return factors


def _packed(factors: dict[int, Factors]) -> dict[str, Tensor]:
    tensors = {}
    for number, own in factors.items():
        tensors[f"{number}.reader"] = own.reader
        if own.basis is not None:
            # Of a shared basis every reader keeps a copy: the file holds no two names of one tensor.
            tensors |= {f"{number}.order": own.basis.order.clone(), f"{number}.rest": own.basis.rest.clone()}
        if own.cut is not None:
            tensors[f"{number}.kept"] = own.cut.kept
            tensors[f"{number}.cut"] = torch.tensor([own.cut.size, own.cut.axis])
    return tensors


def _unpacked(tensors: dict[str, Tensor], device: torch.device) -> dict[int, Factors]:
    factors = {}
    for name in tensors:
        number, _, kind = name.partition(".")
        if kind == "reader":
            basis = None
            if f"{number}.rest" in tensors:
                basis = Compact(tensors[f"{number}.order"].to(device), tensors[f"{number}.rest"].to(device))
            cut = None
            if f"{number}.cut" in tensors:
                cut = Cut(tensors[f"{number}.kept"].to(device), *tensors[f"{number}.cut"].tolist())
            factors[int(number)] = Factors(basis, tensors[name].to(device), cut)
    return factors


def _read_text(options: CompressOptions, source: Source) -> CalibrationText:
    limit = int(source.model.config.max_position_embeddings)
    length = min(limit, LONGEST_CONTEXT) if options.context_length is None else options.context_length
    if length > limit:
        raise UsageError(f"--context_length {length} is longer than the model's context, {limit}")
    with tokenizer_folder(source) as folder:
        return read_calibration_text(
            options.data,
            str(folder),
            tokens=options.calibration_tokens,
            context_length=length,
            vocab_size=int(source.model.config.vocab_size),
        )


def _identity(options: CompressOptions, source: Source, text: CalibrationText, precision: Precision) -> dict[str, Any]:
    windows = torch.cat((text.train, text.valid)).numpy().tobytes()
    return {
        "source": fingerprint_of(source.files()),
        "text": hashlib.sha256(windows).hexdigest(),
        "context_length": text.train.shape[1] - 1,
        "precision": precision,
        **{name: getattr(options, name) for name in ("keep", "rank", "target_ppl", "seed")},
    }


def _gather(
    store: MomentStore, dense: PreTrainedModel, windows: Tensor, seed: int, precision: Precision, progress: Progress
) -> None:
    steps = len(store.blocks(dense)) * len(windows)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("watching the dense model", done / steps)

    dense.requires_grad_(False)
    store.gather(dense, windows, seed=seed, precision=precision, progress=step)
    dense.requires_grad_(True)


def _write(model: CompressedForCausalLM, source: Source, options: CompressOptions, summary: CompressResult) -> None:
    """Both folders appear whole, and only when both are."""
    with ExitStack() as stack:
        temporary = stack.enter_context(whole_folder(options.out.resolve()))
        write_folder(model, temporary)
        save_tokenizer_of(source, temporary)
        write_json_atomic(temporary / "compression.json", summary.to_dict())
        if options.dense_out is not None:
            temporary = stack.enter_context(whole_folder(options.dense_out.resolve()))
            write_folder(to_dense(model), temporary)
            save_tokenizer_of(source, temporary)
