"""Builds the projections of a configuration: dense layers, or Grove layers over shared bases."""

from __future__ import annotations

from typing import Literal

from torch import nn

from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.nn.grove import Basis, Core, GroveBank, GroveLinear
from kalmagrove.nn.layers import MakeProjection

WRITES = ("o_proj", "down_proj")
"""Projections whose output goes to the residual stream; all others read from it."""


class GroveBases(nn.Module):
    """All shared bases of a model: for each type of projection a bank for U, for V^T, or for both."""

    def __init__(self, config: KalmaGroveConfig) -> None:
        super().__init__()
        self.left = nn.ModuleDict()
        self.right = nn.ModuleDict()
        for name, (in_features, out_features) in projection_sizes(config).items():
            if not is_grove(config, name):
                continue
            rank = basis_rank(config, name, in_features, out_features)
            if "left" in shared_sides(config, name):
                self.left[name] = _bank(config, out_features, rank, rank_axis=1)
            if "right" in shared_sides(config, name):
                self.right[name] = _bank(config, rank, in_features, rank_axis=0)

    def of_layer(self, side: str, name: str, layer: int) -> tuple[Basis, ...]:
        """The shared pieces that a layer's projection uses on a side ("left" or "right")."""
        bank = (self.left if side == "left" else self.right)[name]
        assert isinstance(bank, GroveBank)
        return bank.of_layer(layer)


def _bank(config: KalmaGroveConfig, rows: int, columns: int, rank_axis: Literal[0, 1]) -> GroveBank:
    return GroveBank(
        rows,
        columns,
        num_layers=config.num_hidden_layers,
        group_size=config.group_size,
        sharing=config.sharing,
        rank_axis=rank_axis,
        std=factor_std(config),
    )


def factor_std(config: KalmaGroveConfig) -> float:
    """Standard deviation of a factor's entries, so that the product's entries have the configured one."""
    if config.rank is None and config.shared_sides != "both":
        return config.initializer_range
    rank = config.rank or min(config.hidden_size, config.attention_width, config.intermediate_size)
    return (config.initializer_range / rank**0.5) ** 0.5


def projection_sizes(config: KalmaGroveConfig) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each projection of a layer."""
    hidden, width, inner = config.hidden_size, config.attention_width, config.intermediate_size
    sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (hidden, width))
    sizes["o_proj"] = (width, hidden)
    if config.feed_forward == "swiglu":
        sizes["gate_proj"] = (hidden, inner)
    return sizes | {"up_proj": (hidden, inner), "down_proj": (inner, hidden)}


def is_grove(config: KalmaGroveConfig, name: str) -> bool:
    """Whether a projection is a Grove layer."""
    part = "feed_forward" if name in ("gate_proj", "up_proj", "down_proj") else "attention"
    return config.projections == "grove" and config.grove_parts in ("all", part)


def shared_sides(config: KalmaGroveConfig, name: str) -> tuple[str, ...]:
    """The sides of a projection whose basis is shared: "left" is U, "right" is V."""
    if config.shared_sides == "both":
        return ("left", "right")
    residual, inner = ("left", "right") if name in WRITES else ("right", "left")
    return (residual,) if config.shared_sides == "residual" else (inner,)


def basis_rank(config: KalmaGroveConfig, name: str, in_features: int, out_features: int) -> int:
    """The rank of what a layer uses at a time; at full rank a side that is not shared is the identity."""
    if config.rank is not None:
        return config.rank
    sides = shared_sides(config, name)
    if sides == ("left", "right"):
        return min(in_features, out_features)
    return out_features if sides == ("right",) else in_features


def grove_rank(config: KalmaGroveConfig, name: str, in_features: int, out_features: int) -> int:
    """The rank of a projection: of all bases together where it adds up several."""
    bases = -(-config.num_hidden_layers // config.group_size) if config.sharing == "mix" else 1
    return bases * basis_rank(config, name, in_features, out_features)


def projection_factory(config: KalmaGroveConfig, bases: GroveBases | None, layer: int) -> MakeProjection:
    """The function that builds a layer's projections by name."""

    def projection(name: str, in_features: int, out_features: int) -> nn.Module:
        if bases is None or not is_grove(config, name):
            return nn.Linear(in_features, out_features, bias=config.bias)
        sides = shared_sides(config, name)
        other: Literal["private", "identity"] = "private" if config.rank is not None else "identity"
        # A private factor absorbs a diagonal core.
        absorbed = len(sides) == 1 and config.rank is not None and config.core == "diagonal"
        core: Core = "none" if absorbed else config.core
        return GroveLinear(
            in_features,
            out_features,
            grove_rank(config, name, in_features, out_features),
            left=bases.of_layer("left", name, layer) if "left" in sides else other,
            right=bases.of_layer("right", name, layer) if "right" in sides else other,
            core=core,
            block_size=config.core_block_size,
            std=factor_std(config),
        )

    return projection
