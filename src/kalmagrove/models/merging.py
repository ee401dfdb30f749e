"""A Grove model as a plain dense one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.nn.grove import GroveLinear
from kalmagrove.optim.statistics import is_transposed_linear


@torch.no_grad()
def merge(model: KalmaGroveForCausalLM) -> KalmaGroveForCausalLM:
    """The same function with dense projections, each W = U Sigma V^T multiplied out; the given model stays as it is.

    The active adaptor is merged too; the others are left behind. A dense model gives a copy.
    """
    grove = {name: module for name, module in model.named_modules() if isinstance(module, GroveLinear)}
    owned = tuple(f"{name}." for name in ("model.bases", *grove))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith(owned)}
    weights |= {f"{name}.weight": layer.merged_weight().clone() for name, layer in grove.items()}
    reference = next(model.parameters())
    with torch.device("meta"):
        merged = KalmaGroveForCausalLM(_dense(model.config))
    merged = merged.to_empty(device=reference.device).to(reference.dtype)
    merged.load_state_dict(weights, strict=True)
    merged.generation_config = copy.deepcopy(model.generation_config)
    return merged.train(model.training)


@torch.no_grad()
def dense_weight(layer: nn.Module) -> Tensor:
    """The matrix that a layer multiplies by, (outputs, inputs), however it is stored: in factors, or transposed."""
    if isinstance(layer, GroveLinear):
        return layer.merged_weight()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed_linear(layer) else weight


def _dense(config: KalmaGroveConfig) -> KalmaGroveConfig:
    options = config.to_dict()
    defaults = KalmaGroveConfig()
    for name in ("grove_parts", "rank", "group_size", "sharing", "shared_sides", "core", "core_block_size"):
        options[name] = getattr(defaults, name)
    return KalmaGroveConfig(**options | {"projections": "dense", "adaptors": []})
