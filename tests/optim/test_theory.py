"""The claims of docs/theory/kalma.md, by number. All in float64 unless the claim is about the optimiser itself."""

import pytest
import torch
from torch import Tensor, nn

from kalmagrove.optim.curvature import newton_schulz
from kalmagrove.optim.kalma import Kalma
from kalmagrove.optim.kalman import Belief, predict, update_by_information

INPUTS, OUTPUTS = 6, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size: int, seed: int) -> Tensor:
    factor = draw(size, size + 2, seed=seed)
    return factor @ factor.mT / size + 0.1 * torch.eye(size, dtype=torch.float64)


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


# 1. The filter is online natural gradient


def test_the_filter_is_natural_gradient_with_a_running_mean_of_the_fisher_matrix() -> None:
    noise = 0.7
    belief = Belief(torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64), torch.eye(INPUTS, dtype=torch.float64))
    weight, fisher = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64), torch.eye(INPUTS, dtype=torch.float64)
    for step in range(1, 30):
        h, z = draw(3, INPUTS, seed=step), draw(3, OUTPUTS, seed=100 + step)
        belief = update_by_information(belief, h, z, noise * torch.eye(3, dtype=torch.float64))
        gradient = (weight @ h.mT - z.mT) @ h / noise
        # The mean of step + 1 terms: the prior's and one of each step.
        fisher = fisher + (h.mT @ h / noise - fisher) / (step + 1)
        weight = weight - gradient @ torch.linalg.inv(fisher) / (step + 1)
    assert torch.allclose(weight, belief.mean.mT, atol=1e-10)


# 2. Descent


