"""The processes that train one model together, as torchrun starts them; alone, everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from kalmagrove.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: Number of this process, from 0; the first one writes the run folder.
        local_rank: Its number on this machine, which chooses its GPU.
        size: Processes in all.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over all processes, in float64 where the device has it."""
        return self._reduced(values, device, distributed.ReduceOp.SUM if self.size > 1 else None)

    def largest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each value in any process."""
        return self._reduced(values, device, distributed.ReduceOp.MAX if self.size > 1 else None)

    def _reduced(self, values: Sequence[float], device: torch.device, operation: object) -> list[float]:
        if self.size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(message, op=operation)
        return [float(value) for value in message.tolist()]

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            distributed.barrier()


ALONE = World()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error of torch says that another process of the run is gone."""
    if isinstance(error, distributed.DistError):
        return True
    # gloo's errors have no class of their own.
    return "/gloo/" in str(error)


def world_of_environment(variables: Mapping[str, str] = os.environ) -> World:
    """What torchrun has told this process; alone where it was not started by torchrun.

    Raises:
        UsageError: The variables are incomplete or no numbers.
    """
    if "WORLD_SIZE" not in variables:
        return ALONE
    try:
        rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        return World(rank=rank, local_rank=int(variables.get("LOCAL_RANK", rank)), size=size)
    except (KeyError, ValueError) as error:
        raise UsageError(
            "WORLD_SIZE is set, but RANK or LOCAL_RANK is missing or no number; start several processes with torchrun "
            "or --nproc"
        ) from error


@contextmanager
def joined_world() -> Iterator[World]:
    """The processes of this run, connected while the context lasts: by NCCL with GPUs, else by gloo.

    Raises:
        UsageError: As for `world_of_environment`.
    """
    world = world_of_environment()
    if world.size == 1:
        yield world
        return
    store = _meeting_place()
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", store=store, rank=world.rank, world_size=world.size, device_id=device)
    else:
        distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        yield world
    finally:
        distributed.destroy_process_group()


def _meeting_place() -> distributed.Store:
    """Where the processes leave their addresses for one another.

    torchrun keeps the store over a restart, and with it the addresses of processes that are gone: each start has names
    of its own.
    """
    store, _, _ = next(distributed.rendezvous("env://"))
    return distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
