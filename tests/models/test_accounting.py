"""Computed costs against measured ones."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kalmagrove.models.accounting import (
    build_empty,
    count_parameters,
    decoding_bytes,
    forward_macs_per_token,
)
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.presets import FAMILIES
from kalmagrove.models.training_memory import training_memory
from kalmagrove.optim.build import build_optimizers

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16, "max_position_embeddings": 48}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_and_equal_the_real_model(family: str) -> None:
    config = model_config(family, SIZES)
    counted = count_parameters(build_empty(config))
    assert counted.total == sum(p.numel() for p in build_model(config, 0).parameters())
    assert counted.total == counted.embedding + counted.attention + counted.feed_forward + counted.other
    assert counted.embedding >= 99 * 64


@pytest.mark.parametrize("options", [{}, {"embedding_rank": 24}], ids=["", "factorised"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "slim"])
def test_macs_equal_those_that_pytorch_counts(family: str, options: dict[str, int]) -> None:
    config = model_config(family, SIZES | {"short_conv": 0} | options)
    model = build_model(config, 0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 48, dtype=torch.int64))
    # The plain kernel computes every pair of positions; a causal model needs (T + 1) / 2T of them.
    attention = 3 * 2 * config.attention_width * 48
    expected = counter.get_total_flops() / 2 / 48 - attention + attention * 49 / 96
    assert forward_macs_per_token(config, 48) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("length", [1, 5, 31, 48])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoding_cache_is_as_large_as_computed(family: str, length: int) -> None:
    config = model_config(family, SIZES)
    model = build_model(config, 0).eval()
    cache = model.new_cache()
    with torch.no_grad():
        for _ in range(length):
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    assert cache.num_bytes() == decoding_bytes(config, length)


@pytest.mark.parametrize("wide", [{}, {"intermediate_size": 1100}], ids=["", "wide"])
@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "kalma"])
def test_optimizer_memory_is_as_large_as_computed(name: str, wide: dict[str, int]) -> None:
    # Blocks must be met within 12 tokens, or their pooling has no gradient and no state.
    resolutions = [{"num_heads": 2, "head_dim": 8, "scales": [[1, 4], [4, None]]}]
    config = model_config("kalmagrove", SIZES | wide | {"resolutions": resolutions})
    model = build_model(config, 0)
    optimizers = build_optimizers(name, model, lr=0.01)  # type: ignore[arg-type]
    ids = torch.randint(0, 99, (2, 12))
    model.token_loss_sum(ids, ids).backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    values = [value for state in states for key, value in state.items() if key != "step"]
    tensors = [part for value in values for part in (value if isinstance(value, list) else [value])]
    measured = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    memory = training_memory(config, batch_size=2, context_length=12, optimizer=name)
    assert memory.optimizer == measured
    assert memory.parameters == memory.gradients == 4 * sum(p.numel() for p in model.parameters())


def test_memory_is_divided_over_devices() -> None:
    config = model_config("kalmagrove-small", {"vocab_size": 500, "max_position_embeddings": 64})
    given: dict[str, Any] = {"batch_size": 8, "context_length": 64, "optimizer": "kalma"}
    alone = training_memory(config, **given)
    copies = training_memory(config, **given, world_size=4)
    shards = training_memory(config, **given, world_size=4, sharded=True)
    again = training_memory(config, **given, activation_checkpointing=True)
    assert copies.parameters == alone.parameters == copies.gradients
    assert alone.optimizer // 4 <= shards.optimizer + 4 <= copies.optimizer < alone.optimizer / 3
    assert copies.activations == training_memory(config, **given | {"batch_size": 2}).activations
    assert shards.parameters == alone.parameters // 4 and shards.activations == copies.activations
    assert 0 < shards.gathered < alone.parameters
    assert again.activations < 0.5 * alone.activations and again.optimizer == alone.optimizer


def test_memory_of_activations_that_are_made_again_is_what_a_step_keeps() -> None:
    config = model_config("llama", SIZES)
    model = build_model(config, 0).train()
    model.make_activations_again()
    inputs: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes))
    ids = torch.zeros(3, 20, dtype=torch.int64)
    model.token_loss_sum(ids, ids)
    given: dict[str, Any] = {"batch_size": 3, "context_length": 20, "optimizer": "adamw"}
    everything = training_memory(config, **given).activations
    again = training_memory(config, **given, activation_checkpointing=True).activations
    assert sum(inputs) < again < sum(inputs) + everything / 2


@pytest.mark.parametrize("family", ["llama", "kalmagrove"])
def test_activation_memory_is_what_autograd_saves(family: str) -> None:
    config = model_config(family, SIZES)
    model = build_model(config, 0)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    keep = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        keep.append(tensor)
        if tensor.untyped_storage().data_ptr() not in owned:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pack.only_looks_on = True  # type: ignore[attr-defined]
    ids = torch.zeros(3, 20, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.token_loss_sum(ids, ids)
    computed = training_memory(config, batch_size=3, context_length=20, optimizer="adamw").activations
    assert computed == pytest.approx(sum(saved.values()), rel=0.02)
