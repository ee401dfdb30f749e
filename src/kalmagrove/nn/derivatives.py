"""Backwards that are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward whose own operations autograd does not know: ``create_graph=True`` is an error.

    torch's ``once_differentiable`` alone lets a gradient pass that is only added to a loss, and loses it in silence.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *slopes: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a gradient by hand has no second derivative: leave out create_graph=True, or use another device"
            )
        return once(ctx, *slopes)

    return checked
