"""The ranks of a compression: of a part of the parameters, of one number, or of a perplexity that is not passed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kalmagrove.compression.calibration import CalibrationText, loss_of
from kalmagrove.compression.layerwise import LayerwiseFit
from kalmagrove.compression.moment_store import MomentStore
from kalmagrove.compression.options import CompressOptions
from kalmagrove.compression.plan import Choice, Group, choose_forms, choose_ranks, merge_groups
from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.units import find_feed_forwards
from kalmagrove.errors import UsageError
from kalmagrove.precision import Precision

SEARCH_STEPS = 6
Forms = list[list[list[Group]]]


def smallest_part(dense: PreTrainedModel, matrices: Sequence[Matrix]) -> float:
    """The part of a model's parameters that is left with rank 1 everywhere."""
    total = sum(parameter.numel() for parameter in dense.parameters())
    saved = sum(m.in_features * m.out_features - (m.in_features + m.out_features - 1) for m in matrices)
    return 1 - saved / total


def check_reach(
    options: CompressOptions, dense: PreTrainedModel, matrices: Sequence[Matrix], perplexity: float
) -> None:
    """That the size or the perplexity that is asked for is possible.

    Args:
        options: ``keep`` or ``target_ppl``.
        dense: The model.
        matrices: All of them.
        perplexity: Of the dense model on the validation windows.

    Raises:
        UsageError: It is not.
    """
    least = smallest_part(dense, matrices)
    if options.keep is not None and options.keep < least:
        raise UsageError(
            f"--keep {options.keep:g} is out of reach: embeddings, head, norms and rank 1 everywhere are {least:.1%} "
            f"of this model; give at least --keep {math.ceil(least * 100) / 100:g}"
        )
    if options.target_ppl is not None and options.target_ppl < perplexity:
        raise UsageError(
            f"--target_ppl {options.target_ppl:g} is below the dense model's own {perplexity:.3f} on this text; give a "
            "larger one"
        )


def make_plan(
    options: CompressOptions,
    dense: PreTrainedModel,
    store: MomentStore,
    text: CalibrationText,
    precision: Precision,
    progress: Callable[[str, float], None],
) -> list[Choice]:
    """Every group and its rank; kept in the work folder, and taken from there where it is there.

    Args:
        options: ``keep``, ``rank`` or ``target_ppl`` decides.
        dense: The model, in its original weights.
        store: Of the moments.
        text: Its validation windows are what ``target_ppl`` is measured on.
        precision: "bf16" or "fp32".
        progress: Of the plan.

    Raises:
        UsageError: What is asked for cannot be reached.
    """
    kept = store.work.read_json("plan")
    if kept is not None:
        return _unpacked(kept, store)
    if options.rank is not None:
        singles = [form[0] for part in _forms(dense, store, progress, with_units=False) for form in part]
        choices = [Choice(group, min(options.rank, group.full_rank)) for group in singles]
    elif options.keep is not None:
        choices = _plan_for(options.keep, _forms(dense, store, progress), dense, store)
    else:
        assert options.target_ppl is not None
        forms = _forms(dense, store, progress)
        choices = _search(options.target_ppl, forms, dense, store, text, precision, progress)
    store.work.write_json("plan", _packed(choices))
    return choices


def _forms(
    dense: PreTrainedModel, store: MomentStore, progress: Callable[[str, float], None], *, with_units: bool = True
) -> Forms:
    """Of each part of the model the groups of each form that it may take: bases of its matrices, or its units."""
    device = next(dense.parameters()).device
    feed_forwards = find_feed_forwards(store.matrices) if with_units else []
    inside = {number for members in feed_forwards for number in members}
    parts = [*((number,) for number in range(len(store.matrices)) if number not in inside), *feed_forwards]
    forms: Forms = []
    for done, members in enumerate(sorted(parts), start=1):
        bases = [store.group((number,), device) for number in members]
        forms.append([bases, [store.unit_group(members, device)]] if members in feed_forwards else [bases])
        progress("planning ranks", done / len(parts))
    return forms


def _plan_for(keep: float, forms: Forms, dense: PreTrainedModel, store: MomentStore) -> list[Choice]:
    """Forms and sizes of single matrices give the price at which matrices share bases; then the ranks of the groups."""
    total = sum(parameter.numel() for parameter in dense.parameters())
    budget = int(keep * total) - total + sum(matrix.in_features * matrix.out_features for matrix in store.matrices)
    singles = choose_forms(forms, budget)
    choices, price = choose_ranks(singles, budget)
    if all(choice.is_dense for choice in choices):
        return choices
    device = next(dense.parameters()).device
    groups = merge_groups(singles, store.matrices, price, lambda members: store.group(members, device).losses)
    return choose_ranks(groups, budget)[0]


def _search(
    target: float,
    forms: Forms,
    dense: PreTrainedModel,
    store: MomentStore,
    text: CalibrationText,
    precision: Precision,
    progress: Callable[[str, float], None],
) -> list[Choice]:
    """The smallest model within the target, by bisection of the part that is kept."""
    kept = store.work.read_json("search") or {"step": 0, "low": smallest_part(dense, store.matrices), "high": 1.0}
    low, high = kept["low"], kept["high"]
    best = _unpacked(kept["best"], store) if "best" in kept else _plan_for(1.0, forms, dense, store)
    for step in range(kept["step"], SEARCH_STEPS):
        keep = (low + high) / 2
        choices = _plan_for(keep, forms, dense, store)
        if _perplexity_of(choices, dense, store, text, precision) <= target:
            best, high = choices, keep
        else:
            low = keep
        store.work.write_json("search", {"step": step + 1, "low": low, "high": high, "best": _packed(best)})
        progress("searching the size", (step + 1) / SEARCH_STEPS)
    return best


def _perplexity_of(
    choices: Sequence[Choice], dense: PreTrainedModel, store: MomentStore, text: CalibrationText, precision: Precision
) -> float:
    model = copy.deepcopy(dense)
    device = next(dense.parameters()).device
    fit = LayerwiseFit(model, store.matrices, choices, text.train[:, :-1], precision=precision)
    for layer in store.layers:
        fit.fit(layer, store.of_layers(fit.layers_of(layer), device))
    return math.exp(min(700.0, loss_of(model, text.valid, precision)))


def _packed(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    return [
        {"members": list(choice.group.members), "rank": choice.rank, "is_units": choice.group.is_units}
        for choice in choices
    ]


def _unpacked(values: list[dict[str, Any]], store: MomentStore) -> list[Choice]:
    choices = []
    for value in values:
        members = tuple(value["members"])
        if value["is_units"]:
            choices.append(Choice(store.unit_group(members, torch.device("cpu")), value["rank"]))
            continue
        own = [store.matrices[number] for number in members]
        out_features = sum(matrix.out_features for matrix in own)
        choices.append(Choice(Group(members, own[0].in_features, out_features, torch.zeros(0)), value["rank"]))
    return choices
