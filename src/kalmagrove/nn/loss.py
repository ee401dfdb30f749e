"""Cross-entropy of a linear head without the whole logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of ``-log softmax(hidden @ weight.T)[target]``; gradients are made in the forward, slice by slice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], ROWS):
            rows, goal = hidden[start : start + ROWS], targets[start : start + ROWS, None]
            logits = torch.mm(rows, weight.T).float()
            goal_logits, peak = logits.gather(1, goal), logits.amax(dim=-1, keepdim=True)
            # One exponential serves both the loss and its gradient.
            weights = logits.sub_(peak).exp_()
            normaliser = weights.sum(dim=-1, keepdim=True)
            total += (normaliser.log() + peak - goal_logits).sum()
            if hidden_gradient is None:
                continue
            probabilities = weights.div_(normaliser)
            probabilities.scatter_add_(1, goal, torch.full_like(goal, -1, dtype=probabilities.dtype))
            slope = probabilities.to(hidden.dtype)
            torch.mm(slope, weight, out=hidden_gradient[start : start + ROWS])
            weight_gradient += torch.mm(slope.T, rows)
        if needs_gradient:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * slope.to(hidden_gradient.dtype), weight_gradient * slope, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the nats of ``targets`` under the logits ``hidden @ weight.T``.

    Args:
        hidden: (tokens, hidden).
        weight: (vocabulary, hidden).
        targets: (tokens,), each within the vocabulary.

    Returns:
        A float32 scalar. Under autocast the products run in its type; the softmax is float32.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets, needs_gradient)
