"""The layers of a model that an adaptor changes: dense ones of torch and transformers, and Grove's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from kalmagrove.errors import KalmaGroveError
from kalmagrove.models.merging import dense_weight
from kalmagrove.nn.grove import GroveLinear
from kalmagrove.optim.groups import embeddings_of
from kalmagrove.optim.statistics import is_transposed_linear


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that multiplies by a matrix of its own or of Grove's, by its name; embeddings and heads are left out.

    Args:
        model: Ours, or any of transformers: ``nn.Linear`` and the Conv1D of GPT-2 are known.

    Raises:
        KalmaGroveError: The model has no such layer.
    """
    tables = {id(table) for table in embeddings_of(model)}
    layers = {
        name: module
        for name, module in model.named_modules()
        if is_adaptable(module) and not (_has_matrix(module) and id(module.weight) in tables)
    }
    if not layers:
        raise KalmaGroveError("the model has no linear layers to adapt; give a language model of transformers")
    return layers


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a layer multiplies by a matrix that an adaptor can change."""
    return isinstance(layer, GroveLinear) or _has_matrix(layer)


def _has_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


@torch.no_grad()
def with_change(layer: nn.Module, change: Tensor) -> nn.Module:
    """A dense layer whose matrix is a layer's with something added, in the form of the layer where that is dense.

    Args:
        layer: Stays as it is.
        change: (outputs, inputs).
    """
    weight = dense_weight(layer)
    changed = (weight.float() + change.float()).to(weight.dtype)
    # Only its form is wanted, so that no memory is taken and no random number drawn.
    with torch.device("meta"):
        make: Any = type(layer) if is_transposed_linear(layer) else nn.Linear
        merged = make(*(changed if is_transposed_linear(layer) else changed.T).shape)
    stored = changed.T if is_transposed_linear(layer) else changed
    merged.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    merged.bias = getattr(layer, "bias", None)
    return cast(nn.Module, merged.train(layer.training))
