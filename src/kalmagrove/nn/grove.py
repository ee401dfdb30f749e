"""Grove: weight matrices W = U Sigma V^T whose bases U, V belong to a group of layers (equation 1).

A basis is a module that owns one matrix; many :class:`GroveLinear` layers refer to it and each keeps its own
core Sigma. The matrices are stored as a linear layer stores its weight: V^T as (rank, in_features) and U as
(out_features, rank).

What may be shared, and why: a basis that every layer uses on *both* sides makes the network as narrow as its
rank. Here bases belong to a type of projection (all query projections, all up projections, ...) and to a few
neighbouring layers. The inner side of a head or of a feed-forward has no fixed basis, so its factor can be left
out: at full rank the inner basis is the identity and the core is the gain of each inner unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.nn.choices import check_choice

Core = Literal["none", "diagonal", "block", "dense"]
Sharing = Literal["group", "cycle", "mix", "band"]
OwnSide = Literal["private", "identity"]
Side = Literal["shared", "private", "identity"]
ComputePath = Literal["factored", "composed"]


def compute_path(
    tokens: int, in_features: int, out_features: int, rank: int, *, composed_before: bool = False
) -> ComputePath:
    """The cheaper way, by multiply-accumulates, to multiply tokens with two factors U (with Sigma) and V^T.

    "factored" multiplies each token with V^T and then with U; "composed" multiplies the factors first and each token
    with W. The backward costs twice the forward on both ways, so that the choice is the same in training.

    Args:
        tokens: That are multiplied at a time.
        in_features: Of W.
        out_features: Of W.
        rank: Between the factors.
        composed_before: Whether W is at hand, as in decoding.
    """
    compose = 0 if composed_before else in_features * out_features * rank
    factored = tokens * rank * (in_features + out_features)
    return "composed" if compose + tokens * in_features * out_features < factored else "factored"


class Basis(nn.Module):
    """One matrix that several layers use: a piece of U or of V^T, owned and saved once."""

    def __init__(self, rows: int, columns: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.std = std
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the matrix anew."""
        nn.init.normal_(self.weight, std=self.std)


