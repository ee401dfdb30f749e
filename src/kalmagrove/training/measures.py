"""What a step says about its batch size and learning rate; measured beside the training, which it does not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.modalities.sequences import Sequences


def gradient_noise_scale(
    parameters: Sequence[nn.Parameter], tokens: Tensor | Sequences, loss_sum: Callable[[Any], Tensor]
) -> float | None:
    """Tokens of the batch at which the gradient's noise is as large as the gradient: the "simple" noise scale.

    Batches far below it gain from being larger, far above it they waste tokens (McCandlish et al., arXiv:1812.06162,
    appendix A.1). It is estimated from the gradients of the two halves of a batch, and one estimate is noisy: look at
    the mean over many steps. Leaves the parameters' ``grad`` as it is.

    Args:
        parameters: Of the model.
        tokens: A batch, (sequences, context + 1), of two sequences or more.
        loss_sum: The summed loss of some of its sequences.

    Returns:
        Tokens; None where the estimate has no meaning, because the noise hides the gradient.
    """
    half = len(tokens) // 2
    halves = [tokens[:half], tokens[half : 2 * half]]
    # Of sequences with features, only what is to be predicted.
    count = halves[0][:, 1:].numel()
    first, second = ([g / count for g in _gradients(parameters, loss_sum(part))] for part in halves)
    small = (_square(first) + _square(second)) / 2
    large = _square([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    # Of batches of `count` and of twice as many tokens: the squared gradient, and the trace of its covariance.
    signal, noise = 2 * large - small, 2 * count * (small - large)
    return noise / signal if signal > 0 and noise > 0 else None


def _gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _square(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(list(tensors))).double().square().sum())


def matrices_of(model: nn.Module) -> list[Tensor]:
    """A model's matrices, for `update_ratio`: what is done to the model is done to them."""
    return [p.detach() for p in model.parameters() if p.ndim >= 2]


def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Norm of a step's change over the norm of what it changed, the root mean square over matrices.

    Args:
        before: Matrices before a step.
        after: The same after it.
    """
    changes = torch._foreach_norm(torch._foreach_sub(list(after), list(before)))
    sizes = torch._foreach_norm(list(before))
    ratios = [float(change) / float(size) for change, size in zip(changes, sizes, strict=True) if float(size) > 0]
    return math.sqrt(sum(ratio**2 for ratio in ratios) / max(1, len(ratios)))
