"""The innovation whitened in its eigenbases."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kalmagrove.optim.whitening import PartState, Whitening, eigenbasis, followed_basis, in_one, write_back


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size: int, seed: int = 0, condition: float = 1e3) -> Tensor:
    axes = torch.linalg.qr(draw(size, size, seed=seed))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10(), size, dtype=torch.float64)
    return (axes * values) @ axes.mT


def is_orthonormal(basis: Tensor, tolerance: float = 1e-4) -> bool:
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype)
    return bool(torch.allclose(basis.mT @ basis, identity, atol=tolerance))


def whitened(gradients: Sequence[Tensor], **options: Any) -> Tensor:
    """The last of a sequence of gradients of one matrix, whitened by all of them."""
    states: list[dict[str, Any]] = [{"step": 0}]
    whitening = Whitening(variance_decay=0.9, covariance_decay=0.9, **{"block_size": 1024} | options)
    for step, gradient in enumerate(gradients):
        states[0]["step"] += 1
        last = whitening.whiten(gradient[None], gradient[None], [PartState(states[0])], turn=step % 2 == 0)
    return last[0]


def test_an_eigenbasis_is_orthonormal_and_diagonalises() -> None:
    covariance = positive(6)
    basis = eigenbasis(covariance, tie_break=0.0)
    diagonal = basis.mT @ covariance @ basis
    assert is_orthonormal(basis, 1e-10)
    assert torch.allclose(diagonal, torch.diag(diagonal.diagonal()), atol=1e-10)


def test_rounding_does_not_choose_the_axes_of_a_null_space() -> None:
    column = draw(8, 1).float()
    exact, rounded = column @ column.mT, column @ column.mT + 1e-7 * draw(8, 8, seed=1).float()
    bases = [eigenbasis((c + c.mT) / 2) for c in (exact, rounded)]
    overlap = (bases[0].mT @ bases[1]).abs()
    assert torch.allclose(overlap, torch.eye(8), atol=2e-2)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_eigenbasis_without_information_is_the_identity(value: float) -> None:
    assert torch.equal(eigenbasis(torch.full((3, 3), value)), torch.eye(3))


def test_a_followed_basis_comes_to_the_eigenvectors() -> None:
    covariance, basis = positive(6, condition=100.0), torch.linalg.qr(draw(6, 6, seed=5))[0]
    for _ in range(200):
        basis = followed_basis(covariance, basis)
    diagonal = basis.mT @ covariance @ basis
    assert torch.allclose(diagonal, torch.diag(diagonal.diagonal()), atol=1e-4)


def test_a_basis_that_is_right_stays() -> None:
    covariance = positive(6)
    basis = eigenbasis(covariance, tie_break=0.0)
    assert torch.allclose(followed_basis(covariance, basis), basis, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_followed_basis_stays_orthonormal_in_float32(rank: int) -> None:
    basis, covariance = torch.linalg.qr(draw(8, 8))[0].float(), torch.zeros(8, 8)
    for step in range(300):
        factor = draw(8, rank, seed=step).float()
        covariance.lerp_(factor @ factor.mT, 0.05)
        basis = followed_basis(covariance, basis)
    assert is_orthonormal(basis, 1e-4)


def spectrum(kind: str, size: int) -> Tensor:
    """A covariance in float32 with a spread of eigenvalues that is hard for a Cholesky factor."""
    axes = torch.linalg.qr(draw(size, size, seed=7))[0].float()
    values = torch.arange(1, size + 1).float() ** -3
    if kind == "outlier":
        values = torch.ones(size).index_fill(0, torch.tensor([0]), 1e4)
    if kind == "rank 2":
        values = torch.full((size,), 1e-12).index_fill(0, torch.tensor([0, 1]), 1.0)
    return (axes * values) @ axes.mT


@pytest.mark.parametrize("kind", ["power law", "outlier", "rank 2"])
@pytest.mark.parametrize("start", ["identity", "random"])
def test_a_wide_spectrum_does_not_freeze_the_basis(kind: str, start: str) -> None:
    covariance = spectrum(kind, 192)
    basis = torch.eye(192) if start == "identity" else torch.linalg.qr(draw(192, 192))[0].float()
    for _ in range(10):
        basis = followed_basis(covariance, basis)
    diagonal = basis.mT @ covariance @ basis
    off_diagonal = 1 - diagonal.diagonal().square().sum() / diagonal.square().sum()
    assert off_diagonal < 0.01
    assert is_orthonormal(basis, 1e-3)


def test_axes_that_never_have_a_gradient_are_kept() -> None:
    covariance = torch.zeros(6, 6)
    covariance[:3, :3] = positive(3).float()
    basis = eigenbasis(covariance)
    for _ in range(50):
        basis = followed_basis(covariance, basis)
    assert is_orthonormal(basis)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_covariance_of_no_use_leaves_the_basis(bad: float) -> None:
    basis = torch.linalg.qr(draw(4, 4))[0]
    assert torch.allclose(followed_basis(torch.full((4, 4), bad, dtype=torch.float64), basis), basis, atol=1e-6)


def test_gradients_of_one_direction_are_whitened_to_size_one() -> None:
    """One singular value, however large it is, becomes about one; what rounding adds stays small."""
    left, right = draw(5, 1, seed=1), draw(1, 4, seed=2)
    direction = left @ right / (left.norm() * right.norm())
    update = whitened([scale * direction for scale in (100.0, 100.0, 100.0)])
    assert torch.allclose(update, direction, atol=1e-3)


def test_a_stack_is_whitened_as_one_by_one() -> None:
    stacks = [draw(3, 4, 6, seed=seed) for seed in range(4)]
    states: list[dict[str, Any]] = [{"step": 0} for _ in range(3)]
    whitening = Whitening(variance_decay=0.9, covariance_decay=0.9, block_size=1024)
    for step, stack in enumerate(stacks):
        for state in states:
            state["step"] += 1
        together = whitening.whiten(stack, stack, [PartState(state) for state in states], turn=step % 2 == 0)
    for number in range(3):
        assert torch.allclose(together[number], whitened([stack[number] for stack in stacks]), atol=1e-9)


@pytest.mark.parametrize(("shape", "sides"), [((5, 3), {"left", "right"}), ((7, 3), {"right"}), ((3, 7), {"left"})])
def test_a_side_that_is_much_longer_keeps_its_axes(shape: tuple[int, int], sides: set[str]) -> None:
    state: dict[str, Any] = {"step": 1}
    whitening = Whitening(variance_decay=0.9, covariance_decay=0.9, block_size=1024)
    whitening.whiten(draw(1, *shape), draw(1, *shape), [PartState(state)], turn=True)
    assert {side for side in ("left", "right") if f"{side}_basis" in state} == sides


def test_blocks_of_a_wide_side_are_bases_of_their_own() -> None:
    gradients = [draw(13, 6, seed=seed) for seed in range(4)]
    wide = whitened(gradients, block_size=3, floor=0.0)
    halves = [whitened([g[:, part] for g in gradients], floor=0.0) for part in (slice(3), slice(3, 6))]
    assert torch.allclose(wide, torch.cat(halves, dim=1), atol=1e-9)


def test_padding_of_a_block_changes_nothing() -> None:
    """Seven inputs in two blocks of four: the last column is filled up."""
    gradients = [draw(15, 7, seed=seed) for seed in range(4)]
    padded = whitened(gradients, block_size=4, floor=0.0)
    parts = [whitened([g[:, part] for g in gradients], floor=0.0) for part in (slice(4), slice(4, 7))]
    assert torch.allclose(padded, torch.cat(parts, dim=1), atol=2e-3)


def test_a_table_turns_its_features_however_long_they_are() -> None:
    state: dict[str, Any] = {"step": 1}
    whitening = Whitening(variance_decay=0.9, covariance_decay=0.9, block_size=1024, features_only=True)
    whitening.whiten(draw(1, 3, 9), draw(1, 3, 9), [PartState(state)], turn=True)
    assert "right_basis" in state and "left_basis" not in state


def test_zero_stays_zero() -> None:
    assert not whitened([torch.zeros(4, 6)] * 3).any()


def test_the_second_part_has_names_of_its_own() -> None:
    state: dict[str, Any] = {}
    PartState(state)["variance"] = 1
    PartState(state, 1)["variance"] = 2
    assert state == {"variance": 1, "variance_1": 2}
    assert "variance" in PartState(state, 1) and "variance" not in PartState(state, 2)


def test_states_that_lie_together_are_one_tensor_without_a_copy() -> None:
    states = [PartState({"basis": torch.full((2, 3), float(index))}) for index in range(3)]
    joined = in_one(states, "basis")
    joined += 10
    assert [float(state["basis"][0, 0]) for state in states] == [10, 11, 12]
    assert in_one(states, "basis").data_ptr() == joined.data_ptr()


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [2], [2, 0, 1]])
def test_states_in_another_order_or_number_stay_right(order: list[int]) -> None:
    states = [PartState({"basis": torch.full((2, 3), float(index))}) for index in range(3)]
    in_one(states, "basis")
    chosen = [states[index] for index in order]
    joined = in_one(chosen, "basis")
    assert joined[:, 0, 0].tolist() == order
    joined += 10
    write_back(chosen, "basis", joined)
    assert [float(state["basis"][0, 0]) for state in states] == [n + 10 * (n in order) for n in range(3)]


def test_states_without_gradients_keep_no_old_storage_alive() -> None:
    states = [PartState({"basis": torch.full((16, 16), float(index))}) for index in range(8)]
    for left_out in (3, 5, 1, 6, 2):
        active = [state for index, state in enumerate(states) if index != left_out]
        joined = in_one(active, "basis")
        joined += 1
        write_back(active, "basis", joined)
    storages = {s["basis"].untyped_storage().data_ptr(): s["basis"].untyped_storage().nbytes() for s in states}
    assert sum(storages.values()) <= 2 * sum(state["basis"].nbytes for state in states)
    assert [float(state["basis"][0, 0]) for state in states] == [5, 5, 6, 7, 9, 9, 10, 12]
