"""Sharded parameters and statistics of several ranks, for Kalma."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

SHARDED_STATES = frozenset({"momentum", "momentum_buffer", "exp_avg", "exp_avg_sq"})
"""What optimisers keep in the shards of its parameter; everything else is whole where it is kept."""


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor on every rank; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds, placed as the parameter ``like`` is; a part as it is."""
    if not hasattr(like, "full_tensor") or hasattr(whole, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def average_across_ranks(
    seen: dict[int, tuple[Tensor, int]], shapes: dict[int, tuple[int, int, int]], *, device: torch.device
) -> dict[int, tuple[Tensor, int]]:
    """Sums and counts of all ranks together, so that each rank computes the same P.

    Args:
        seen: This rank's sums of ``h h^T`` and counts, by ``id`` of the parameter.
        shapes: Of every sum that any rank may have, in the same order on all ranks.
        device: Where the sums live.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return seen
    if distributed.get_world_size() == 1:
        return seen
    dtype = next((total.dtype for total, _ in seen.values()), torch.float32)
    parts = []
    for key, shape in shapes.items():
        total, count = seen.get(key, (torch.zeros(shape, dtype=dtype, device=device), 0))
        parts += [total.to(dtype).flatten(), torch.tensor([count], dtype=dtype, device=device)]
    if not parts:
        return {}
    message = torch.cat(parts)
    distributed.all_reduce(message)
    summed = message.split([part.numel() for part in parts])
    counts = torch.cat(summed[1::2]).tolist()
    return {
        key: (total.reshape(shape), int(count))
        for (key, shape), total, count in zip(shapes.items(), summed[::2], counts, strict=True)
        if count > 0
    }
