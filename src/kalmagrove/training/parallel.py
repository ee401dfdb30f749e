"""One model over several processes: copies with averaged gradients (DDP), or in shards (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.errors import UsageError
from kalmagrove.modalities.sequences import Sequences
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.optim.distributed import SHARDED_STATES, as_shard, whole_tensor
from kalmagrove.optim.kalma import Kalma
from kalmagrove.training.config import LoopConfig, Parallel
from kalmagrove.training.nested import map_tensors
from kalmagrove.world import World

Tokens = Tensor | Sequences
LossSum = Callable[[Tokens, Tokens], Tensor]


OLDEST_COMPILER = (2, 13)
"""The version of torch whose compiled gradients were compared with the eager ones."""


def check_compiler(loop: LoopConfig) -> None:
    """That the compiler of this torch can be trusted with our own gradients.

    Raises:
        UsageError: It is asked for and too old: that of torch 2.11 gives wrong gradients.
    """
    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if loop.compile and version < OLDEST_COMPILER:
        oldest = ".".join(map(str, OLDEST_COMPILER))
        raise UsageError(f"loop.compile needs torch {oldest} or newer, and this is {torch.__version__}; leave it out")


def check_processes(loop: LoopConfig, world: World) -> None:
    """That so many processes can do what is asked for, and that each gets its part of a batch.

    Raises:
        UsageError: An option needs one process or copies of the model, or the sequences cannot be divided.
    """
    if loop.batch_size < world.size:
        raise UsageError(f"loop.batch_size {loop.batch_size} is too small for {world.size} processes; give each one")
    for name in ("gradient_metrics", "grow_rank"):
        if world.size > 1 and getattr(loop, name):
            raise UsageError(f"loop.{name} needs one process; leave it out")
    if world.size > 1 and loop.parallel == "fsdp" and loop.compile:
        raise UsageError("loop.parallel fsdp cannot compile; use ddp")
    if world.size > 1 and loop.parallel == "fsdp" and loop.batch_size % world.size:
        raise UsageError(
            f"loop.parallel fsdp divides loop.batch_size {loop.batch_size} evenly, and {world.size} processes cannot; "
            "use a multiple, or ddp"
        )


class _TokenLossSum(nn.Module):
    """The loss as a forward: DDP prepares its backward there."""

    def __init__(self, model: KalmaGroveForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.compiled: LossSum | None = None

    def forward(self, input_ids: Tokens, targets: Tokens, is_watched: bool) -> Tensor:
        compute = self.model.token_loss_sum if self.compiled is None or is_watched else self.compiled
        return compute(input_ids, targets)


class ParallelLoss:
    """The sum of nats of a batch, with gradients that are averaged over the processes.

    With "fsdp" the model's parameters are replaced by shards, so optimisers are made after this.

    Args:
        model: On its device; the same on every process.
        world: The processes.
        parallel: ddp keeps the whole model on each of them, fsdp a part.
        compiled: Whether torch.compile makes the forward and backward.
        example: Tokens of one sequence of the run's length, (1, context + 1).

    Attributes:
        sharded: Whether a process has only a part of the parameters.
    """

    def __init__(
        self,
        model: KalmaGroveForCausalLM,
        world: World,
        parallel: Parallel,
        *,
        compiled: bool = False,
        example: Tokens,
    ) -> None:
        self._model = model
        self._wrapped: nn.parallel.DistributedDataParallel | None = None
        self.sharded = world.size > 1 and parallel == "fsdp"
        if self.sharded:
            _shard(model)
        self._loss = _TokenLossSum(model)
        if world.size > 1 and not self.sharded:
            self._wrapped = nn.parallel.DistributedDataParallel(
                self._loss,
                # Not every batch has elements of every modality.
                find_unused_parameters=bool(model.config.modalities) or _has_unused_parameters(model, example),
                gradient_as_bucket_view=True,
            )
        if compiled:
            self._loss.compiled = torch.compile(model.token_loss_sum)

    def compute(self, input_ids: Tokens, targets: Tokens, *, is_watched: bool) -> Tensor:
        """Sum of the nats of ``targets`` given ``input_ids``, both (batch, sequence).

        Args:
            input_ids: Tokens.
            targets: The token after each of them.
            is_watched: Whether hooks look at the layers, so that compiled code cannot be used.
        """
        result: Tensor = (self._wrapped or self._loss)(input_ids, targets, is_watched)
        return result

    def close(self) -> None:
        """Lets go of the processes' connection.

        What holds it last waits for its threads. DDP's reducer does so with Python's lock, which those threads need.
        """
        if self._wrapped is not None:
            del self._wrapped.reducer, self._wrapped.logger
            self._wrapped = None

    def without_averaging(self, last: bool) -> AbstractContextManager[Any]:
        """For the parts of a batch: gradients travel once, with the last part."""
        if self.sharded:
            self._model.set_requires_gradient_sync(last)
        if self._wrapped is not None and not last:
            return self._wrapped.no_sync()
        return nullcontext()


def _has_unused_parameters(model: KalmaGroveForCausalLM, example: Tokens) -> bool:
    """Whether some have no gradient, as Arnold's pooling where the context does not reach it."""
    model.token_loss_sum(example[:, :-1], example[:, 1:]).backward()
    unused = any(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad)
    model.zero_grad(set_to_none=True)
    return unused


def _shard(model: KalmaGroveForCausalLM) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in model.model.layers:
        fully_shard(layer)
    # What all layers share, Grove's bases among it, is gathered once a step and stays until its backward.
    fully_shard(model)
    register_fsdp_forward_method(model, "token_loss_sum")


def whole_state(value: Any) -> Any:
    """A state with every sharded tensor gathered; all processes must call this together."""
    return map_tensors(value, whole_tensor)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state with what other processes have of it, complete on the first; for all to call together."""
    state: dict[str, Any] = whole_state(
        optimizer.gathered_state_dict() if isinstance(optimizer, Kalma) else optimizer.state_dict()
    )
    return state


def load_whole_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a model, whole or in shards, the parameters of a whole state."""
    own = model.state_dict()
    model.load_state_dict({name: as_shard(value, own[name]) if name in own else value for name, value in state.items()})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimiser of whole or sharded parameters a whole state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    placed = {
        index: {
            name: as_shard(value.to(p.device), p) if name in SHARDED_STATES else value
            for name, value in state["state"].get(index, {}).items()
        }
        for index, p in zip(indices, parameters, strict=True)
        if index in state["state"]
    }
    optimizer.load_state_dict(state | {"state": placed})