class GroveLinear(nn.Module):
    """A linear layer with weight ``U Sigma V^T`` (no bias).

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        rank: Inner size. Where a side is the identity it is that side's size, or several times it: the identity is
            then repeated, so that the layer adds up several bases, each behind a diagonal core of its own.
        left: U's pieces if it is shared (stacked along the rank), "private" or "identity".
        right: V^T's pieces if it is shared (stacked along the rank), "private" or "identity".
        core: Sigma's form. "none" fixes it to the identity: the factor that is private absorbs it.
        block_size: Side of a block of a block-diagonal core.
        std: Standard deviation that a new private factor is drawn with.

    Raises:
        ValueError: Sizes do not fit, the rank is above the width, both sides are the identity, or a word is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        left: Sequence[Basis] | OwnSide,
        right: Sequence[Basis] | OwnSide,
        core: Core = "diagonal",
        block_size: int = 16,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        check_choice("core", core, Core)
        for name, given in (("left", left), ("right", right)):
            if isinstance(given, str):
                check_choice(name, given, OwnSide)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.core_kind: Core = core
        self.block_size = block_size
        self.std = std
        if left == "identity" and right == "identity":
            raise ValueError("left and right cannot both be the identity: nothing would be learned but the core")
        side = out_features if left == "identity" else in_features if right == "identity" else None
        if rank < 1 or (side is None and rank > max(in_features, out_features)):
            raise ValueError(
                f"rank must be between 1 and {max(in_features, out_features)} for a {out_features} x {in_features} "
                f"matrix, got {rank}"
            )
        self.repeats = 1 if side is None else max(1, rank // side)
        # A tuple hides the shared modules from registration: they are owned, moved and saved by their group.
        self._left = tuple(left) if not isinstance(left, str) else ()
        self._right = tuple(right) if not isinstance(right, str) else ()
        self.left_kind: Side = left if isinstance(left, str) else "shared"
        self.right_kind: Side = right if isinstance(right, str) else "shared"
        self._check_sizes()
        if self.left_kind == "private":
            self.left = nn.Parameter(torch.randn(out_features, rank) * std)
        if self.right_kind == "private":
            self.right = nn.Parameter(torch.randn(rank, in_features) * std)
        if core != "none":
            self.core = nn.Parameter(self._identity_core())
        self.adaptors = nn.ParameterDict()
        self.active_adaptor: str | None = None
        self._composed: tuple[Tensor | None, Tensor | None] | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the private factors anew and sets the core to the identity; the bases are not this layer's."""
        if self.left_kind == "private":
            nn.init.normal_(self.left, std=self.std)
        if self.right_kind == "private":
            nn.init.normal_(self.right, std=self.std)
        if self.core_kind != "none":
            self.core.copy_(self._identity_core())

    def output_parameters(self) -> list[nn.Parameter]:
        """The matrices next to the output: scaling them scales what the layer gives."""
        if self.left_kind == "identity":
            return [basis.weight for basis in self._right] if self._right else [self.right]
        return [basis.weight for basis in self._left] if self._left else [self.left]

    def _check_sizes(self) -> None:
        for kind, side, features, size in (
            (self.left_kind, "left", "out_features", self.out_features),
            (self.right_kind, "right", "in_features", self.in_features),
        ):
            if kind == "identity" and self.rank != self.repeats * size:
                raise ValueError(
                    f"an identity {side} side needs rank = {features} = {size} or a multiple of it, got {self.rank}"
                )
        if self.repeats > 1 and self.core_kind != "diagonal":
            raise ValueError(f"several bases are added up by a diagonal core, not by core = {self.core_kind}")
        if self._left and sum(basis.weight.shape[1] for basis in self._left) != self.rank:
            raise ValueError("the shared left bases do not add up to the rank")
        if self._right and sum(basis.weight.shape[0] for basis in self._right) != self.rank:
            raise ValueError("the shared right bases do not add up to the rank")
        if self.core_kind == "block" and self.rank % self.block_size:
            raise ValueError(f"rank {self.rank} is not divisible by the core's block size {self.block_size}")

    def _identity_core(self) -> Tensor:
        if self.core_kind == "diagonal":
            core = torch.ones(self.rank)
            # Of several bases the first counts at the start.
            core[self.rank // self.repeats :] = 0
            return core
        if self.core_kind == "block":
            return torch.eye(self.block_size).repeat(self.rank // self.block_size, 1, 1)
        return torch.eye(self.rank)

    def left_factor(self) -> Tensor | None:
        """U, (out_features, rank), or None for the identity."""
        if self.left_kind == "shared":
            pieces: list[Tensor] = [basis.weight for basis in self._left]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return self.left if self.left_kind == "private" else None

    def right_factor(self) -> Tensor | None:
        """V^T, (rank, in_features), or None for the identity."""
        if self.right_kind == "shared":
            pieces: list[Tensor] = [basis.weight for basis in self._right]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=0)
        return self.right if self.right_kind == "private" else None

    def effective_core(self) -> Tensor | None:
        """Sigma with the active adaptor added; None stands for the identity."""
        core = self.core if self.core_kind != "none" else None
        if self.active_adaptor is None:
            return core
        change = self.adaptors[self.active_adaptor]
        return (self._identity_core().to(change) if core is None else core) + change

    def folded(self) -> tuple[Tensor | None, Tensor | None]:
        """U and V^T with Sigma multiplied into U (into V^T where U is the identity)."""
        left, right, core = self.left_factor(), self.right_factor(), self.effective_core()
        if core is None:
            return left, right
        if left is not None:
            return self._added_up(_times_core(left, core)), right
        assert right is not None
        return None, self._added_up(_times_core(right.T, core.mT if core.ndim > 1 else core)).T

    def _added_up(self, pieces: Tensor) -> Tensor:
        """(rows, repeats x columns) to (rows, columns): what an identity that is repeated does."""
        return pieces if self.repeats == 1 else pieces.unflatten(-1, (self.repeats, -1)).sum(dim=-2)

    def merged_weight(self) -> Tensor:
        """The dense matrix W = U Sigma V^T, (out_features, in_features)."""
        weight = _product(*self.folded())
        assert weight is not None
        return weight

    def compute_path(self, tokens: int, *, composed_before: bool = False) -> ComputePath:
        """How so many tokens are multiplied; a side that is the identity leaves one matrix, which is W."""
        if "identity" in (self.left_kind, self.right_kind):
            return "composed"
        sizes = (tokens, self.in_features, self.out_features, self.rank)
        return compute_path(*sizes, composed_before=composed_before)

    @torch.no_grad()
    def hold_composed(self) -> None:
        """Keeps what the core and the factors make, for forwards without gradients, until :meth:`release_composed`."""
        left, right = self.folded()
        if self.compute_path(1, composed_before=True) == "composed":
            left, right = None, _product(left, right)
        self._composed = left, right

    def release_composed(self) -> None:
        """The parameters count again."""
        self._composed = None

    def forward(self, x: Tensor) -> Tensor:
        if self._composed is not None and not torch.is_grad_enabled():
            left, right = self._composed
        else:
            left, right = self.folded()
            if left is not None and right is not None and self.compute_path(x[..., 0].numel()) == "composed":
                left, right = None, _product(left, right)
        if right is not None:
            x = F.linear(x, right)
        return x if left is None else F.linear(x, left)

    def multiplied_matrices(self) -> list[nn.Parameter]:
        """The matrices that :meth:`weight_inputs` may name, shared ones included."""
        owned = [parameter for parameter in self.parameters() if parameter.ndim == 2]
        return owned + [basis.weight for basis in (*self._left, *self._right)]

    def weight_inputs(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix with the input that it multiplies, for optimisers that use activation statistics.

        Yields:
            ``(parameter, input)``, the input with the parameter's second axis last.
        """
        right, core = self.right_factor(), self.effective_core()
        inner = x if right is None else F.linear(x, right)
        if self.right_kind == "shared":
            yield from ((basis.weight, x) for basis in self._right)
        elif self.right_kind == "private":
            yield self.right, x
        if core is not None and core.ndim == 2:
            yield self.core if self.active_adaptor is None else self.adaptors[self.active_adaptor], inner
        if self.right_kind == "identity" and self.repeats > 1:
            inner = torch.cat([inner] * self.repeats, dim=-1)
        if core is not None and self.left_kind != "identity":
            inner = _times_core(inner, core.mT if core.ndim > 1 else core)
        if self.left_kind == "shared":
            sizes = [basis.weight.shape[1] for basis in self._left]
            yield from ((b.weight, part) for b, part in zip(self._left, inner.split(sizes, dim=-1), strict=True))
        elif self.left_kind == "private":
            yield self.left, inner

    def add_adaptor(self, name: str) -> None:
        """Adds a task core that starts at zero, so that the layer's function does not change.

        Raises:
            ValueError: The name is taken.
        """
        if name in self.adaptors:
            raise ValueError(f"adaptor {name!r} exists already")
        reference = next(iter(self.parameters()), None)
        if reference is None:
            reference = (self._left or self._right)[0].weight
        self.adaptors[name] = nn.Parameter(torch.zeros_like(self._identity_core()).to(reference))

    def set_adaptor(self, name: str | None) -> None:
        """Chooses the task core that is added to Sigma; None is the base model.

        Raises:
            ValueError: There is no adaptor of that name.
        """
        if name is not None and name not in self.adaptors:
            raise ValueError(f"no adaptor {name!r}; there are: {', '.join(sorted(self.adaptors.keys())) or 'none'}")
        self.active_adaptor = name
        if self._composed is not None:
            self.hold_composed()

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, left={self.left_kind}, "
            f"right={self.right_kind}, core={self.core_kind}"
        )


@contextmanager
def composed_weights(model: nn.Module) -> Iterator[None]:
    """Makes the weights of a model's Grove layers once, not in each forward, as long as the context is open.

    For decoding and evaluation: the parameters must not change meanwhile, and forwards with gradients are as before.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GroveLinear) and layer._composed is None]
    for layer in layers:
        layer.hold_composed()
    try:
        yield
    finally:
        for layer in layers:
            layer.release_composed()


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left @ right


