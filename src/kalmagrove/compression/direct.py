"""Factors from the dense model's moments alone: what a layer reads is taken to be what it read before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from kalmagrove.compression.factorise import Compact, best_reader, compact_basis, spectrum_of
from kalmagrove.compression.layerwise import Factors, sum_of
from kalmagrove.compression.plan import Choice
from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.statistics import Moments
from kalmagrove.models.merging import dense_weight


@torch.no_grad()
def fit_directly(
    model: PreTrainedModel,
    matrices: Sequence[Matrix],
    choices: Sequence[Choice],
    moments_of: Callable[[Sequence[int]], Moments],
) -> dict[int, Factors]:
    """Factors of all matrices, by number; the model stays as it is.

    Args:
        model: Dense.
        matrices: All of them.
        choices: Of all groups.
        moments_of: Of the matrices of some layers.
    """
    factors: dict[int, Factors] = {}
    for choice in choices:
        members = choice.group.members
        weights = {n: dense_weight(model.get_submodule(matrices[n].name)).detach() for n in members}
        if choice.is_dense:
            factors |= {n: Factors(None, weight.clone()) for n, weight in weights.items()}
            continue
        moments = moments_of([matrices[n].layer for n in members])
        sites = sorted({matrices[n].site for n in members})
        spectrum = spectrum_of(sum_of(moments.inputs, sites) / len(sites), sum_of(moments.sensitivities, members))
        basis = compact_basis(spectrum.directions[: choice.rank])
        basis = Compact(basis.order, basis.rest.float())
        for n, weight in weights.items():
            factors[n] = Factors(basis, best_reader(weight, basis, moments.inputs[matrices[n].site]).float())
    return factors


@torch.no_grad()
def put_in(model: PreTrainedModel, matrices: Sequence[Matrix], factors: Mapping[int, Factors]) -> None:
    """Replaces a model's matrices by what factors multiply out to."""
    for number, own in factors.items():
        dense_weight(model.get_submodule(matrices[number].name)).copy_(own.product())
