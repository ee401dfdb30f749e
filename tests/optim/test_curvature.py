"""P, and block-diagonal matrices."""

import pytest
import torch

from kalmagrove.optim.curvature import (
    block_count,
    block_gram,
    damped_inverse,
    in_blocks,
    times_blocks,
)


def covariance(size: int, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / (3 * size)


def test_the_damped_inverse_is_the_inverse_up_to_scale() -> None:
    c = covariance(6)
    inverse = damped_inverse(c, 0.1)
    product = inverse @ (c / c.diagonal().mean() + 0.1 * torch.eye(6, dtype=torch.float64))
    assert torch.allclose(product, product[0, 0] * torch.eye(6, dtype=torch.float64), atol=1e-10)
    assert inverse.diagonal().mean() == pytest.approx(1.0)
    assert torch.allclose(damped_inverse(c * 1e6, 0.1), inverse)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_without_information_p_is_the_identity(value: float) -> None:
    assert torch.equal(damped_inverse(torch.full((3, 3), value), 0.1), torch.eye(3))


def test_a_stack_is_the_same_as_one_by_one() -> None:
    stack = torch.stack([covariance(5, seed) for seed in range(3)] + [torch.zeros(5, 5, dtype=torch.float64)])
    expected = torch.stack([damped_inverse(c, 0.1) for c in stack])
    assert torch.allclose(damped_inverse(stack, 0.1), expected, atol=1e-12)


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


def test_blocks_of_a_stack_are_those_of_each_matrix() -> None:
    stack = torch.randn(2, 3, 7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grams = block_gram(stack, 3)
    assert grams.shape == (2, 3, 3, 4, 4)
    assert torch.allclose(grams[1, 2], block_gram(stack[1, 2], 3))
    assert torch.allclose(times_blocks(stack, grams)[1, 2], times_blocks(stack[1, 2], grams[1, 2]))
