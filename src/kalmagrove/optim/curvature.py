"""The linear algebra of Kalma's step: the polar factor, and P from a covariance, in blocks where inputs are wide."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE = 1024
"""Largest block of C and P unless a user says otherwise."""


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
        covariance: (..., n, n), symmetric positive semi-definite, float32 or float64.
        damping: Relative to the mean of the diagonal, so that the scale of the inputs drops out.
    """
    damped, informative = _damped(covariance, damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    identity = _identity_like(covariance)
    informative = informative & (failed == 0)[..., None, None]
    inverse = torch.cholesky_inverse(torch.where(informative, factor, identity))
    return torch.where(informative, _mean_diagonal_one(inverse), identity)


def inverse_square_root(covariance: Tensor, damping: float) -> Tensor:
    """``(C + damping * mean(diag C) I)^-1/2`` scaled to mean diagonal one; the identity without information."""
    damped, informative = _damped(covariance, damping)
    values, vectors = torch.linalg.eigh(damped)
    root = (vectors * values.clamp_min(damping).rsqrt().unsqueeze(-2)) @ vectors.mT
    return torch.where(informative, _mean_diagonal_one(root), _identity_like(covariance))


def block_count(features: int, block_size: int) -> int:
    """Blocks that cut ``features`` into equal parts of at most ``block_size``."""
    return -(-features // block_size)


def blocks_shape(features: int, block_size: int) -> tuple[int, int, int]:
    """(blocks, size, size) of the C or P of ``features`` inputs."""
    blocks = block_count(features, block_size)
    size = -(-features // blocks)
    return blocks, size, size


def in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """(rows, features) as (blocks, rows, features of a block), filled up with zeros."""
    size = -(-rows.shape[-1] // blocks)
    padded = torch.nn.functional.pad(rows, (0, blocks * size - rows.shape[-1]))
    return padded.unflatten(-1, (blocks, size)).movedim(-2, 0)


def block_gram(rows: Tensor, blocks: int) -> Tensor:
    """The diagonal blocks of ``rows.T @ rows``: (rows, features) to (blocks, size, size)."""
    parts = in_blocks(rows, blocks)
    return parts.mT @ parts


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """``matrix`` (rows, features) times a block-diagonal matrix (blocks, size, size)."""
    if len(blocks) == 1:
        return matrix @ blocks[0]
    product = in_blocks(matrix, len(blocks)) @ blocks
    return product.movedim(0, -2).flatten(-2)[..., : matrix.shape[-1]]


def _damped(covariance: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """C with its damping at mean diagonal one, the identity where it has no information; and where it has."""
    identity = _identity_like(covariance)
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    informative = torch.isfinite(scale) & (scale > 0)
    safe = torch.where(informative, covariance, identity) / torch.where(informative, scale, torch.ones_like(scale))
    return safe + damping * identity, informative


def _mean_diagonal_one(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
