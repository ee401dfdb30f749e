"""The best basis of a given rank for matrices that read one kind of input, in closed form.

With A = S S^T the second moment of the input and H its sensitivity (see :mod:`kalmagrove.compression.statistics`), the
loss of reading x through a rank-r map P is trace(H (I - P) A (I - P)^T) / 2. In whitened coordinates it is
trace(M (I - Q)) with M = S^T H S and Q a projection, so Q spans the leading eigenvectors of M, the loss is half of the
sum of the other eigenvalues, and

    V^T = Q_r^T S^-1,   U_i = W_i S Q_r        (W_i V-part: x -> W_i S Q_r Q_r^T S^-1 x)

for every matrix W_i that reads x: they share V^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import qr
from torch import Tensor

from kalmagrove.compression.whitening import cholesky_root


@dataclass(frozen=True)
class Spectrum:
    """Of one input, or of inputs of one kind in several layers that are to share a basis.

    Attributes:
        values: Eigenvalues of M, falling, (in_features,): twice the nats a token that each direction is worth.
        directions: Rows V^T of the basis of full rank, in the order of the values, (in_features, in_features).
    """

    values: Tensor
    directions: Tensor


@dataclass(frozen=True)
class Compact:
    """V^T = [I, rest] with its columns put in order: see :class:`~kalmagrove.nn.compact.CompactBasis`.

    Attributes:
        order: Of the columns, pivots first, (in_features,).
        rest: (rank, in_features - rank).
    """

    order: Tensor
    rest: Tensor

    @property
    def rank(self) -> int:
        """Rows of V^T."""
        return self.rest.shape[0]

    def matrix(self) -> Tensor:
        """V^T, (rank, in_features)."""
        identity = torch.eye(self.rank, dtype=self.rest.dtype, device=self.rest.device)
        return torch.cat((identity, self.rest), dim=1)[:, self.order.long().argsort()]


def spectrum_of(inputs: Tensor, sensitivity: Tensor) -> Spectrum:
    """The eigenvalues and the directions of an input with the moments A and H, in float64."""
    root, inverse = cholesky_root(inputs)
    values, vectors = torch.linalg.eigh(_whitened(root, sensitivity))
    return Spectrum(values.flip(0).clamp_min(0), vectors.flip(1).T @ inverse)


def losses_of_ranks(root: Tensor, sensitivity: Tensor) -> Tensor:
    """Nats a token that ranks 0 ... in_features cost, by the second order, (in_features + 1,) float64.

    Args:
        root: S with S S^T = A.
        sensitivity: H.
    """
    values = torch.linalg.eigvalsh(_whitened(root, sensitivity)).clamp_min(0)
    # Rising: the smallest are given up first.
    return torch.cat((values.new_zeros(1), values.cumsum(0))).flip(0) / 2


def _whitened(root: Tensor, sensitivity: Tensor) -> Tensor:
    whitened = root.T @ sensitivity.double() @ root
    return (whitened + whitened.T) / 2


def compact_basis(directions: Tensor) -> Compact:
    """The basis of the same space whose pivot columns are the identity; the pivots are chosen by QR, so that it is
    well conditioned.

    Args:
        directions: Independent rows, (rank, in_features).
    """
    rows = directions.double()
    _, _, order = qr(rows.cpu().numpy(), mode="economic", pivoting=True)
    places = torch.from_numpy(order).to(rows.device)
    rank = len(rows)
    pivots, others = rows[:, places[:rank]], rows[:, places[rank:]]
    return Compact(places.to(torch.int32), torch.linalg.solve(pivots, others))


def best_reader(weight: Tensor, basis: Compact, inputs: Tensor) -> Tensor:
    """U (out_features, rank) that makes U V^T x closest to what the matrix gives, in the mean square.

    Args:
        weight: W, (out_features, in_features).
        basis: V^T.
        inputs: E[x x^T] of what the basis reads.
    """
    reads = basis.matrix().double()
    seen = reads @ inputs.double() @ reads.T
    wanted = weight.double() @ inputs.double() @ reads.T
    _, inverse = cholesky_root(seen)
    return wanted @ inverse.T @ inverse
