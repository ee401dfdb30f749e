"""Factors from the dense model's moments alone: what a layer reads is taken to be what it read before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kalmagrove.compression.factorise import Compact, best_reader, compact_basis, spectrum_of
from kalmagrove.compression.layerwise import Factors, cut_matrix, sum_of
from kalmagrove.compression.plan import Choice
from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.statistics import Moments
from kalmagrove.compression.whitening import cholesky_root
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
        if choice.group.is_units:
            writer, kept = members[-1], choice.kept_units.to(weights[members[-1]].device)
            weights[writer] = refitted_writer(weights[writer], moments.inputs[matrices[writer].site], kept)
            factors |= {n: cut_matrix(weight, choice, n) for n, weight in weights.items()}
            continue
        sites = sorted({matrices[n].site for n in members})
        spectrum = spectrum_of(sum_of(moments.inputs, sites) / len(sites), sum_of(moments.sensitivities, members))
        basis = compact_basis(spectrum.directions[: choice.rank])
        basis = Compact(basis.order, basis.rest.float())
        for n, weight in weights.items():
            factors[n] = Factors(basis, best_reader(weight, basis, moments.inputs[matrices[n].site]).float())
    return factors


def refitted_writer(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """The matrix that gives from some units what it gave from all, in the mean square; its other columns are zero.

    Args:
        weight: (out_features, units).
        inputs: E[x x^T] of all units.
        kept: Numbers of those that stay.
    """
    moment = inputs.double()
    _, inverse = cholesky_root(moment[kept][:, kept])
    fitted = weight.double() @ moment[:, kept] @ inverse.T @ inverse
    return torch.zeros_like(weight, dtype=torch.float64).index_copy_(1, kept, fitted)


@torch.no_grad()
def put_in(model: PreTrainedModel, matrices: Sequence[Matrix], factors: Mapping[int, Factors]) -> None:
    """Replaces a model's matrices by what factors multiply out to."""
    for number, own in factors.items():
        dense_weight(model.get_submodule(matrices[number].name)).copy_(own.product())
