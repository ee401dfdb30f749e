"""The linear algebra of Kalma's step."""

from typing import Any

import pytest
import torch

from kalmagrove.optim.curvature import (
    block_count,
    block_gram,
    damped_inverse,
    in_blocks,
    inverse_square_root,
    newton_schulz,
    times_blocks,
)


def covariance(size: int, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / (3 * size)


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (8, 8), (1, 5), (3, 7, 13)])
def test_newton_schulz_is_near_the_polar_factor(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(newton_schulz(matrix, steps=8))
    assert values.min() > 0.6 and values.max() < 1.3
    rotated = u.mT @ newton_schulz(matrix, steps=8) @ vt.mT
    off_diagonal = rotated - torch.diag_embed(torch.diagonal(rotated, dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-3


def test_newton_schulz_of_zero_is_zero() -> None:
    assert not newton_schulz(torch.zeros(3, 4)).any()


def test_the_damped_inverse_is_the_inverse_up_to_scale() -> None:
    c = covariance(6)
    inverse = damped_inverse(c, 0.1)
    product = inverse @ (c / c.diagonal().mean() + 0.1 * torch.eye(6, dtype=torch.float64))
    assert torch.allclose(product, product[0, 0] * torch.eye(6, dtype=torch.float64), atol=1e-10)
    assert inverse.diagonal().mean() == pytest.approx(1.0)
    assert torch.allclose(damped_inverse(c * 1e6, 0.1), inverse)


def test_the_inverse_square_root_squares_to_the_damped_inverse() -> None:
    c = covariance(6)
    root = inverse_square_root(c, 0.1)
    squared = root @ root
    assert torch.allclose(squared / squared.diagonal().mean(), damped_inverse(c, 0.1), atol=1e-8)


@pytest.mark.parametrize("function", [damped_inverse, inverse_square_root])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_without_information_p_is_the_identity(function: Any, value: float) -> None:
    assert torch.equal(function(torch.full((3, 3), value), 0.1), torch.eye(3))


@pytest.mark.parametrize("function", [damped_inverse, inverse_square_root])
def test_a_stack_is_the_same_as_one_by_one(function: Any) -> None:
    stack = torch.stack([covariance(5, seed) for seed in range(3)] + [torch.zeros(5, 5, dtype=torch.float64)])
    assert torch.allclose(function(stack, 0.1), torch.stack([function(c, 0.1) for c in stack]), atol=1e-12)


def test_an_indefinite_matrix_counts_as_no_information() -> None:
    indefinite = torch.diag(torch.tensor([5.0, 1.0, -3.0]))
    assert torch.equal(damped_inverse(indefinite, 0.1), torch.eye(3))


@pytest.mark.parametrize(("features", "block_size", "blocks"), [(12, 12, 1), (12, 100, 1), (12, 5, 3), (11, 4, 3)])
def test_blocks_hold_the_diagonal_of_the_gram(features: int, block_size: int, blocks: int) -> None:
    assert block_count(features, block_size) == blocks
    rows = torch.randn(7, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grams, size = block_gram(rows, blocks), -(-features // blocks)
    assert grams.shape == (blocks, size, size)
    for number, gram in enumerate(grams):
        part = rows[:, number * size : (number + 1) * size]
        assert torch.allclose(gram[: part.shape[1], : part.shape[1]], part.T @ part)
    block_diagonal = torch.block_diag(*grams)[:features, :features]
    assert torch.allclose(times_blocks(rows, grams), rows @ block_diagonal)
    assert torch.equal(in_blocks(rows, blocks).movedim(0, -2).flatten(-2)[:, :features], rows)
