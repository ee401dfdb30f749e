"""Sharded parameters and statistics of several ranks, for Kalma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor on every rank; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds, placed as the parameter ``like`` is."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def average_across_ranks(
    seen: dict[int, tuple[Tensor, int]],
    shapes: dict[int, tuple[int, int, int]],
    *,
    device: torch.device,
    process_group: Any = None,
) -> dict[int, tuple[Tensor, int]]:
    """Sums and counts of all ranks together, so that each rank computes the same P.

    Args:
        seen: This rank's sums of ``h h^T`` and counts, by ``id`` of the parameter.
        shapes: Of every sum that any rank may have, in the same order on all ranks.
        device: Where the sums live.
        process_group: The ranks; None is all.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return seen
    if distributed.get_world_size(process_group) == 1:
        return seen
    together = {}
    for key, shape in shapes.items():
        total, count = seen.get(key, (torch.zeros(shape, device=device), 0))
        message = torch.cat([total.flatten(), torch.tensor([count], dtype=total.dtype, device=total.device)])
        distributed.all_reduce(message, group=process_group)
        if message[-1] > 0:
            together[key] = (message[:-1].reshape(shape), int(message[-1]))
    return together
