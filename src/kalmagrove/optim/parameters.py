"""What a step asks of parameters: their gradients, the type that they are kept in, and names for a person."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kalmagrove.optim.distributed import whole_tensor

_MOST_NAMES = 5
"""In a warning or an error."""


def uphill(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """The direction uphill of what is minimised."""
    assert parameter.grad is not None
    return -parameter.grad if group["maximize"] else parameter.grad


def with_finite_gradient(group: dict[str, Any]) -> list[Tensor]:
    """The group's parameters that have numbers and a gradient, without those whose gradient is not finite."""
    present = [(index, p) for index, p in enumerate(group["params"]) if p.grad is not None and p.numel()]
    if not present:
        return []
    if any(p.grad.is_sparse for _, p in present):
        raise RuntimeError("Kalma cannot use sparse gradients; make the embedding with sparse=False")
    gradients = [p.grad for _, p in present]
    norms: dict[int, Tensor] = {}
    for indices in by_placement(gradients):
        # A norm in float16 is infinite from 65,520 on.
        wide = [g.float() if g.dtype == torch.float16 else g for g in (gradients[i] for i in indices)]
        norms |= zip(indices, torch._foreach_norm(wide), strict=True)
    finite = torch.isfinite(
        torch.stack([whole_tensor(norms[i]).to(torch.float32) for i in range(len(gradients))])
    ).tolist()
    if not all(finite):
        bad = [name_of(group, index) for (index, _), good in zip(present, finite, strict=True) if not good]
        warn(f"the gradient of {listed(bad)} is not finite; it keeps its value")
    return [p for (_, p), good in zip(present, finite, strict=True) if good]


def by_placement(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the plain tensors, and of those that are sharded over each mesh: torch's lists take one kind."""
    kinds: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault(getattr(tensor, "device_mesh", None), []).append(index)
    return list(kinds.values())


def name_of(group: Mapping[str, Any], index: int) -> str:
    """What a person may know one of the group's parameters by."""
    names = group.get("names") or group.get("param_names")
    return names[index] if names else f"a parameter of shape {tuple(group['params'][index].shape)}"


def listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def master_type(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
