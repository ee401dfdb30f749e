"""A larger rank for a model in training, without a change of what it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.nn.grove import Basis, GroveLinear


@torch.no_grad()
def grow_rank(model: KalmaGroveForCausalLM, rank: int, *, seed: int) -> None:
    """Widens the space between the factors of every Grove layer; the function stays the same.

    The shared bases get random directions of their usual size; the core, or where there is none the private factor,
    gets zeros for them, and learns from the first step on. Shared bases stay shared. Parameters keep their names and
    get new tensors: build the optimiser anew.

    Args:
        model: With ``projections: grove`` and a rank.
        rank: The new one, for all projections.
        seed: Of the new directions.

    Raises:
        ValueError: The model has no rank above 1 that could grow, or the new one is not larger, or does not fit the
            widths or the blocks of the cores.
    """
    config = model.config
    if config.projections != "grove" or config.rank is None:
        raise ValueError("only Grove layers with a rank can grow; this model's projections are dense or of full rank")
    if config.rank == 1:
        raise ValueError("a rank of 1 cannot grow: its factors are trained as vectors; begin with 2 or more")
    if rank <= config.rank:
        raise ValueError(f"the new rank must be above {config.rank}, got {rank}")
    grown = type(config)(**config.to_dict() | {"rank": rank})
    if config.sharing == "band" and config.group_size > 1:
        raise ValueError("bands cut the rank into pieces with fixed places; use sharing: group or cycle to grow")
    layers = [module for module in model.modules() if isinstance(module, GroveLinear)]
    block_size = config.core_block_size
    if config.core == "block" and rank % block_size:
        raise ValueError(f"rank {rank} is not divisible by the core's block size {block_size}")
    generator = torch.Generator().manual_seed(seed)
    for name, basis in model.named_modules():
        if isinstance(basis, Basis):
            _widen(basis, "weight", rank, axis=1 if ".left." in f".{name}." else 0, std=basis.std, generator=generator)
    for layer in layers:
        _grow_layer(layer, rank, generator)
    model.config.rank = grown.rank


def _grow_layer(layer: GroveLinear, rank: int, generator: torch.Generator) -> None:
    # Without a core one factor must be zero in the new directions; the other one must not, or nothing would learn.
    has_core = layer.core_kind != "none"
    if layer.left_kind == "private":
        _widen(layer, "left", rank, axis=1, std=layer.std if has_core else 0.0, generator=generator)
    if layer.right_kind == "private":
        is_zero = not has_core and layer.left_kind != "private"
        _widen(layer, "right", rank, axis=0, std=0.0 if is_zero else layer.std, generator=generator)
    if has_core:
        layer.core = _larger(layer.core, layer, rank)
    for name, change in list(layer.adaptors.items()):
        layer.adaptors[name] = _larger(change, layer, rank)
    layer.rank = rank


def _larger(core: Tensor, layer: GroveLinear, rank: int) -> nn.Parameter:
    """A core with zeros for the new directions."""
    shape = (rank,) * core.ndim if core.ndim < 3 else (rank // layer.block_size, *core.shape[1:])
    larger = core.new_zeros(shape)
    larger[tuple(slice(0, size) for size in core.shape)] = core
    return nn.Parameter(larger, requires_grad=core.requires_grad)


def _widen(module: nn.Module, name: str, rank: int, *, axis: int, std: float, generator: torch.Generator) -> None:
    """Puts new rows or columns behind a parameter's own."""
    parameter = getattr(module, name)
    shape = list(parameter.shape)
    shape[axis] = rank - shape[axis]
    new = torch.randn(shape, generator=generator).to(parameter) * std
    setattr(module, name, nn.Parameter(torch.cat((parameter, new), dim=axis), requires_grad=parameter.requires_grad))
