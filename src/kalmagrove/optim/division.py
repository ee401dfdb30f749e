"""Kalma's work on several ranks: each matrix has one owner, which whitens it for all and alone keeps its statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from kalmagrove.optim.distributed import SHARDED_STATES, as_shard, whole_tensor

OF_EVERY_RANK = SHARDED_STATES | {"step"}
"""States that every rank needs, where the parameters are sharded: its part of the moments."""


class WorkDivision:
    """Which rank whitens which parameter.

    Args:
        costs: Of each parameter, by ``id``, in the same order on every rank.
    """

    def __init__(self, costs: Mapping[int, int]) -> None:
        self._rank = distributed.get_rank()
        self._owners = _balanced(costs, distributed.get_world_size())

    def is_own(self, parameter: Tensor) -> bool:
        """Whether this rank whitens a parameter; one that nobody was given is everybody's."""
        return self._owners.get(id(parameter), self._rank) == self._rank

    def exchange(
        self, updates: Mapping[int, Tensor], parameters: Sequence[Tensor], type_of: Callable[[Tensor], torch.dtype]
    ) -> dict[int, Tensor]:
        """The updates of all parameters, as the parameters are held, from those of this rank's own.

        Args:
            updates: By the place of the parameter, whole; of this rank's own parameters.
            parameters: The same on every rank.
            type_of: The type of a parameter's update.
        """
        found = dict(updates)
        groups: dict[tuple[int, torch.dtype], list[int]] = {}
        for place, parameter in enumerate(parameters):
            owner = self._owners.get(id(parameter))
            if owner is not None:
                groups.setdefault((owner, type_of(parameter)), []).append(place)
        for (owner, dtype), theirs in sorted(groups.items(), key=lambda item: (item[0][0], str(item[0][1]))):
            sizes = [parameters[i].shape.numel() for i in theirs]
            if owner == self._rank:
                message = torch.cat([found[i].reshape(-1) for i in theirs])
            else:
                message = torch.empty(sum(sizes), dtype=dtype, device=parameters[theirs[0]].device)
            distributed.broadcast(message, src=owner)
            # A sharded parameter's update is cut before the next owner's comes.
            for i, part in zip(theirs, message.split(sizes), strict=True):
                found[i] = as_shard(part.view(parameters[i].shape), parameters[i])
        return found

    def gathered_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What ``state_dict`` gives in one process; all ranks must call this together, and the first gets it whole.

        The tensors of other ranks' parameters are on the CPU.
        """
        state_dict = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            owner = self._owners.get(id(parameter))
            if owner is not None:
                own = state_dict["state"].get(index, {})
                state_dict["state"][index] = self._gathered(own, parameter.device, owner)
        return state_dict

    def _gathered(self, own: Mapping[str, Any], device: torch.device, owner: int) -> dict[str, Any]:
        own = {name: whole_tensor(value) if isinstance(value, Tensor) else value for name, value in own.items()}
        kinds = {
            name: [str(value.dtype), list(value.shape)] if isinstance(value, Tensor) else value
            for name, value in own.items()
        }
        kinds = json.loads(self._text(json.dumps(kinds), device, owner))
        gathered: dict[str, Any] = {}
        for name, kind in kinds.items():
            if not isinstance(kind, list):
                gathered[name] = kind
                continue
            dtype, shape = getattr(torch, kind[0].removeprefix("torch.")), kind[1]
            message = own[name].to(device) if owner == self._rank else torch.empty(shape, dtype=dtype, device=device)
            message = message.contiguous()
            distributed.broadcast(message, src=owner)
            if self._rank == 0:
                gathered[name] = message if owner == 0 else message.cpu()
        return gathered

    def _text(self, text: str, device: torch.device, owner: int) -> str:
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        length = torch.tensor([len(encoded)], device=device)
        distributed.broadcast(length, src=owner)
        message = encoded if owner == self._rank else torch.empty(int(length), dtype=torch.uint8, device=device)
        distributed.broadcast(message, src=owner)
        return bytes(message.tolist()).decode()

    def forget_others(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the states of parameters that other ranks own, after a whole state was loaded."""
        for parameter, state in optimizer.state.items():
            if not self.is_own(parameter):
                is_sharded = hasattr(parameter, "full_tensor")
                for name in [n for n in state if not (is_sharded and n in OF_EVERY_RANK)]:
                    del state[name]


def _balanced(costs: Mapping[int, int], size: int) -> dict[int, int]:
    """The costliest first, each to the rank that has least to do."""
    loads, owners = [0] * size, {}
    for key, cost in sorted(costs.items(), key=lambda item: -item[1]):
        owners[key] = loads.index(min(loads))
        loads[owners[key]] += cost
    return owners