@pytest.mark.parametrize("shape", [(OUTPUTS, INPUTS), (INPUTS, OUTPUTS), (5, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_the_whitened_step_goes_down_by_at_least_the_bound(shape: tuple[int, int], seed: int) -> None:
    gradient, p = draw(*shape, seed=seed), positive(shape[1], seed=seed + 50)
    going_down = (gradient * polar(gradient @ p)).sum()
    bound = torch.linalg.matrix_norm(gradient @ p, "nuc") / torch.linalg.eigvalsh(p)[-1]
    assert going_down >= bound - 1e-10 > 0
    assert (gradient * newton_schulz(gradient @ p)).sum() > 0


def test_on_a_smooth_loss_the_mean_of_the_gradient_norms_is_within_the_bound() -> None:
    start, hessian, p = draw(OUTPUTS, INPUTS, seed=1), positive(INPUTS, seed=2), positive(INPUTS, seed=3)
    smoothness = float(torch.linalg.eigvalsh(hessian)[-1])
    deviation, steps, lr = 0.01, 2000, 0.02
    weight, norms = start.clone(), []
    for step in range(steps):
        gradient = weight @ hessian
        norms.append(float(torch.linalg.matrix_norm(gradient @ p, "nuc")))
        noise = deviation * draw(OUTPUTS, INPUTS, seed=1000 + step)
        weight -= lr * polar((gradient + noise) @ p)
    largest, rank = float(torch.linalg.eigvalsh(p)[-1]), min(OUTPUTS, INPUTS)
    first_loss = float((start @ hessian * start).sum() / 2)
    # E of the nuclear norm of the noise is at most sqrt(rank) times that of its Frobenius norm.
    noise_norm = rank**0.5 * deviation * (OUTPUTS * INPUTS) ** 0.5
    bound = largest * (first_loss / (lr * steps) + smoothness * lr * rank / 2 + 2 * noise_norm)
    assert sum(norms) / steps <= bound
    # The bound says something: the norm at the start is above it.
    assert norms[0] > bound


# 3. Stability


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
def test_the_error_times_the_information_shrinks_by_the_forgetting(forgetting: float) -> None:
    truth = draw(INPUTS, OUTPUTS, seed=1)
    belief = Belief(draw(INPUTS, OUTPUTS, seed=2), positive(INPUTS, seed=3))
    start = torch.linalg.solve(belief.covariance, belief.mean - truth)
    for step in range(1, 21):
        h = draw(3, INPUTS, seed=step)
        belief = predict(belief, forgetting=forgetting)
        belief = update_by_information(belief, h, h @ truth, torch.eye(3, dtype=torch.float64))
        left = torch.linalg.solve(belief.covariance, belief.mean - truth)
        assert torch.allclose(left, start * forgetting**step, atol=1e-9)


def error_after(lr: float, forgetting: float, steps: int, noise: float = 1.0, prior: float = 1.0) -> float:
    """Largest error of ``method="exact"`` where every batch has the same inputs, over that of the start."""
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.float64)
    truth, start = draw(OUTPUTS, INPUTS, seed=5), draw(OUTPUTS, INPUTS, seed=6)
    group = {"params": [layer.weight], "method": "exact", "forgetting": forgetting, "noise": noise, "prior": prior}
    optimizer = Kalma([group], lr=lr)
    optimizer.attach(layer)
    with torch.no_grad():
        layer.weight.copy_(start)
    inputs = draw(20, INPUTS, seed=7)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(inputs) - inputs @ truth.mT).square().sum().div(2).backward()
        optimizer.step()
    return float((layer.weight.detach() - truth).abs().max() / (start - truth).abs().max())


@pytest.mark.parametrize("lr", [0.1, 1.0, 1.9])
def test_below_two_it_contracts_whatever_the_forgetting(lr: float) -> None:
    for forgetting in (0.5, 0.9, 0.99):
        assert error_after(lr, forgetting, 400) < 0.5


def test_the_limit_in_the_long_run_is_two_over_one_minus_forgetting() -> None:
    limit = 2 / (1 - 0.9)
    assert error_after(0.95 * limit, 0.9, 600) < 1e-3
    assert error_after(1.05 * limit, 0.9, 600) > 1e3


def test_the_noise_matters_only_against_the_prior() -> None:
    one, other = error_after(1.0, 0.95, 7), error_after(1.0, 0.95, 7, noise=50.0, prior=1 / 50.0)
    assert one != pytest.approx(other, rel=1e-3)
    assert one == pytest.approx(error_after(1.0, 0.95, 7, noise=50.0, prior=50.0), rel=1e-6)


# 4. Invariance


def test_an_orthogonal_change_of_outputs_turns_the_step() -> None:
    gradient, p, turn = draw(OUTPUTS, INPUTS, seed=1), positive(INPUTS, seed=2), rotation(OUTPUTS, seed=3)
    assert torch.allclose(polar(turn @ gradient @ p), turn @ polar(gradient @ p), atol=1e-10)
    assert torch.allclose(newton_schulz(turn @ gradient @ p), turn.float() @ newton_schulz(gradient @ p), atol=1e-4)


def test_an_invertible_change_of_inputs_does_not_change_what_the_unwhitened_step_does() -> None:
    inputs, errors, change = draw(40, INPUTS, seed=1), draw(40, OUTPUTS, seed=2), positive(INPUTS, seed=3)

    def change_of_outputs(h: Tensor) -> Tensor:
        step = errors.mT @ h @ torch.linalg.inv(h.mT @ h)
        return h @ step.mT

    assert torch.allclose(change_of_outputs(inputs), change_of_outputs(inputs @ change.mT), atol=1e-10)


def test_the_whitened_step_is_invariant_under_rotations_of_the_inputs_only() -> None:
    inputs, errors = draw(40, INPUTS, seed=1), draw(40, OUTPUTS, seed=2)

    def change_of_outputs(h: Tensor) -> Tensor:
        return h @ polar(errors.mT @ h @ torch.linalg.inv(h.mT @ h)).mT

    turned = inputs @ rotation(INPUTS, seed=3).mT
    assert torch.allclose(change_of_outputs(inputs), change_of_outputs(turned), atol=1e-10)
    stretched = inputs @ positive(INPUTS, seed=4).mT
    assert not torch.allclose(change_of_outputs(inputs), change_of_outputs(stretched), atol=1e-2)


# 5. What the whitening gives up


def test_the_whitened_step_does_not_grow_with_the_innovation() -> None:
    gradient, p = draw(OUTPUTS, INPUTS, seed=1), positive(INPUTS, seed=2)
    assert torch.allclose(polar(gradient @ p), polar(1e-3 * gradient @ p), atol=1e-10)


def test_at_a_constant_rate_the_whitened_step_does_not_settle_where_the_filter_does() -> None:
    weight, hessian = draw(OUTPUTS, INPUTS, seed=1), positive(INPUTS, seed=2)
    p = torch.linalg.inv(hessian)
    whitened = weight.clone()
    for _ in range(500):
        whitened -= 0.1 * polar(whitened @ hessian @ p)
    assert torch.allclose(weight - weight @ hessian @ p, torch.zeros_like(weight), atol=1e-10)
    assert whitened.norm() > 0.05


def test_the_whitened_step_gives_noise_as_much_as_signal() -> None:
    left, right = rotation(OUTPUTS, seed=1), rotation(OUTPUTS, seed=2)
    signal = left[:, :1] @ right[:1]
    noisy = signal + 1e-3 * left[:, 1:] @ right[1:]
    assert torch.linalg.svdvals(polar(noisy)).tolist() == pytest.approx([1.0] * OUTPUTS)