def _times_core(matrix: Tensor, core: Tensor) -> Tensor:
    """``matrix @ Sigma`` over the last axis, whatever Sigma's form."""
    if core.ndim == 1:
        return matrix * core
    if core.ndim == 2:
        return matrix @ core
    blocks = matrix.unflatten(-1, (core.shape[0], core.shape[1]))
    return torch.einsum("...nb,nbc->...nc", blocks, core).flatten(-2)


class GroveBank(nn.Module):
    """The shared bases of one type of projection, over all layers of a model.

    Args:
        rows: Rows of each layer's basis.
        columns: Columns of each layer's basis.
        num_layers: Layers of the model.
        group_size: Layers that share one basis.
        sharing: "group": disjoint groups of neighbours. "cycle": the bases in turns, again and again, so that layers
            far apart share. "mix": every layer uses all of them, beginning with the one that it would have in a cycle.
            "band": each layer's basis is made of ``group_size`` pieces along the rank, of which it shares all but one
            with the next layer, so that every piece serves ``group_size`` layers and no two layers have the same
            basis. A piece keeps its place within the rank in every layer that uses it, so that the units of a head
            keep their resolution.
        rank_axis: The axis (0 or 1) along which a band is cut.
        std: Standard deviation of the initial values.

    Raises:
        ValueError: The rank axis is not divisible into ``group_size`` pieces.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        num_layers: int,
        group_size: int,
        sharing: Sharing,
        rank_axis: Literal[0, 1],
        std: float = 0.02,
    ) -> None:
        super().__init__()
        check_choice("sharing", sharing, Sharing)
        self.group_size, self.sharing, self.num_layers = group_size, sharing, num_layers
        shape = [rows, columns]
        if sharing == "band":
            if shape[rank_axis] % group_size:
                raise ValueError(f"rank {shape[rank_axis]} is not divisible by group_size {group_size}")
            shape[rank_axis] //= group_size
            count = num_layers + group_size - 1
        else:
            count = -(-num_layers // group_size)
        self.bases = nn.ModuleList(Basis(shape[0], shape[1], std) for _ in range(count))

    def of_layer(self, layer: int) -> tuple[Basis, ...]:
        """The pieces that the basis of a layer is made of, in the order of the rank.

        Raises:
            IndexError: There is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"there is no layer {layer}: the bases are of {self.num_layers} layers, counted from 0")
        if self.sharing == "group":
            return (self._piece(layer // self.group_size),)
        count = len(self.bases)
        if self.sharing == "cycle":
            return (self._piece(layer % count),)
        if self.sharing == "mix":
            return tuple(self._piece((layer + turn) % count) for turn in range(count))
        pieces = range(layer, layer + self.group_size)
        return tuple(self._piece(index) for index in sorted(pieces, key=lambda index: index % self.group_size))

    def _piece(self, index: int) -> Basis:
        piece = self.bases[index]
        assert isinstance(piece, Basis)
        return piece
