"""A compressed model from a dense one and its factors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.layerwise import Cut, Factors
from kalmagrove.compression.plan import Choice
from kalmagrove.compression.sites import Matrix
from kalmagrove.models.compressed import CompressedForCausalLM, has_bias, resized
from kalmagrove.models.compressed_config import CompressedConfig
from kalmagrove.models.merging import dense_weight
from kalmagrove.nn.compact import CompactBasis, CompactLinear


def compressed_config(
    dense: PreTrainedModel, matrices: Sequence[Matrix], choices: Sequence[Choice]
) -> CompressedConfig:
    """The configuration of a dense model whose matrices take the chosen ranks."""
    bases: dict[str, list[int]] = {}
    readers: dict[str, str] = {}
    sizes: dict[str, list[int]] = {}
    for choice in choices:
        if choice.is_dense:
            continue
        if choice.group.is_units:
            *reading, writing = (matrices[number] for number in choice.group.members)
            sizes |= {matrix.name: [matrix.in_features, choice.rank] for matrix in reading}
            sizes[writing.name] = [choice.rank, writing.out_features]
            continue
        # The name of the first matrix that reads it; module names hold no dots.
        name = matrices[choice.group.members[0]].name.replace(".", "-")
        bases[name] = [choice.rank, choice.group.in_features]
        readers |= {matrices[number].name: name for number in choice.group.members}
    return CompressedConfig(text_config=copy.deepcopy(dense.config), bases=bases, factors=readers, sizes=sizes)


@torch.no_grad()
def compressed_model(
    dense: PreTrainedModel, matrices: Sequence[Matrix], choices: Sequence[Choice], factors: Mapping[int, Factors]
) -> CompressedForCausalLM:
    """The dense model with factors in the place of its matrices; it is taken over, not copied.

    Args:
        dense: In its original or in its changed weights; what stays dense is taken from the factors.
        matrices: All of them.
        choices: Of all groups.
        factors: Of every matrix, by its number.
    """
    config = compressed_config(dense, matrices, choices)
    bases = nn.ModuleDict()
    for number, own in sorted(factors.items()):
        matrix = matrices[number]
        layer = dense.get_submodule(matrix.name)
        if own.cut is not None:
            dense.set_submodule(matrix.name, _cut_layer(layer, own, own.cut))
            continue
        if own.basis is None:
            dense_weight(layer).copy_(own.reader)
            continue
        name = config.factors[matrix.name]
        if name not in bases:
            basis = CompactBasis(own.basis.rank, matrix.in_features)
            basis.order.copy_(own.basis.order)
            basis.rest.copy_(own.basis.rest)
            bases[name] = basis
        shared = bases[name]
        assert isinstance(shared, CompactBasis)
        with torch.random.fork_rng(devices=[]):
            factored = CompactLinear(matrix.in_features, matrix.out_features, shared, bias=has_bias(layer))
        factored.left.copy_(own.reader)
        if factored.bias is not None:
            factored.bias.copy_(layer.bias)
        dense.set_submodule(matrix.name, factored)
    with torch.device("meta"):
        model = CompressedForCausalLM(config)
    model.decoder, model.bases = dense, bases.to(next(dense.parameters()).device)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.eval()


def _cut_layer(layer: nn.Module, own: Factors, cut: Cut) -> nn.Module:
    """A linear layer of the same kind with fewer outputs or inputs."""
    out_features, in_features = own.reader.shape
    made = resized(layer, in_features, out_features).to(own.reader.device)
    dense_weight(made).copy_(own.reader)
    if has_bias(layer):
        bias = layer.bias
        assert isinstance(bias, Tensor) and isinstance(made.bias, Tensor)
        made.bias.copy_(bias[cut.kept.long()] if cut.axis == 0 else bias)
    return made
