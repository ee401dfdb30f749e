"""The closed forms against what they stand for."""

import pytest
import torch

from kalmagrove.compression.factorise import best_reader, compact_basis, losses_of_ranks, spectrum_of
from kalmagrove.compression.layerwise import regression
from kalmagrove.compression.whitening import cholesky_root

FEATURES, OUTPUTS, RANK = 13, 9, 4


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(features: int, seed: int) -> torch.Tensor:
    rows = drawn(3 * features, features, seed=seed) * torch.linspace(0.1, 3, features, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def loss(reading: torch.Tensor, inputs: torch.Tensor, sensitivity: torch.Tensor) -> float:
    """Of x that is read as P x, from the definition."""
    left_out = torch.eye(len(inputs), dtype=torch.float64) - reading
    return float(torch.trace(sensitivity @ left_out @ inputs @ left_out.T)) / 2


def projection(directions: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The map whose best readers read through these directions."""
    return best_reader(torch.eye(len(inputs)), compact_basis(directions), inputs) @ compact_basis(directions).matrix()


def test_the_loss_of_a_rank_is_that_of_its_best_basis_and_no_other_basis_is_better() -> None:
    inputs, sensitivity = moment(FEATURES, 0), moment(FEATURES, 1)
    spectrum = spectrum_of(inputs, sensitivity)
    losses = losses_of_ranks(cholesky_root(inputs)[0], sensitivity)
    assert losses.shape == (FEATURES + 1,) and losses[-1] == 0
    for rank in (1, RANK, FEATURES - 1):
        found = loss(projection(spectrum.directions[:rank], inputs), inputs, sensitivity)
        assert found == pytest.approx(float(losses[rank]), rel=1e-5)
    for seed in range(5):
        close = spectrum.directions[:RANK] + 0.05 * drawn(RANK, FEATURES, seed=seed)
        assert loss(projection(close, inputs), inputs, sensitivity) > float(losses[RANK])


def test_it_is_the_truncated_svd_of_the_matrix_whitened_on_both_sides() -> None:
    weight, inputs, outputs = drawn(OUTPUTS, FEATURES, seed=2), moment(FEATURES, 3), moment(OUTPUTS, 4)
    spectrum = spectrum_of(inputs, weight.T @ outputs @ weight)
    basis = compact_basis(spectrum.directions[:RANK])
    found = best_reader(weight, basis, inputs) @ basis.matrix()
    root, inverse = cholesky_root(inputs)
    left, left_inverse = cholesky_root(outputs)
    u, s, v = torch.linalg.svd(left.T @ weight @ root)
    expected = left_inverse.T @ (u[:, :RANK] * s[:RANK]) @ v[:RANK] @ inverse
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(spectrum.values[:OUTPUTS].sqrt(), s, atol=1e-5)


def test_a_compact_basis_spans_the_same_space_in_fewer_numbers() -> None:
    rows = drawn(RANK, FEATURES, seed=5)
    basis = compact_basis(rows)
    assert basis.rest.numel() == RANK * (FEATURES - RANK)
    assert torch.allclose(basis.matrix()[:, basis.order[:RANK].long()], torch.eye(RANK, dtype=torch.float64))
    assert torch.linalg.matrix_rank(torch.cat((rows, basis.matrix()))) == RANK


def test_readers_are_the_least_squares_solution_also_for_a_changed_input() -> None:
    wanted, seen = drawn(200, FEATURES, seed=6), drawn(200, FEATURES, seed=7)
    seen = wanted + 0.3 * seen
    weight, basis = drawn(OUTPUTS, FEATURES, seed=8), compact_basis(drawn(RANK, FEATURES, seed=9))
    change = regression(seen.T @ seen / 200, wanted.T @ seen / 200)
    found = best_reader(weight @ change, basis, seen.T @ seen / 200)
    read = seen @ basis.matrix().T
    expected = torch.linalg.lstsq(read, seen @ change.T @ weight.T).solution.T
    assert torch.allclose(found, expected, atol=1e-5)
    closer, plain = ((seen @ c.T - wanted).square().mean() for c in (change, torch.eye(FEATURES, dtype=torch.float64)))
    assert closer < plain


@pytest.mark.parametrize("rank", [1, 5])
def test_a_moment_without_full_rank_still_has_a_root(rank: int) -> None:
    rows = drawn(rank, FEATURES, seed=10)
    singular = rows.T @ rows
    root, inverse = cholesky_root(singular)
    assert torch.allclose(root @ inverse, torch.eye(FEATURES, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(root @ root.T, singular, atol=1e-2 * float(singular.diagonal().max()))


def test_a_moment_of_nothing_has_a_root_too() -> None:
    root, inverse = cholesky_root(torch.zeros(3, 3))
    assert bool(torch.isfinite(root).all()) and bool(torch.isfinite(inverse).all())
