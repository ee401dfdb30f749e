"""Statistics for Kalma: the covariance of what each weight matrix multiplies, and its inverse.

For a layer y = W h the measurement matrix of the Kalman filter is the layer's input, so the information that a
batch brings about W is H^T H = sum of h h^T. Its running mean is the covariance C kept here; its damped inverse
is the filter's P, up to a scale that the optimiser's step does not depend on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SAMPLED_TOKENS = 2048


def newton_schulz(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nearly the orthogonal polar factor of the last two axes (Jordan's quintic, singular values in about .7-1.2).

    Args:
        matrix: (..., rows, columns).
        steps: Iterations.
        dtype: Type of the products.

    Returns:
        float32, the shape of ``matrix``. A zero matrix gives zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + polynomial @ x
    return (x.mT if tall else x).float()


def damped_inverse(covariance: Tensor, damping: float) -> Tensor:
    """``(C + damping * mean(diag C) I)^-1`` scaled to mean diagonal one; the identity where C has no information.

    Args:
        covariance: (n, n), symmetric positive semi-definite, float32 or float64.
        damping: Relative to the mean of the diagonal, so that the scale of the inputs drops out.
    """
    identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    scale = covariance.diagonal().mean()
    if not bool(torch.isfinite(scale)) or float(scale) <= 0:
        return identity
    factor, failed = torch.linalg.cholesky_ex(covariance / scale + damping * identity)
    if int(failed):
        return identity
    inverse = torch.cholesky_inverse(factor)
    return inverse / inverse.diagonal().mean()


def inverse_square_root(covariance: Tensor, damping: float) -> Tensor:
    """``(C + damping * mean(diag C) I)^-1/2`` scaled to mean diagonal one; the identity without information."""
    identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    scale = covariance.diagonal().mean()
    if not bool(torch.isfinite(scale)) or float(scale) <= 0:
        return identity
    values, vectors = torch.linalg.eigh(covariance / scale + damping * identity)
    root = (vectors * values.clamp_min(damping).rsqrt()) @ vectors.mT
    return root / root.diagonal().mean()


@runtime_checkable
class TellsWeightInputs(Protocol):
    """A module of several matrices that can say which input each of them multiplies."""

    def multiplied_matrices(self) -> Iterable[Tensor]:
        """The matrices."""
        ...

    def weight_inputs(self, x: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """(matrix, what it multiplies) for an input ``x`` of the module."""
        ...


class ActivationStatistics:
    """Collects ``sum of h h^T`` for the weight matrices of a model while it is trained.

    Linear layers are known; any other module may be a :class:`TellsWeightInputs`, as Grove's layers are. A matrix that
    several layers use gets the sum of all.
    Nothing is collected unless :attr:`active`, gradients are on and the module is in training mode.

    Args:
        parameters: The matrices that are asked for.
        most_rows: Rows of an input that are looked at, at even distance; None is all.
    """

    def __init__(self, parameters: Iterable[Tensor], *, most_rows: int | None = SAMPLED_TOKENS) -> None:
        self.active = False
        self.most_rows = most_rows
        self._wanted = {id(parameter) for parameter in parameters}
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        # Query, key and value projections read the same tensor: it is sampled and squared once.
        self._source: Tensor | None = None
        self._source_rows: Tensor | None = None
        self._gram_rows: Tensor | None = None
        self._gram: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> int:
        """Watches a model's layers; returns how many wanted matrices they multiply by."""
        watched: set[int] = set()
        for module in model.modules():
            if isinstance(module, nn.Linear | TellsWeightInputs):
                self._handles.append(module.register_forward_pre_hook(self._observe))
                matrices = [module.weight] if isinstance(module, nn.Linear) else module.multiplied_matrices()
                watched |= {id(p) for p in matrices} & self._wanted
        return len(watched)

    def detach(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable
    def _observe(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.active or not torch.is_grad_enabled() or not module.training:
            return
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            rows = self._sampled(args[0])
            if isinstance(module, nn.Linear):
                pairs: Iterable[tuple[Tensor, Tensor]] = [(module.weight, rows)]
            else:
                assert isinstance(module, TellsWeightInputs)
                pairs = module.weight_inputs(rows)
            for parameter, seen in pairs:
                if id(parameter) in self._wanted:
                    self._add(parameter, seen)

    def _sampled(self, x: Tensor) -> Tensor:
        if self._source is not x or self._source_rows is None:
            self._source, self._source_rows = x, _sample_rows(x, self.most_rows)
        return self._source_rows

    def _add(self, parameter: Tensor, rows: Tensor) -> None:
        if self._gram_rows is not rows or self._gram is None:
            self._gram_rows, self._gram = rows, rows.T @ rows
        key = id(parameter)
        self._sums[key] = self._sums[key] + self._gram if key in self._sums else self._gram
        self._counts[key] = self._counts.get(key, 0) + rows.shape[0]

    def take(self) -> dict[int, tuple[Tensor, int]]:
        """The sum of ``h h^T`` and the number of ``h``, by ``id`` of the parameter; starts anew."""
        seen = {key: (total, self._counts[key]) for key, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        self._source = self._source_rows = self._gram_rows = self._gram = None
        return seen


def _sample_rows(x: Tensor, most_rows: int | None) -> Tensor:
    """At most ``most_rows`` rows of ``x`` (..., features) at even distance, in float32 or better."""
    rows = x.detach().reshape(-1, x.shape[-1])
    step = 1 if most_rows is None else -(-rows.shape[0] // most_rows)
    return rows[::step].to(torch.promote_types(rows.dtype, torch.float32))
