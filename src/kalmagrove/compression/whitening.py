"""Square roots of second moments, safe where a moment is singular."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-2)
"""Of the mean of the diagonal, tried in turn until the moment has a Cholesky factor that inverts well."""
WORST_CONDITION = 1e7


def cholesky_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """S and its inverse with ``moment`` = S S^T, by Cholesky, in float64.

    Features that were never seen, or only together, make a moment singular; as much of the identity is added as makes
    the factor invert well. Above the last damping the diagonal alone is taken.

    Args:
        moment: Symmetric and not negative, (features, features).

    Returns:
        S (lower triangular) and S^-1, each (features, features).
    """
    symmetric = (moment.double() + moment.double().T) / 2
    identity = torch.eye(len(symmetric), dtype=torch.float64, device=moment.device)
    scale = symmetric.diagonal().mean().clamp_min(1e-30)
    for damping in DAMPINGS:
        factor, failed = torch.linalg.cholesky_ex(symmetric + damping * scale * identity)
        if int(failed):
            continue
        diagonal = factor.diagonal()
        if float(diagonal.max() / diagonal.min()) < WORST_CONDITION:
            return factor, torch.linalg.solve_triangular(factor, identity, upper=False)
    root = (symmetric.diagonal().clamp_min(0) + DAMPINGS[-1] * scale).sqrt()
    return root.diag(), root.reciprocal().diag()
