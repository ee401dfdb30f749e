"""Cross-entropy of a linear head without the whole logits in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.nn.derivatives import first_derivative_only
from kalmagrove.precision import autocast_type, without_autocast

ROWS = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of ``-log softmax(hidden @ weight.T)[target]``; gradients are made in the forward, slice by slice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        # A frozen head, as under an adaptor, needs none: a third of the products here.
        weight_gradient = None
        if needs_gradient and ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], ROWS):
            rows, goal = hidden[start : start + ROWS], targets[start : start + ROWS, None]
            logits = torch.mm(rows, weight.T)
            if hidden_gradient is None:
                total += _nats(logits.float(), goal)
                continue
            if logits.dtype.itemsize < 4:
                slope, nats = _rounded_slope(logits, goal)
            else:
                slope, nats = _slope(logits, goal)
            total += nats
            torch.mm(slope, weight, out=hidden_gradient[start : start + ROWS])
            if weight_gradient is not None:
                weight_gradient += torch.mm(slope.T, rows)
        if needs_gradient:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        of_weight = None if weight_gradient is None else weight_gradient * slope
        return hidden_gradient * slope.to(hidden_gradient.dtype), of_weight, None, None


def _nats(logits: Tensor, goal: Tensor) -> Tensor:
    return (logits.logsumexp(dim=-1, keepdim=True) - logits.gather(1, goal)).sum()


def _slope(logits: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax less one at the goal, in the place of the logits, and the sum of the nats: one exponential."""
    goal_logits, peak = logits.gather(1, goal), logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    normaliser = weights.sum(dim=-1, keepdim=True)
    probabilities = weights.div_(normaliser)
    probabilities.scatter_add_(1, goal, torch.full_like(goal, -1, dtype=probabilities.dtype))
    return probabilities, (normaliser.log() + peak - goal_logits).sum()


def _rounded_slope(logits: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The same in bfloat16 or float16 without a float32 copy; the kernels compute in float32 and round their results.

    One less the goal's probability is the sum of the others, which rounding does not lose where the model is sure.
    Elsewhere a row's normaliser is read off its largest probability: within 0.004 nats a token, of either sign.
    """
    slope = logits.softmax(dim=-1)
    peak, chance = logits.amax(dim=-1).float(), slope.amax(dim=-1).float()
    # On a CPU scatter_ would copy the whole slice twice.
    at_goal = torch.arange(len(goal), device=goal.device), goal[:, 0]
    slope[at_goal] = 0
    others = slope.sum(dim=-1)
    slope[at_goal] = -others
    rest = others.float()
    far = peak - chance.log() - logits.gather(1, goal)[:, 0].float()
    return slope, torch.where(rest < 0.5, -torch.log1p(-rest), far).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the nats of ``targets`` under the logits ``hidden @ weight.T``.

    Args:
        hidden: (tokens, hidden).
        weight: (vocabulary, hidden).
        targets: (tokens,), each within the vocabulary.

    Returns:
        A float32 scalar. Under autocast the products run in its type; the softmax is computed in float32.
    """
    if torch._C._are_functorch_transforms_active():
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    dtype = autocast_type(hidden)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with without_autocast(hidden):
        return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets, needs_gradient)
