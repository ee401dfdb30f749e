"""The innovation whitened by its own covariance: Kronecker-factored eigenbases, and a variance for each entry there.

A matrix innovation N (outputs x inputs) has a covariance too large to hold. L = E[G G^T] and R = E[G^T G] give two
bases in which it is nearly diagonal (Shampoo, arXiv:1802.09568; SOAP, arXiv:2409.11321); V is the diagonal:

    U = Q_L (Q_L^T N Q_R / sqrt(V)) Q_R^T,    V = moving average of (Q_L^T G Q_R)^2
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kalmagrove.optim.curvature import block_count, block_gram, blocks_shape, times_blocks

Side = Literal["left", "right"]

LONGEST = 2.0
"""A side that is more than this times as long as the other has no basis: it would cost most and brings nothing."""


@dataclass(frozen=True)
class PartState:
    """What is kept of one of the matrices that a parameter holds, in the parameter's own flat state.

    Attributes:
        of_parameter: The state of the parameter, with the number of its "step", from 1.
        place: Which of its matrices; names of the second have the ending ``_1``, and so on.
    """

    of_parameter: MutableMapping[str, Any]
    place: int = 0

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.of_parameter

    def __getitem__(self, name: str) -> Any:
        return self.of_parameter[self._key(name)]

    def __setitem__(self, name: str, value: Any) -> None:
        self.of_parameter[self._key(name)] = value

    def _key(self, name: str) -> str:
        return f"{name}_{self.place}" if self.place else name


@dataclass(frozen=True)
class Whitening:
    """How the covariance of the innovations is followed.

    Attributes:
        variance_decay: Memory of V.
        covariance_decay: Memory of L and R.
        block_size: Bases of wider sides are block-diagonal, with equal blocks of at most this size.
        features_only: Whether only the inputs' side gets a basis, however long it is, as for embeddings and heads.
        floor: Added to V, relative to its mean over the matrix, so that rounding alone is never whitened.
    """

    variance_decay: float
    covariance_decay: float
    block_size: int
    features_only: bool = False
    floor: float = 0.01

    def whiten(self, innovation: Tensor, gradient: Tensor, states: Sequence[PartState], *, turn: bool) -> Tensor:
        """The whitened innovations of matrices of one shape.

        Args:
            innovation: What is whitened, (matrices, ..., outputs, inputs).
            gradient: What the covariance is learned from, of the same shape.
            states: Of each matrix.
            turn: Whether the bases follow L and R in this step; between such steps only L and R themselves do.

        Returns:
            Of the same shape. A zero innovation gives zero.
        """
        outputs, inputs = gradient.shape[-2:]
        sides = turned_sides(outputs, inputs, features_only=self.features_only)
        bases = {side: self._bases(side, gradient, states, turn) for side in sides}
        square = _turn(gradient, bases).square_()
        for state in states:
            if "variance" not in state:
                state["variance"] = torch.zeros_like(square[0])
        seen = [1 - self.variance_decay ** state.of_parameter["step"] for state in states]
        of_matrix = (-1, *[1] * (square.ndim - 1))
        variance = in_one(states, "variance").lerp_(square, 1 - self.variance_decay)
        write_back(states, "variance", variance)
        variance = variance / torch.tensor(seen, dtype=square.dtype, device=square.device).view(of_matrix)
        variance = variance.add_(self.floor * variance.mean((-2, -1), keepdim=True))
        return _turn(_turn(innovation, bases) * variance.clamp_min_(1e-30).rsqrt_(), bases, back=True)

    def _bases(self, side: Side, gradient: Tensor, states: Sequence[PartState], turn: bool) -> Tensor:
        """The eigenbases of one side, (matrices, ..., blocks, size, size), after ``gradient`` is taken in."""
        rows = gradient if side == "right" else gradient.mT
        grams = block_gram(rows, block_count(rows.shape[-1], self.block_size))
        covariance, basis = f"{side}_covariance", f"{side}_basis"
        is_new = [basis not in state for state in states]
        for state, gram, new in zip(states, grams, is_new, strict=True):
            if new:
                state[covariance], state[basis] = row_major(gram), row_major(eigenbasis(gram))
        followed = in_one(states, covariance).lerp_(grams, 1 - self.covariance_decay)
        write_back(states, covariance, followed)
        bases = in_one(states, basis)
        if turn and not all(is_new):
            bases.copy_(followed_basis(followed, bases))
            write_back(states, basis, bases)
        return bases


def in_one(states: Sequence[PartState], name: str) -> Tensor:
    """A state of several matrices as one tensor, (matrices, ...).

    States that are neighbours in one storage, in this order, are given as they lie there: what is done to the result is
    done to them. Others are joined so first, unless some of their old storage belongs to states that are not among
    them (they have no gradient in this step) and would be kept alive by those: then the result is a copy.
    :func:`write_back` is right for both.
    """
    tensors = [state[name] for state in states]
    first, count = tensors[0], tensors[0].numel()
    places = {(t.untyped_storage().data_ptr(), t.storage_offset() - index * count) for index, t in enumerate(tensors)}
    if len(places) == 1 and all(t.is_contiguous() for t in tensors):
        return first.as_strided((len(tensors), *first.shape), (count, *first.stride()))
    joined = torch.stack(tensors)
    held: Counter[int] = Counter()
    for tensor in tensors:
        held[tensor.untyped_storage().data_ptr()] += tensor.nbytes
    if all(held[t.untyped_storage().data_ptr()] >= t.untyped_storage().nbytes() for t in tensors):
        for state, tensor in zip(states, joined, strict=True):
            state[name] = tensor
    return joined


def write_back(states: Sequence[PartState], name: str, joined: Tensor) -> None:
    """Takes what :func:`in_one` gave back into the states where it was a copy."""
    if states[0][name].untyped_storage().data_ptr() != joined.untyped_storage().data_ptr():
        for state, tensor in zip(states, joined, strict=True):
            state[name].copy_(tensor)


def turned_sides(outputs: int, inputs: int, *, features_only: bool = False) -> list[Side]:
    """The sides of a matrix that get an eigenbasis; the others keep their axes."""
    if features_only:
        return ["right"]
    lengths: tuple[tuple[Side, int], ...] = (("left", outputs), ("right", inputs))
    return [side for side, length in lengths if length <= LONGEST * min(outputs, inputs)]


def count_state(outputs: int, inputs: int, block_size: int, *, features_only: bool = False) -> int:
    """Numbers that are kept to whiten one matrix: V, and a covariance and a basis for each side that turns."""
    lengths: dict[Side, int] = {"left": outputs, "right": inputs}
    sides = turned_sides(outputs, inputs, features_only=features_only)
    return outputs * inputs + sum(2 * math.prod(blocks_shape(lengths[side], block_size)) for side in sides)


def eigenbasis(covariance: Tensor, tie_break: float = 1e-3) -> Tensor:
    """Orthonormal eigenvectors as columns, (..., n, n), by falling eigenvalue; the identity without information.

    The order is the one that orthogonal iteration keeps.

    Args:
        covariance: (..., n, n), symmetric positive semi-definite.
        tie_break: Of a slope added to the diagonal, relative to the largest entry. Where eigenvalues are equal, as in
            the null space of the first gradient, it decides in the place of rounding, in small matrices at least.
    """
    scale = covariance.abs().amax((-2, -1), keepdim=True)
    usable = torch.isfinite(scale) & (scale > 0)
    size = covariance.shape[-1]
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    slope = torch.linspace(tie_break, 0, size, dtype=covariance.dtype, device=covariance.device).diag()
    safe = torch.where(usable, covariance / torch.where(usable, scale, torch.ones_like(scale)), identity)
    return torch.where(usable, torch.linalg.eigh(safe + slope)[1].flip(-1), identity)


def followed_basis(covariance: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration from ``basis`` towards the eigenvectors of ``covariance``.

    The axes keep their order, so that what was learned along them stays true; a basis that is computed anew would not.
    By Cholesky-QR twice, which is products of matrices where QR is a chain of reflections; where a factor fails the old
    basis stays.
    """
    size = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    # Directions without any gradient stay where they are instead of becoming noise.
    turned, good = covariance / trace.clamp_min(1e-30) @ basis + 1e-6 * basis, trace > 1e-30
    # Above the rounding of the product, so that columns that have nearly turned to one another still have a factor.
    ridge = 1e-7 * size * torch.eye(size, dtype=basis.dtype, device=basis.device)
    for _ in range(2):
        turned = turned / turned.norm(dim=-2, keepdim=True).clamp_min(1e-30)
        factor, failed = torch.linalg.cholesky_ex(turned.mT @ turned + ridge)
        # From the left it is faster than the same solution from the right.
        turned = torch.linalg.solve_triangular(factor, turned.mT, upper=False).mT
        good = good & (failed == 0)[..., None, None]
    good = good & torch.isfinite(turned).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(good, turned, basis)


def row_major(tensor: Tensor) -> Tensor:
    """A copy in row-major order, so that products round as they will when the state was saved and loaded."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _turn(matrices: Tensor, bases: Mapping[Side, Tensor], *, back: bool = False) -> Tensor:
    """``matrices`` in the coordinates of the bases, or back from them."""
    for side, basis in bases.items():
        axes = basis.mT if back else basis
        matrices = times_blocks(matrices, axes) if side == "right" else times_blocks(matrices.mT, axes).mT
    return matrices
