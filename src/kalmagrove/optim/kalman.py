"""The Kalman filter for a constant or slowly moving parameter, exact (equation 3), in three forms.

The parameter theta is observed through z = H theta + noise, noise ~ N(0, R):

    K      = P H^T (H P H^T + R)^-1
    theta <- theta + K (z - H theta)
    P     <- (I - K H) P,   then   P <- P / forgetting + Q

With forgetting = 1, Q = 0 and P = s^2 / l I at the start this is recursive least squares, and the estimate is that of
ridge regression with penalty l, batch by batch. A linear layer y = W h is this filter with theta = W^T and H = h^T: its
columns share one P.

Shapes: theta is (n,) or (n, outputs); H is (observations, n); z is (observations,) or (observations, outputs); R is
(observations, observations). Work in float64 where long streams are filtered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Belief:
    """What is known of a parameter.

    Attributes:
        mean: The estimate theta, (n,) or (n, outputs).
        covariance: P, (n, n), symmetric positive definite; the same for every output.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        size = self.mean.shape[0]
        if self.covariance.shape != (size, size):
            raise ValueError(
                f"the covariance of a parameter of {size} values must be {size} x {size}, got "
                f"{tuple(self.covariance.shape)}"
            )


def kalman_gain(covariance: Tensor, observation: Tensor, noise: Tensor) -> Tensor:
    """K = P H^T (H P H^T + R)^-1, (n, observations).

    Args:
        covariance: P, (n, n).
        observation: H, (observations, n).
        noise: R, (observations, observations), positive definite.
    """
    projected = observation @ covariance
    innovation = projected @ observation.mT + noise
    factor = torch.linalg.cholesky(innovation)
    return torch.cholesky_solve(projected, factor).mT


def update_by_gain(belief: Belief, observation: Tensor, target: Tensor, noise: Tensor) -> Belief:
    """The filter as it is written above, with Joseph's form of P, which stays positive definite under rounding.

    Costs a factorisation of the number of observations: the form for small batches.
    """
    gain = kalman_gain(belief.covariance, observation, noise)
    mean = belief.mean + gain @ (target - observation @ belief.mean)
    rest = torch.eye(len(belief.covariance), dtype=gain.dtype, device=gain.device) - gain @ observation
    covariance = rest @ belief.covariance @ rest.mT + gain @ noise @ gain.mT
    return Belief(mean, _symmetric(covariance))


def update_by_information(belief: Belief, observation: Tensor, target: Tensor, noise: Tensor) -> Belief:
    """P^-1 <- P^-1 + H^T R^-1 H and theta <- theta + P H^T R^-1 (z - H theta), with the new P.

    Costs factorisations of the number of parameters: the form for large batches.
    """
    weighted = torch.cholesky_solve(observation, torch.linalg.cholesky(noise))
    information = _inverse(belief.covariance) + observation.mT @ weighted
    covariance = _inverse(_symmetric(information))
    mean = belief.mean + covariance @ (weighted.mT @ (target - observation @ belief.mean))
    return Belief(mean, covariance)


def update_by_woodbury(belief: Belief, observation: Tensor, target: Tensor, noise: Tensor) -> Belief:
    """P <- P - P H^T (R + H P H^T)^-1 H P by the square root of the innovation, and K = P H^T R^-1 with the new P.

    The cheapest for few observations; P loses definiteness sooner than in :func:`update_by_gain`.
    """
    projected = observation @ belief.covariance
    factor = torch.linalg.cholesky(projected @ observation.mT + noise)
    reduced = torch.linalg.solve_triangular(factor, projected, upper=False)
    covariance = _symmetric(belief.covariance - reduced.mT @ reduced)
    weighted = torch.linalg.solve(noise, target - observation @ belief.mean)
    return Belief(belief.mean + covariance @ (observation.mT @ weighted), covariance)


def predict(belief: Belief, *, forgetting: float = 1.0, drift: Tensor | None = None) -> Belief:
    """P <- P / forgetting + Q: what is known a step later of a parameter that may have moved.

    Args:
        belief: After an update.
        forgetting: In (0, 1]; 1 keeps everything.
        drift: Q, (n, n), positive semi-definite; None is zero.

    Raises:
        ValueError: ``forgetting`` is out of its range.
    """
    if not 0 < forgetting <= 1:
        raise ValueError(f"forgetting must be above 0 and at most 1, got {forgetting}")
    covariance = belief.covariance / forgetting
    return Belief(belief.mean, covariance if drift is None else covariance + drift)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
