"""Bases are the leading singular directions of the weights, or of a text's gradient in Fisher's metric."""

import math

import pytest
import torch
import torch.nn.functional as F
from adapted_models import BUILDERS, fill, logits_of
from torch import Tensor, nn

from kalmagrove.adaptors import Adaptors
from kalmagrove.adaptors.bases import DAMPING, gradient_bases, singular_bases
from kalmagrove.adaptors.gradients import text_bases
from kalmagrove.errors import KalmaGroveError


@pytest.mark.parametrize("shape", [(13, 37), (37, 13), (7, 7)])
def test_bases_are_the_leading_singular_directions(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, right = singular_bases(weight, 5)
    assert left.shape == (shape[0], 5) and right.shape == (5, shape[1])
    assert torch.allclose(left.T @ left, torch.eye(5), atol=1e-5)
    assert torch.allclose(right @ right.T, torch.eye(5), atol=1e-5)
    core = left.T @ weight @ right.T
    singular = torch.linalg.svdvals(weight)[:5]
    assert torch.allclose(core, torch.diag(singular), atol=1e-4)


def test_a_larger_rank_begins_with_the_smaller_one_and_ends_at_the_matrix() -> None:
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    small, large = singular_bases(weight, 3), singular_bases(weight, 99)
    assert torch.equal(small[0], large[0][:, :3]) and torch.equal(small[1], large[1][:3])
    assert large[0].shape == (9, 9)


def test_directions_that_a_matrix_lacks_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    left, right = singular_bases(weight, 6)
    assert left.shape == (12, 2) and right.shape == (2, 20)


def test_the_sign_does_not_depend_on_the_solver() -> None:
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    left, _ = singular_bases(weight, 9)
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    flipped, other = singular_bases(-weight, 9)
    assert torch.allclose(flipped, left, atol=1e-6)
    assert torch.allclose(other, -singular_bases(weight, 9)[1], atol=1e-6)


def loss_sum(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def test_the_gradient_is_diagonal_between_its_own_bases() -> None:
    """And each direction has one unit of the damped metric on both sides."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(500, 11, generator=generator), torch.randn(500, 7, generator=generator)
    x[:, 0] *= 5
    gradient, inputs, outputs = g.T @ x / 500, x.T @ x / 500, g.T @ g / 500
    (left, right), slopes = gradient_bases(gradient, inputs, outputs, 4)
    core = left.T @ gradient @ right.T
    off_diagonal = core - torch.diag(core.diagonal())
    assert off_diagonal.abs().max() < 0.03 * core.abs().max()
    assert torch.allclose(core.diagonal(), slopes, rtol=0.03, atol=1e-3)
    assert bool((slopes[:-1] >= slopes[1:]).all())
    for basis, covariance in ((left.T, outputs), (right, inputs)):
        damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance))
        assert torch.allclose(basis @ damped @ basis.T, torch.eye(4), atol=0.03)
    assert torch.equal(left.bfloat16().float(), left)


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_every_direction_goes_down_at_first(kind: str, tokens: Tensor) -> None:
    """The gradient of a diagonal core is that of the dense matrix between the bases: its singular values."""
    model = BUILDERS[kind]()
    adaptors = Adaptors(model)
    bases = text_bases(model, adaptors.layers, [tokens, tokens.flip(0)], lambda t: loss_sum(model, t), 3)
    assert sum(len(right) for _, right in bases.values()) in range(3 * len(bases) - 1, 4 * len(bases))
    cores = adaptors.add_adaptor("legal", core="diagonal", bases=bases)
    adaptors.set_adaptor("legal")
    loss_sum(model, tokens).backward()
    for name, core in cores.items():
        assert core.grad is not None and bool((core.grad > 0).all()), name
    assert all(parameter.grad is None for parameter in model.parameters())


def trained_loss(bases_of: str, lr: float, tokens: Tensor) -> float:
    model = BUILDERS["grove"]()
    adaptors = Adaptors(model)
    bases = text_bases(model, adaptors.layers, [tokens], lambda t: loss_sum(model, t), 4)
    own = bases_of == "gradient"
    cores = adaptors.add_adaptor("legal", None if own else 4, core="diagonal", bases=bases if own else None)
    adaptors.set_adaptor("legal")
    optimizer = torch.optim.Adam(cores.values(), lr=lr)
    for _ in range(20):
        optimizer.zero_grad()
        (loss_sum(model, tokens) / tokens[:, 1:].numel()).backward()
        optimizer.step()
    return loss_sum(model, tokens).item() / tokens[:, 1:].numel()


def test_a_diagonal_core_in_the_gradient_s_bases_learns_more_than_one_in_the_weights(tokens: Tensor) -> None:
    best = {kind: min(trained_loss(kind, lr, tokens) for lr in (1e-3, 1e-2, 1e-1)) for kind in ("gradient", "weights")}
    assert best["gradient"] < best["weights"] - 0.05


def test_new_directions_are_the_given_ones_where_the_adaptor_has_fewer_than_its_bases(tokens: Tensor) -> None:
    model = BUILDERS["grove"]()
    adaptors = Adaptors(model)
    first, second = (
        text_bases(model, adaptors.layers, [part], lambda t: loss_sum(model, t), 4) for part in (tokens, tokens.flip(1))
    )
    adaptors.add_adaptor("legal", 1, core="diagonal", bases=first)
    with torch.no_grad():
        for core in adaptors.extend_adaptor("legal", second).values():
            core[1:] = 1.0
    for layer, (left, right) in second.items():
        assert torch.allclose(adaptors.change("legal", layer), left @ right, rtol=1e-4, atol=1e-4)


def test_adaptors_of_both_kinds_add_up(model: nn.Module, tokens: Tensor) -> None:
    adaptors = Adaptors(model)
    bases = text_bases(model, adaptors.layers, [tokens], lambda t: loss_sum(model, t), 3)
    adaptors.add_adaptor("legal", core="diagonal", bases=bases)
    adaptors.add_adaptor("medical", 2)
    adaptors.add_adaptor("plain", 5, core="diagonal")
    for seed, name in enumerate(("legal", "medical", "plain")):
        fill(adaptors, name, seed)
    adaptors.add_weighted_adaptor("mixed", {"legal": 0.5, "medical": -1.0, "plain": 2.0})
    adaptors.add_weighted_adaptor("shared", {"medical": 1.0, "plain": 1.0})
    assert adaptors.own_bases("shared") is None
    for layer in adaptors.layers:
        changes = {name: adaptors.change(name, layer) for name in ("legal", "medical", "plain")}
        expected = 0.5 * changes["legal"] - changes["medical"] + 2.0 * changes["plain"]
        assert torch.allclose(adaptors.change("mixed", layer), expected, rtol=1e-4, atol=1e-4)
        both = changes["medical"] + changes["plain"]
        assert torch.allclose(adaptors.change("shared", layer), both, atol=1e-5)
    adaptors.set_adaptor("mixed")
    expected_logits = logits_of(model, tokens)
    adaptors.merge()
    assert torch.allclose(logits_of(model, tokens), expected_logits, atol=1e-3)


def test_wrong_bases_and_gradients_that_are_not_finite_are_refused(tokens: Tensor) -> None:
    model = BUILDERS["grove"]()
    adaptors = Adaptors(model)
    with pytest.raises(KalmaGroveError, match="no bases of 12 outputs and 24 inputs for layer"):
        adaptors.add_adaptor("legal", 2, bases={})
    assert adaptors.names == []
    with pytest.raises(KalmaGroveError, match="has no finite gradient for this text"):
        text_bases(model, adaptors.layers, [tokens], lambda t: loss_sum(model, t) * math.inf, 2)
    assert logits_of(model, tokens).isfinite().all()
