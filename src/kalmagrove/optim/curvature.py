"""P from a covariance of inputs, and block-diagonal matrices where a side is wide."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE = 1024
"""Largest block of C and P unless a user says otherwise."""


def damped_inverse(covariance: Tensor, damping: float) -> Tensor:
    """``(C + damping * mean(diag C) I)^-1`` scaled to mean diagonal one; the identity where C has no information.

    Args:
        covariance: (..., n, n), symmetric positive semi-definite, float32 or float64.
        damping: Relative to the mean of the diagonal, so that the scale of the inputs drops out.
    """
    identity = _identity_like(covariance)
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    informative = torch.isfinite(scale) & (scale > 0)
    safe = torch.where(informative, covariance, identity) / torch.where(informative, scale, torch.ones_like(scale))
    factor, failed = torch.linalg.cholesky_ex(safe + damping * identity)
    informative = informative & (failed == 0)[..., None, None]
    inverse = torch.cholesky_inverse(torch.where(informative, factor, identity))
    return torch.where(informative, _mean_diagonal_one(inverse), identity)


def block_count(features: int, block_size: int) -> int:
    """Blocks that cut ``features`` into equal parts of at most ``block_size``."""
    return -(-features // block_size)


def blocks_shape(features: int, block_size: int) -> tuple[int, int, int]:
    """(blocks, size, size) of the C or P of ``features`` inputs."""
    blocks = block_count(features, block_size)
    size = -(-features // blocks)
    return blocks, size, size


def in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """(..., rows, features) as (..., blocks, rows, features of a block), filled up with zeros."""
    size = -(-rows.shape[-1] // blocks)
    padded = torch.nn.functional.pad(rows, (0, blocks * size - rows.shape[-1]))
    return padded.unflatten(-1, (blocks, size)).movedim(-2, -3)


def block_gram(rows: Tensor, blocks: int) -> Tensor:
    """The diagonal blocks of ``rows.T @ rows``: (..., rows, features) to (..., blocks, size, size)."""
    parts = in_blocks(rows, blocks)
    return parts.mT @ parts


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """``matrix`` (..., rows, features) times a block-diagonal matrix (..., blocks, size, size)."""
    count = blocks.shape[-3]
    if count == 1:
        return matrix @ blocks.squeeze(-3)
    product = in_blocks(matrix, count) @ blocks
    return product.movedim(-3, -2).flatten(-2)[..., : matrix.shape[-1]]


def _mean_diagonal_one(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
