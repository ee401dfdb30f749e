"""The processes that train one model together, as torchrun starts them; alone, everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from kalmagrove.errors import UsageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: Number of this process, from 0; the first one writes the run folder.
        local_rank: Its number on this machine, which chooses its GPU.
        size: Processes in all.
        store: Where they leave words for one another.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    store: distributed.Store | None = field(default=None, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over all processes, in float64."""
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

    def one_here_before_the_others(self, action: Callable[[], Result], what: str = "") -> Result:
        """Does the same in every process, but first in one process of each machine, however long that takes.

        Args:
            action: What is done.
            what: Tells it from other actions of the same processes.
        """
        if self.store is None:
            return action()
        ready = f"ready on machine {os.environ.get('GROUP_RANK', '0')} {what}"
        if self.local_rank > 0:
            self.store.wait([ready], timedelta(days=30))
            return action()
        result = action()
        self.store.set(ready, "yes")
        return result

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
        rank, local_rank, size = (int(variables[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return World(rank=rank, local_rank=local_rank, size=size)
    except (KeyError, ValueError) as error:
        raise UsageError(
            "WORLD_SIZE is set, but RANK or LOCAL_RANK is missing or no number; start several processes with torchrun "
            "or --nproc, or set them (LOCAL_RANK is 0 with one process a machine)"
        ) from error


@contextmanager
def joined_world(device_name: str = "auto") -> Iterator[World]:
    """The processes of this run, connected while the context lasts: by NCCL with GPUs, else by gloo.

    Args:
        device_name: auto, cpu or cuda, on which all of them compute.

    Raises:
        UsageError: As for `world_of_environment`, or the devices are not enough for the processes.
    """
    alone = world_of_environment()
    if alone.size == 1:
        yield alone
        return
    on_gpu = _computes_on_gpus(device_name, alone)
    store = _meeting_place()
    world = replace(alone, store=store)
    if on_gpu:
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", store=store, rank=world.rank, world_size=world.size, device_id=device)
    else:
        distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        yield world
    finally:
        distributed.destroy_process_group()


def _computes_on_gpus(device_name: str, world: World) -> bool:
    if device_name not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"loop.device {device_name} cannot be that of {world.size} processes; leave it out, or use cpu or cuda"
        )
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    if on_gpu and world.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"process {world.local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
            "start fewer processes, or use loop.device cpu"
        )
    return on_gpu


def _meeting_place() -> distributed.Store:
    """Where the processes leave their addresses for one another.

    torchrun keeps the store over a restart, and with it the addresses of processes that are gone: each start has names
    of its own.
    """
    try:
        store, _, _ = next(distributed.rendezvous("env://"))
    except ValueError as error:
        raise UsageError(f"{error}; start several processes with torchrun or --nproc") from error
    return distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
