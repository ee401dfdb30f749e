"""Linear layers in the fewest numbers that their rank allows.

A matrix of rank r, W = U V^T with U (out, r) and V^T (r, in), stays the same when an invertible r x r matrix is put
between its factors. The freedom is used to make r columns of V^T, the pivots, the identity:

    V^T = [I, R] P        V^T x = x[pivots] + R x[others]        U = W[:, pivots]

so W is r (out + in - r) numbers, which is never more than out x in, where two plain factors are r (out + in)
(the interpolative decomposition; for language models Zhao et al., arXiv:2501.19090).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.nn.grove import Basis, ComputePath, GroveLinear


class CompactBasis(Basis):
    """V^T of one or several matrices with one kind of input, its pivot columns being the identity.

    Args:
        rank: Rows of V^T.
        in_features: Columns of V^T, at least ``rank``.
    """

    order: Tensor

    def __init__(self, rank: int, in_features: int) -> None:
        nn.Module.__init__(self)
        self.rest = nn.Parameter(torch.zeros(rank, in_features - rank))
        # The pivots, then all others; stored, so that a model is read as it was written.
        self.register_buffer("order", torch.arange(in_features, dtype=torch.int32))

    @property
    def rank(self) -> int:
        """Rows of V^T."""
        return self.rest.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zeros: only the pivots are read."""
        self.rest.zero_()
        self.order.copy_(torch.arange(len(self.order)))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # Made of parts here, a parameter there.
        """V^T, (rank, in_features)."""
        identity = torch.eye(self.rank, dtype=self.rest.dtype, device=self.rest.device)
        return torch.cat((identity, self.rest), dim=1)[:, self.order.argsort()]

    def read(self, x: Tensor) -> Tensor:
        """V^T x for ``x`` (..., in_features), (..., rank)."""
        pivots = x.index_select(-1, self.order[: self.rank])
        return pivots if self.rest.shape[1] == 0 else pivots + F.linear(self.others(x), self.rest)

    def others(self, x: Tensor) -> Tensor:
        """What ``rest`` multiplies: ``x`` (..., in_features) without its pivots, (..., in_features - rank)."""
        return x.index_select(-1, self.order[self.rank :])


class CompactLinear(GroveLinear):
    """A Grove layer without a core, ``y = U V^T x + bias``, whose V^T is a compact basis.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        basis: V^T, of this layer alone or shared.
        bias: Whether a bias is added.
    """

    def __init__(self, in_features: int, out_features: int, basis: CompactBasis, *, bias: bool) -> None:
        super().__init__(in_features, out_features, basis.rank, left="private", right=(basis,), core="none")
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def compute_path(self, tokens: int, *, composed_before: bool = False) -> ComputePath:
        """As of any Grove layer, but V^T costs its other columns only."""
        dense = self.in_features * self.out_features
        factored = self.rank * (self.in_features + self.out_features - self.rank)
        compose = 0 if composed_before else (self.in_features - self.rank) * self.rank * self.out_features
        return "composed" if compose + tokens * dense < tokens * factored else "factored"

    @torch.no_grad()
    def hold_composed(self) -> None:
        """Keeps what an adaptor makes of the factors; without one nothing is gained."""
        if self.active_adaptor is not None:
            super().hold_composed()

    def forward(self, x: Tensor) -> Tensor:
        if self.active_adaptor is not None:
            y = super().forward(x)
        else:
            basis = self._right[0]
            assert isinstance(basis, CompactBasis)
            y = F.linear(basis.read(x), self.left)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiplied_matrices(self) -> list[nn.Parameter]:
        """U, the others' part of V^T, and the adaptors."""
        owned = [parameter for parameter in self.parameters() if parameter.ndim == 2]
        return [*owned, *(basis.rest for basis in self._right if isinstance(basis, CompactBasis))]

    def weight_inputs(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix with what it multiplies."""
        basis = self._right[0]
        assert isinstance(basis, CompactBasis)
        yield basis.rest, basis.others(x)
        inner = basis.read(x)
        if self.active_adaptor is not None:
            change = self.adaptors[self.active_adaptor]
            yield change, inner
            inner = inner + F.linear(inner, change)
        yield self.left, inner
