"""The frozen bases between which a task core stands: known from the weights alone, or from a domain's gradient.

The weights' own: W = U S V^T is known without a word of text, so that an adaptor's file holds its cores alone, and
every such adaptor of a model stands between the same bases (LoRA-XS, arXiv:2405.17604).

The gradient's: a domain pulls at a frozen layer along few directions. With C the covariance of the layer's inputs, S
that of its outputs' gradients and G the mean gradient of W, the singular vectors of S^-1/2 G C^-1/2 are the directions
in which a step changes the loss most for what it changes of the model's predictions: the natural gradient, with
Fisher's matrix in factors (K-FAC, arXiv:1503.05671). The first step along them needs a diagonal core only.
"""

from __future__ import annotations

import torch
from torch import Tensor

Bases = tuple[Tensor, Tensor]
"""U (outputs, rank) and V^T (rank, inputs), float32."""

SMALLEST_SINGULAR_VALUE = 1e-5
"""Relative to the largest: directions below are noise of the number type."""
DAMPING = 0.1
"""Added to the variances of inputs and gradients, relative to their mean: rare directions are not blown up."""


@torch.no_grad()
def singular_bases(weight: Tensor, rank: int) -> Bases:
    """The leading left singular vectors, and the right ones; the same for the same weights on every machine.

    Computed in float64 from the smaller of W W^T and W^T W, with the sign that makes the largest entry of each left
    vector positive. A core between them changes W by U R V^T.

    Args:
        weight: (outputs, inputs).
        rank: Directions; fewer come back where the matrix has fewer.

    Returns:
        U and V^T, on the weight's device.
    """
    exact = weight.detach().to("cpu", torch.float64)
    is_wide = exact.shape[0] <= exact.shape[1]
    squares, vectors = torch.linalg.eigh(exact @ exact.T if is_wide else exact.T @ exact)
    singular = squares.flip(0)[:rank].clamp(min=0).sqrt()
    kept = vectors.flip(1)[:, :rank][:, singular > SMALLEST_SINGULAR_VALUE * singular[0]]
    other = exact.T @ kept if is_wide else exact @ kept
    other = other / other.norm(dim=0)
    left, right = (kept, other) if is_wide else (other, kept)
    sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    signed = ((left * sign).contiguous(), (right * sign).T.contiguous())
    return signed[0].to(weight.device, torch.float32), signed[1].to(weight.device, torch.float32)


@torch.no_grad()
def gradient_bases(gradient: Tensor, inputs: Tensor, outputs: Tensor, rank: int) -> tuple[Bases, Tensor]:
    """The directions of a mean gradient in the metric of what it changes, see the module's text.

    One unit of a core's number changes the predictions by as much in every direction.

    Args:
        gradient: Mean of g x^T over tokens, (outputs, inputs).
        inputs: Mean of x x^T, (inputs, inputs).
        outputs: Mean of g g^T, (outputs, outputs).
        rank: Directions; fewer come back where the gradient has fewer.

    Returns:
        U and V^T, with the precision of bfloat16, in which they are saved; and the slope along each direction, falling,
        (rank,).
    """
    to_inputs, to_outputs = _inverse_root(inputs), _inverse_root(outputs)
    left, slopes, right = torch.linalg.svd(
        to_outputs @ gradient.to("cpu", torch.float64) @ to_inputs, full_matrices=False
    )
    rank = min(rank, len(slopes))
    kept = (to_outputs @ left[:, :rank], right[:rank] @ to_inputs)
    left, right = (basis.to(gradient.device, torch.bfloat16).float() for basis in kept)
    return (left, right), slopes[:rank].to(gradient.device, torch.float32)


def _inverse_root(covariance: Tensor) -> Tensor:
    """(C + damping)^-1/2, float64."""
    variances, directions = torch.linalg.eigh(covariance.to("cpu", torch.float64))
    damped = variances.clamp(min=0) + DAMPING * variances.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (directions * damped.rsqrt()) @ directions.T
