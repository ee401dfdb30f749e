"""Memory of a training step, part by part, on one device or divided over several, computed before step 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kalmagrove.models.accounting import build_empty
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.optim.curvature import BLOCK_SIZE, blocks_shape
from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.whitening import count_state
from kalmagrove.precision import Precision, autocast

FLOAT_BYTES = 4


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training memory by part, on one device.

    Attributes:
        parameters: Those that the device keeps.
        gathered: Parameters of other devices that it holds while it computes; 0 unless sharded.
        gradients: Of the parameters, at their most.
        optimizer: State of the optimiser.
        activations: What the forward keeps for the backward.
    """

    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together; work space of single operations comes on top."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.activations


def training_memory(
    config: KalmaGroveConfig,
    *,
    batch_size: int,
    context_length: int,
    optimizer: str,
    precision: Precision = "fp32",
    world_size: int = 1,
    sharded: bool = False,
    activation_checkpointing: bool = False,
) -> TrainingMemory:
    """Memory of one training step on each device.

    The activations are those that autograd saves in a forward that is run without data.

    Args:
        config: The model.
        batch_size: Sequences that go through at once, on all devices together.
        context_length: Tokens of a sequence.
        optimizer: "adamw", "muon", "soap" or "kalma".
        precision: "fp32" or "bf16" autocast.
        world_size: Devices that train together.
        sharded: Whether each keeps a part of the model (FSDP2), else the whole (DDP).
        activation_checkpointing: Whether layers' activations are made again in the backward.
    """
    model = build_empty(config)
    parts = world_size if sharded else 1
    total = FLOAT_BYTES * _count(model.parameters())
    layers = [FLOAT_BYTES * _count(layer.parameters()) for layer in model.model.layers]
    # While it computes, a device holds what all layers share, and two layers: the next is fetched beside the present.
    gathered = total - sum(layers) + sum(sorted(layers)[-2:]) if parts > 1 else 0
    return TrainingMemory(
        parameters=total // parts,
        gathered=gathered,
        gradients=total // parts + (gathered if parts > 1 else 0),
        optimizer=_optimizer_bytes(model, optimizer, world_size, sharded),
        activations=_activation_bytes(
            config, -(-batch_size // world_size), context_length, precision, activation_checkpointing
        ),
    )


def _count(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _optimizer_bytes(model: KalmaGroveForCausalLM, optimizer: str, world_size: int, sharded: bool) -> int:
    """Moments are divided with the parameters, and what Kalma keeps of a matrix is kept by one device."""
    parts = world_size if sharded else 1
    if optimizer == "adamw":
        return 2 * FLOAT_BYTES * _count(model.parameters()) // parts
    moments = of_owners = 0
    for group in kalma_groups(model):
        is_matrix, is_whitened = group["method"] == "kalma", optimizer == "kalma" and group["method"] != "adamw"
        for parameter in group["params"]:
            if is_whitened:
                outputs, inputs = parameter.shape
                of_owners += parameter.numel() + count_state(outputs, inputs, BLOCK_SIZE, features_only=not is_matrix)
                of_owners += 2 * math.prod(blocks_shape(parameter.shape[1], BLOCK_SIZE)) if is_matrix else 0
            else:
                moments += parameter.numel() * (1 if is_matrix and optimizer == "muon" else 2)
                moments += 2 * sum(size**2 for size in parameter.shape) if is_matrix and optimizer == "soap" else 0
    return FLOAT_BYTES * (moments // parts + of_owners // world_size)


def _activation_bytes(
    config: KalmaGroveConfig, batch_size: int, context_length: int, precision: Precision, made_again: bool
) -> int:
    everything = _saved_bytes(config, batch_size, context_length, precision)
    if not made_again:
        return everything
    outside = _saved_bytes(config, batch_size, context_length, precision, made_again=True)
    inputs = FLOAT_BYTES * config.num_hidden_layers * batch_size * context_length * config.hidden_size
    return outside + inputs + (everything - outside) // config.num_hidden_layers


def _saved_bytes(
    config: KalmaGroveConfig, batch_size: int, context_length: int, precision: Precision, *, made_again: bool = False
) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward, without the parameters."""
    saved: dict[int, int] = {}

    def look_on(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        keep.append(tensor)
        return tensor

    look_on.only_looks_on = True  # type: ignore[attr-defined]  # A mark on a function.
    keep: list[Tensor] = []
    with FakeTensorMode():
        model = KalmaGroveForCausalLM(config).train()
        if made_again:
            model.make_activations_again()
        owned = {p.untyped_storage()._cdata for p in model.parameters()}
        tokens = torch.zeros(batch_size, context_length, dtype=torch.int64)
        device = torch.device("cpu")
        with (
            torch.autograd.graph.saved_tensors_hooks(look_on, lambda tensor: tensor),
            autocast(precision, device),
        ):
            model.token_loss_sum(tokens, tokens)
    return sum(size for key, size in saved.items() if key not in owned)
