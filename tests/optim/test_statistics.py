"""What the watched layers multiply."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kalmagrove.models.build import build_model, model_config
from kalmagrove.optim.statistics import ActivationStatistics

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8, "max_position_embeddings": 40}


def watching(layer: nn.Module, weight: torch.Tensor, **options: Any) -> ActivationStatistics:
    statistics = ActivationStatistics({id(weight): 64}, **options)
    statistics.attach(layer)
    statistics.active = True
    return statistics


def test_activation_statistics_are_the_mean_outer_product() -> None:
    layer = nn.Linear(5, 3)
    statistics = ActivationStatistics({id(layer.weight): 64})
    statistics.attach(layer)
    assert statistics.watched == {id(layer.weight)}
    statistics.active = True
    first, second = torch.randn(7, 5), torch.randn(2, 4, 5)
    layer(first)
    layer(second)
    flat = second.reshape(-1, 5)
    total, count = statistics.take()[id(layer.weight)]
    assert count == 15
    assert torch.allclose(total[0], first.T @ first + flat.T @ flat, atol=1e-5)
    assert statistics.take() == {}


def test_statistics_skip_evaluation_no_grad_and_inactive_forwards() -> None:
    layer = nn.Linear(5, 3)
    statistics = ActivationStatistics({id(layer.weight): 64})
    statistics.attach(layer)
    layer(torch.randn(2, 5))
    statistics.active = True
    with torch.no_grad():
        layer(torch.randn(2, 5))
    layer.eval()
    layer(torch.randn(2, 5))
    assert statistics.take() == {}


def test_a_shared_basis_collects_from_every_layer_that_uses_it() -> None:
    model = build_model(model_config("kalmagrove", SIZES | {"grove_parts": "all", "sharing": "band"}), 0)
    basis = model.model.layers[0].mlp.up_proj._right[1].weight
    statistics = ActivationStatistics({id(basis): 64})
    statistics.attach(model)
    statistics.active = True
    inputs = []
    for layer in model.model.layers[:2]:
        layer.mlp.up_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, 1)))
    model(torch.randint(0, 99, (2, 9)))
    total, count = statistics.take()[id(basis)]
    assert count == 36
    assert torch.allclose(total[0], sum(x.T @ x for x in inputs), atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_forward_counts_once(use_reentrant: bool) -> None:
    layer = nn.Linear(5, 3)
    statistics = watching(layer, layer.weight)
    x = torch.randn(7, 5, requires_grad=True)
    for _ in range(2):
        # The second micro-batch of an accumulation counts like the first.
        checkpoint(lambda h: layer(h).tanh(), x, use_reentrant=use_reentrant).sum().backward()
    total, count = statistics.take()[id(layer.weight)]
    assert count == 14
    assert torch.allclose(total[0], 2 * x.T @ x, atol=1e-5)


def test_masked_tokens_do_not_count() -> None:
    layer = nn.Linear(5, 3)
    statistics = watching(layer, layer.weight)
    x, mask = torch.randn(2, 4, 5), torch.tensor([[True, True, False, False], [True, True, True, True]])
    statistics.token_mask = mask
    layer(x)
    total, count = statistics.take()[id(layer.weight)]
    assert count == 6
    assert torch.allclose(total[0], x[mask].T @ x[mask], atol=1e-5)
    statistics.token_mask = torch.zeros(2, 4, dtype=torch.bool)
    layer(x)
    assert statistics.take() == {}


def test_long_inputs_are_sampled_at_even_distance() -> None:
    layer = nn.Linear(5, 3)
    statistics = watching(layer, layer.weight, most_rows=4)
    x = torch.randn(11, 5)
    layer(x)
    total, count = statistics.take()[id(layer.weight)]
    assert count == 4
    assert torch.allclose(total[0], x[::3].T @ x[::3], atol=1e-5)


def test_detached_layers_are_not_watched() -> None:
    layer = nn.Linear(5, 3)
    statistics = watching(layer, layer.weight)
    statistics.detach()
    layer(torch.randn(2, 5))
    assert statistics.take() == {}


def test_autocast_does_not_make_the_covariance_coarse() -> None:
    layer = nn.Linear(5, 3)
    statistics = watching(layer, layer.weight)
    x = torch.randn(50, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    total, _ = statistics.take()[id(layer.weight)]
    assert torch.allclose(total[0], x.T @ x, atol=1e-4)


def test_a_buffer_that_is_filled_anew_is_looked_at_anew() -> None:
    layer = nn.Linear(3, 2, bias=False)
    statistics = watching(layer, layer.weight)
    buffer = torch.ones(4, 3)
    layer(buffer)
    buffer.zero_()
    layer(buffer)
    total, count = statistics.take()[id(layer.weight)]
    assert count == 8 and torch.equal(total[0], torch.full((3, 3), 4.0))
