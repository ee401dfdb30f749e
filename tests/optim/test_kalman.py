"""The exact filter: its forms agree, it is least squares, and its uncertainty is honest. All in float64."""

from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from torch import Tensor

from kalmagrove.optim.kalman import (
    Belief,
    kalman_gain,
    predict,
    update_by_gain,
    update_by_information,
    update_by_woodbury,
)

Update = Callable[[Belief, Tensor, Tensor, Tensor], Belief]
FORMS: dict[str, Update] = {
    "gain": update_by_gain,
    "information": update_by_information,
    "woodbury": update_by_woodbury,
}
N = 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size: int, seed: int) -> Tensor:
    factor = draw(size, size + 2, seed=seed)
    return factor @ factor.mT / size + 0.1 * torch.eye(size, dtype=torch.float64)


def prior(outputs: int | None = None) -> Belief:
    mean = draw(N, seed=1) if outputs is None else draw(N, outputs, seed=1)
    return Belief(mean, positive(N, seed=2))


def close(one: Belief, other: Belief, tolerance: float = 1e-10) -> bool:
    return torch.allclose(one.mean, other.mean, atol=tolerance, rtol=tolerance) and torch.allclose(
        one.covariance, other.covariance, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("observations", [1, 3, 17])
@pytest.mark.parametrize("form", ["information", "woodbury"])
def test_the_three_forms_agree_to_1e_10(form: str, observations: int, outputs: int | None) -> None:
    h, noise = draw(observations, N, seed=3), positive(observations, seed=4)
    z = draw(observations, seed=5) if outputs is None else draw(observations, outputs, seed=5)
    assert close(FORMS[form](prior(outputs), h, z, noise), update_by_gain(prior(outputs), h, z, noise))


@pytest.mark.parametrize("form", FORMS)
def test_with_true_targets_it_is_ridge_regression(form: str) -> None:
    h, z = draw(40, N, seed=6), draw(40, 3, seed=7)
    penalty, variance = 0.7, 2.5
    belief = Belief(torch.zeros(N, 3, dtype=torch.float64), variance / penalty * torch.eye(N, dtype=torch.float64))
    for start in range(0, 40, 4):
        rows = slice(start, start + 4)
        belief = FORMS[form](belief, h[rows], z[rows], variance * torch.eye(4, dtype=torch.float64))
    system = h.T @ h + penalty * torch.eye(N, dtype=torch.float64)
    assert torch.allclose(belief.mean, torch.linalg.solve(system, h.T @ z), atol=1e-10)
    assert torch.allclose(belief.covariance, variance * torch.linalg.inv(system), atol=1e-10)


def test_it_is_recursive_least_squares_with_forgetting() -> None:
    """The textbook's recursion, row by row: k = P x / (l + x^T P x), P <- (P - k x^T P) / l."""
    h, z, forgetting = draw(30, N, seed=8), draw(30, seed=9), 0.93
    theta, p = torch.zeros(N, dtype=torch.float64), 3.0 * torch.eye(N, dtype=torch.float64)
    belief = Belief(theta, p / forgetting)
    for x, target in zip(h, z, strict=True):
        k = p @ x / (forgetting + x @ p @ x)
        theta = theta + k * (target - x @ theta)
        p = (p - torch.outer(k, x @ p)) / forgetting
        belief = update_by_gain(belief, x[None], target[None], torch.ones(1, 1, dtype=torch.float64))
        assert torch.allclose(belief.mean, theta, atol=1e-10)
        belief = predict(belief, forgetting=forgetting)
    assert torch.allclose(belief.covariance * forgetting, p, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("portions", [[12], [1] * 12, [5, 7], [2, 1, 9]], ids=str)
def test_any_split_of_a_stream_gives_the_same_belief(form: str, portions: list[int]) -> None:
    h, z = draw(12, N, seed=10), draw(12, seed=11)
    noise = torch.diag(torch.linspace(0.5, 2.0, 12, dtype=torch.float64))
    belief, start = prior(), 0
    for portion in portions:
        rows = slice(start, start + portion)
        belief = FORMS[form](belief, h[rows], z[rows], noise[rows, rows])
        start += portion
    assert close(belief, update_by_gain(prior(), h, z, noise), 1e-9)


def test_the_gain_settles_at_the_solution_of_the_riccati_equation() -> None:
    h, noise, drift = draw(2, N, seed=12), positive(2, seed=13), 0.05 * positive(N, seed=14)
    # A parameter that shrinks by a tenth a step, so that directions which H does not see settle too.
    shrink, belief = 0.9, prior()
    for _ in range(3000):
        belief = update_by_gain(belief, h, torch.zeros(2, dtype=torch.float64), noise)
        belief = predict(Belief(belief.mean, shrink**2 * belief.covariance), drift=drift)
    identity = torch.eye(N, dtype=torch.float64)
    p = scipy.linalg.solve_discrete_are((shrink * identity).numpy(), h.T.numpy(), drift.numpy(), noise.numpy())
    expected = kalman_gain(torch.from_numpy(p), h, noise)
    assert torch.allclose(kalman_gain(belief.covariance, h, noise), expected, atol=1e-8)


def test_p_stays_symmetric_positive_definite_over_ten_thousand_steps() -> None:
    belief = Belief(torch.zeros(N, dtype=torch.float64), 1e3 * torch.eye(N, dtype=torch.float64))
    generator = torch.Generator().manual_seed(15)
    for _ in range(10_000):
        h = torch.randn(1, N, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, N, dtype=torch.float64)
        belief = update_by_gain(
            belief, h, torch.zeros(1, dtype=torch.float64), 1e-3 * torch.eye(1, dtype=torch.float64)
        )
        belief = predict(belief, forgetting=0.999)
    assert torch.equal(belief.covariance, belief.covariance.mT)
    assert torch.linalg.eigvalsh(belief.covariance).min() > 0


def test_the_95_percent_ellipsoid_covers_the_truth_95_percent_of_the_time() -> None:
    generator, covered, trials = torch.Generator().manual_seed(16), 0, 2000
    limit = 11.0705  # 95 % quantile of chi-squared with 5 degrees of freedom
    for _ in range(trials):
        truth = torch.randn(N, generator=generator, dtype=torch.float64)
        h = torch.randn(8, N, generator=generator, dtype=torch.float64)
        z = h @ truth + 0.5 * torch.randn(8, generator=generator, dtype=torch.float64)
        start = Belief(torch.zeros(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64))
        belief = update_by_gain(start, h, z, 0.25 * torch.eye(8, dtype=torch.float64))
        error = truth - belief.mean
        covered += int(error @ torch.linalg.solve(belief.covariance, error) <= limit)
    assert covered / trials == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("forgetting", [0.0, 1.1, float("nan")])
def test_forgetting_is_checked(forgetting: float) -> None:
    with pytest.raises(ValueError, match="forgetting must be above 0 and at most 1"):
        predict(prior(), forgetting=forgetting)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"of 5 values must be 5 x 5, got \(4, 4\)"):
        Belief(torch.zeros(5), torch.eye(4))
