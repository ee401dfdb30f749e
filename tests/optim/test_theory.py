"""The claims of docs/theory/kalma.md, by number. All in float64 unless the claim is about the optimiser itself."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kalmagrove.optim.kalma import Kalma
from kalmagrove.optim.kalman import Belief, predict, update_by_information
from kalmagrove.optim.whitening import PartState, Whitening, followed_basis

INPUTS, OUTPUTS = 6, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size: int, seed: int) -> Tensor:
    factor = draw(size, size + 2, seed=seed)
    return factor @ factor.mT / size + 0.1 * torch.eye(size, dtype=torch.float64)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


def whitened_steps(
    gradients: Sequence[Tensor], state: dict[str, Any] | None = None, floor: float = 0.01
) -> list[Tensor]:
    """U of each gradient in turn, without momentum and P; the bases follow at every step."""
    state = {"step": 0} if state is None else state
    whitening = Whitening(0.99, 0.95, block_size=1024, floor=floor)
    steps = []
    for gradient in gradients:
        state["step"] += 1
        steps.append(whitening.whiten(gradient[None], gradient[None], [PartState(state)], turn=True)[0])
    return steps


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
def test_without_p_every_whitened_step_goes_down(shape: tuple[int, int], seed: int) -> None:
    gradients = [draw(*shape, seed=10 * seed + step) for step in range(6)]
    state: dict[str, Any] = {"step": 0}
    for gradient, step in zip(gradients, whitened_steps(gradients, state), strict=True):
        assert (gradient * step).sum() > 0
    largest = state["variance"].max() / (1 - 0.99**6)
    floor = 0.01 * state["variance"].mean() / (1 - 0.99**6)
    assert (gradient * step).sum() >= gradient.square().sum() / (largest + floor).sqrt()


@pytest.mark.parametrize("seed", range(5))
def test_with_p_it_goes_down_by_at_least_the_bound(seed: int) -> None:
    p, seen = positive(INPUTS, seed=seed) + torch.eye(INPUTS, dtype=torch.float64), draw(OUTPUTS, INPUTS, seed=seed + 9)
    largest, smallest = (float(torch.linalg.eigvalsh(p)[i]) for i in (-1, 0))
    spread = 0.5 * smallest / largest
    row_weights = draw(OUTPUTS, 1, seed=seed + 20).abs() + 0.1
    weights = row_weights * (1 + spread * torch.tanh(draw(OUTPUTS, INPUTS, seed=seed + 30)))
    gradient = seen @ torch.linalg.inv(p)
    bound = (1 / largest - spread / smallest) * (row_weights * seen.square()).sum()
    assert (gradient * (weights * seen)).sum() >= bound > 0


def test_with_p_and_variances_that_differ_more_it_may_go_up() -> None:
    p = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    seen = torch.tensor([[1.0, 0.4]], dtype=torch.float64)
    gradient = seen @ torch.linalg.inv(p)
    assert (gradient * (seen * torch.tensor([[0.01, 1.0]]))).sum() < 0


def test_on_a_smooth_loss_the_mean_of_the_squared_gradients_is_within_the_bound() -> None:
    start, hessian = draw(OUTPUTS, INPUTS, seed=1), positive(INPUTS, seed=2)
    left, right = rotation(OUTPUTS, seed=3), rotation(INPUTS, seed=4)
    roots = 0.5 + draw(OUTPUTS, INPUTS, seed=5).abs()
    a, b = float(roots.min()), float(roots.max())
    smoothness = float(torch.linalg.eigvalsh(hessian)[-1])
    deviation, steps = 0.1, 3000
    lr = 0.2 * a**2 / (b * smoothness)
    weight, squares = start.clone(), []
    for step in range(steps):
        gradient = weight @ hessian
        squares.append(float(gradient.square().sum()))
        noisy = gradient + deviation * draw(OUTPUTS, INPUTS, seed=1000 + step)
        weight -= lr * left @ ((left.mT @ noisy @ right) / roots) @ right.mT
    first_loss = float((start @ hessian * start).sum() / 2)
    variance = deviation**2 * OUTPUTS * INPUTS
    bound = 2 * b * first_loss / (lr * steps) + lr * smoothness * b * variance / a**2
    assert sum(squares) / steps <= bound
    # The bound says something: the gradient at the start is above it.
    assert squares[0] > bound


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
    gradients, turn = [draw(OUTPUTS, INPUTS, seed=seed) for seed in range(5)], rotation(OUTPUTS, seed=9)
    plain: dict[str, Any] = {"step": 0}
    whitened_steps(gradients[:2], plain)
    turned = {name: value.clone() if isinstance(value, Tensor) else value for name, value in plain.items()}
    turned["left_basis"] = turn @ plain["left_basis"]
    turned["left_covariance"] = turn @ plain["left_covariance"] @ turn.mT
    steps = whitened_steps(gradients[2:], plain)
    steps_turned = whitened_steps([turn @ gradient for gradient in gradients[2:]], turned)
    for one, other in zip(steps, steps_turned, strict=True):
        assert torch.allclose(other, turn @ one, atol=1e-8)


def test_following_a_basis_is_equivariant() -> None:
    covariance, basis, turn = positive(5, seed=1), rotation(5, seed=2), rotation(5, seed=3)
    followed = followed_basis(turn @ covariance @ turn.mT, turn @ basis)
    assert torch.allclose(followed, turn @ followed_basis(covariance, basis), atol=1e-10)


def test_an_invertible_change_of_inputs_does_not_change_what_the_unwhitened_step_does() -> None:
    inputs, errors, change = draw(40, INPUTS, seed=1), draw(40, OUTPUTS, seed=2), positive(INPUTS, seed=3)

    def change_of_outputs(h: Tensor) -> Tensor:
        step = errors.mT @ h @ torch.linalg.inv(h.mT @ h)
        return h @ step.mT

    assert torch.allclose(change_of_outputs(inputs), change_of_outputs(inputs @ change.mT), atol=1e-10)


def test_the_whitened_step_is_invariant_under_rotations_of_the_inputs_only() -> None:
    inputs = [draw(40, INPUTS, seed=seed) for seed in range(4)]
    errors = [draw(40, OUTPUTS, seed=10 + seed) for seed in range(4)]

    def change_of_outputs(change: Tensor) -> Tensor:
        """Of the last step, where the first basis of the inputs has turned with them."""
        batches = [h @ change.mT for h in inputs]
        seen = [e.mT @ h @ torch.linalg.inv(h.mT @ h) for h, e in zip(batches, errors, strict=True)]
        state: dict[str, Any] = {"step": 0}
        whitened_steps([e.mT @ h @ torch.linalg.inv(h.mT @ h) for h, e in zip(inputs, errors, strict=True)][:1], state)
        state["right_basis"] = change @ state["right_basis"]
        state["right_covariance"] = change @ state["right_covariance"] @ change.mT
        return batches[-1] @ whitened_steps(seen[1:], state)[-1].mT

    plain = change_of_outputs(torch.eye(INPUTS, dtype=torch.float64))
    assert torch.allclose(plain, change_of_outputs(rotation(INPUTS, seed=3)), atol=1e-8)
    assert not torch.allclose(plain, change_of_outputs(positive(INPUTS, seed=4)), atol=1e-2)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    gradients = [draw(OUTPUTS, INPUTS, seed=seed) for seed in range(5)]
    for plain, scaled in zip(whitened_steps(gradients), whitened_steps([1e-3 * g for g in gradients]), strict=True):
        assert torch.allclose(plain, scaled, atol=1e-9)


# 5. What the whitening gives up


def test_one_large_innovation_makes_no_entry_larger_than_ten() -> None:
    gradients = [draw(OUTPUTS, INPUTS, seed=seed) for seed in range(300)]
    state: dict[str, Any] = {"step": 0}
    whitened_steps(gradients, state, floor=0.0)
    step = whitened_steps([1000 * gradients[0]], state, floor=0.0)[0]
    turned = state["left_basis"][0].mT @ step @ state["right_basis"][0]
    correction = (1 - 0.99**301) ** 0.5
    assert float(turned.abs().max()) <= 10 * correction + 1e-9
    assert float(turned.abs().max()) > 9


def test_at_a_constant_rate_the_whitened_step_does_not_settle_where_the_filter_does() -> None:
    weight, hessian = draw(OUTPUTS, INPUTS, seed=1), positive(INPUTS, seed=2)
    whitened, state, largest = weight.clone(), {"step": 0}, 0.0
    for step in range(800):
        whitened -= 0.1 * whitened_steps([whitened @ hessian], state)[0]
        if step >= 700:
            largest = max(largest, float(whitened.norm()))
    assert torch.allclose(weight - weight @ hessian @ torch.linalg.inv(hessian), torch.zeros_like(weight), atol=1e-10)
    assert largest > 0.01


def test_the_whitened_step_gives_noise_as_much_as_signal() -> None:
    signal = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    signal[0, 0] = 1.0
    gradients = [signal + 1e-2 * draw(OUTPUTS, INPUTS, seed=seed) for seed in range(300)]
    state: dict[str, Any] = {"step": 0}
    sizes = []
    for step in whitened_steps(gradients, state, floor=0.0)[200:]:
        sizes.append((state["left_basis"][0].mT @ step @ state["right_basis"][0]).square())
    mean = torch.stack(sizes).mean(0)
    assert float(mean.max()) < 3 * float(mean.min())
