"""Kalma: its algebra, its contract as an optimiser, and that it learns."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from kalmagrove.models.build import build_model, model_config
from kalmagrove.optim.curvature import damped_inverse
from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.kalma import Kalma
from kalmagrove.optim.kalman import Belief, predict, update_by_gain
from kalmagrove.optim.whitening import eigenbasis

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8, "max_position_embeddings": 40}


def test_one_step_is_the_formula() -> None:
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(4, 6))
    layer = nn.Linear(6, 4, bias=False)
    layer.weight = weight
    x = torch.randn(3, 50, 6)
    optimizer = Kalma([weight], lr=0.1, weight_decay=0.2, momentum=0.8, damping=0.3, refresh_every=1, turn_every=2)
    optimizer.attach(layer)
    expected = Formula(weight.detach().double(), momentum=0.8, variance_decay=0.99, covariance_decay=0.95)
    for step in range(3):
        optimizer.zero_grad()
        layer(x[step]).square().mean().backward()
        update = expected.update(weight.grad.double(), x[step].double(), turn=step == 2)
        before = weight.detach().clone()
        optimizer.step()
        assert torch.allclose(weight, before * (1 - 0.1 * 0.2) - 0.1 * update.float(), atol=2e-4), step
        assert update.norm() > 1


class Formula:
    """The step as the documentation writes it, for one matrix, with eigenvectors and QR of full precision."""

    def __init__(
        self, weight: torch.Tensor, *, momentum: float, variance_decay: float, covariance_decay: float
    ) -> None:
        self.momentum, self.variance_decay, self.covariance_decay = momentum, variance_decay, covariance_decay
        self.step = 0
        self.m = self.v = torch.zeros_like(weight)

    def update(self, gradient: torch.Tensor, inputs: torch.Tensor, *, turn: bool) -> torch.Tensor:
        self.step += 1
        mu, memory = self.momentum, self.covariance_decay
        c = inputs.T @ inputs / len(inputs)
        self.c = c if self.step == 1 else memory * self.c + (1 - memory) * c
        p = damped_inverse(self.c, 0.3)
        self.m = mu * self.m + (1 - mu) * gradient
        innovation = ((1 - mu) * gradient + mu * self.m) / (1 - mu ** (self.step + 1)) @ p
        seen = gradient @ p
        if self.step == 1:
            self.left, self.right = seen @ seen.T, seen.T @ seen
            self.q_left, self.q_right = eigenbasis(self.left), eigenbasis(self.right)
        else:
            self.left = memory * self.left + (1 - memory) * seen @ seen.T
            self.right = memory * self.right + (1 - memory) * seen.T @ seen
        if turn:
            self.q_left, self.q_right = positive_qr(self.left @ self.q_left), positive_qr(self.right @ self.q_right)
        turned = self.q_left.T @ seen @ self.q_right
        self.v = self.variance_decay * self.v + (1 - self.variance_decay) * turned.square()
        variance = self.v / (1 - self.variance_decay**self.step)
        variance = variance + 0.01 * variance.mean()
        return self.q_left @ (self.q_left.T @ innovation @ self.q_right / variance.sqrt()) @ self.q_right.T


def positive_qr(matrix: torch.Tensor) -> torch.Tensor:
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal().sign()


def test_a_table_with_one_column_is_adam_with_look_ahead() -> None:
    """A basis of one axis turns nothing, so the step is NAdam's without its schedule."""
    table = nn.Parameter(torch.ones(5, 1))
    optimizer = Kalma([{"params": [table], "method": "table"}], lr=0.1, weight_decay=0.0, momentum=0.9)
    expected, m, v = torch.ones(5, 1), torch.zeros(5, 1), torch.zeros(5, 1)
    for step in range(1, 5):
        gradient = torch.randn(5, 1, generator=torch.Generator().manual_seed(step))
        table.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient.square()
        lookahead = (0.1 * gradient + 0.9 * m) / (1 - 0.9 ** (step + 1))
        variance = v / (1 - 0.99**step)
        variance += 0.01 * variance.mean()
        expected -= 0.1 * lookahead / variance.sqrt()
        assert torch.allclose(table, expected, atol=1e-5)


def test_vectors_are_trained_by_exactly_adamw() -> None:
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    kalma = Kalma([{"params": [ours], "method": "adamw", "lr": 0.01, "weight_decay": 0.1}], betas=(0.8, 0.9))
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    for step in range(6):
        ours.grad = torch.full((5,), float(step - 2))
        theirs.grad = ours.grad.clone()
        kalma.step()
        adamw.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be in"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"damping": float("nan")}, "damping must be positive"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"refresh_every": 0}, "refresh_every must be at least 1"),
        ({"turn_every": 0}, "turn_every must be at least 1"),
        ({"variance_decay": 1.0}, "variance_decay must be in"),
        ({"covariance_decay": -0.1}, "covariance_decay must be in"),
        ({"eps": -1e-8}, "eps must be in"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kalma([nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("noise", 0.0, "noise must be positive"),
        ("prior", -1.0, "prior must be positive"),
        ("forgetting", 2.0, r"forgetting must be in \(0, 1\]"),
        ("forgetting", 0.0, r"forgetting must be in \(0, 1\]"),
    ],
)
def test_numbers_of_the_filter_out_of_range_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kalma([{"params": [nn.Parameter(torch.ones(2, 2))], "method": "exact", name: value}])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_matrix_without_a_number_is_passed_by(shape: tuple[int, int]) -> None:
    empty, other = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.ones(2, 3))
    optimizer = Kalma([empty, other])
    for parameter in (empty, other):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(other, torch.ones(2, 3))


def test_a_method_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a matrix has at least 2 axes, got shape \(3,\); use adamw"):
        Kalma([{"params": [nn.Parameter(torch.ones(3))], "method": "kalma"}])
    with pytest.raises(ValueError, match="method must be one of kalma, table, adamw, exact, got 'sgd'"):
        Kalma([{"params": [nn.Parameter(torch.ones(3))], "method": "sgd"}])


def training(model: nn.Module, optimizer: Kalma, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 99, (2, 14), generator=torch.Generator().manual_seed(step))
        loss = model.token_loss_sum(ids[:, :-1], ids[:, 1:]) / 26  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def attached(seed: int = 0) -> tuple[nn.Module, Kalma]:
    model = build_model(model_config("kalmagrove", SIZES), seed)
    optimizer = Kalma(kalma_groups(model), refresh_every=3)
    optimizer.attach(model)
    return model, optimizer


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_state_dict_resumes_bit_for_bit(stop: int) -> None:
    model, optimizer = attached()
    unbroken = training(model, optimizer, range(8))
    first, first_optimizer = attached()
    losses = training(first, first_optimizer, range(stop))
    second, second_optimizer = attached(seed=9)
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    losses += training(second, second_optimizer, range(stop, 8))
    assert losses == unbroken
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_statistics_stay_float32_when_parameters_are_bfloat16() -> None:
    parameter = nn.Parameter(torch.randn(4, 6).bfloat16())
    optimizer = Kalma([parameter])
    parameter.grad = torch.randn(4, 6).bfloat16()
    optimizer.step()
    loaded = Kalma([parameter])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tensors = {k: v for k, v in loaded.state[parameter].items() if isinstance(v, torch.Tensor)}
    bases = {f"{side}_{kind}" for side in ("left", "right") for kind in ("covariance", "basis")}
    assert tensors.keys() == {"momentum", "variance", *bases}
    for name, value in tensors.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, optimizer.state[parameter][name])


def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone_and_warns() -> None:
    good, bad = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = Kalma([good, bad])
    good.grad, bad.grad = torch.randn(3, 4), torch.full((3, 4), float("nan"))
    with pytest.warns(RuntimeWarning, match=r"the gradient of a parameter of shape \(3, 4\) is not finite"):
        optimizer.step()
    assert torch.equal(bad, torch.ones(3, 4)) and not torch.equal(good, torch.ones(3, 4))


def test_zero_and_missing_gradients_are_harmless() -> None:
    zero, missing = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = Kalma([zero, missing], weight_decay=0.0)
    zero.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(zero, torch.ones(3, 4)) and torch.equal(missing, torch.ones(3, 4))


def test_a_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = Kalma([parameter])

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 12.0
    assert not torch.equal(parameter, torch.ones(3, 4))


def test_it_is_deterministic() -> None:
    runs = [training(*attached(), range(5)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_it_solves_a_rotated_ill_conditioned_layer_in_fewer_steps_than_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    x = (torch.randn(400, 12, generator=generator) * scales) @ rotation
    target = torch.randn(5, 12, generator=generator)

    def final_loss(make: Any) -> float:
        layer = nn.Linear(12, 5, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = make(layer)
        for step in range(150):
            for group in optimizer.param_groups:
                group["lr"] = group.get("peak", group["lr"]) * (1 - step / 150)
            optimizer.zero_grad()
            loss = (layer(x) - x @ target.T).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    def kalma(layer: nn.Linear) -> Kalma:
        optimizer = Kalma([{"params": [layer.weight], "peak": 0.2, "weight_decay": 0.0}], lr=0.2, damping=1e-4)
        optimizer.attach(layer)
        return optimizer

    best_adamw = min(
        final_loss(
            lambda layer, lr=lr: torch.optim.AdamW([{"params": [layer.weight], "peak": lr}], lr=lr, weight_decay=0.0)
        )
        for lr in (0.01, 0.03, 0.1, 0.3)
    )
    assert final_loss(kalma) < 0.5 * best_adamw


@pytest.mark.parametrize("portions", [[30], [1] * 30, [7, 3, 20]], ids=str)
@pytest.mark.parametrize("forgetting", [1.0, 0.95])
def test_the_exact_method_is_the_kalman_filter(portions: list[int], forgetting: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    z = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False).double()
    belief = Belief(layer.weight.detach().T.clone(), 5.0 * torch.eye(6, dtype=torch.float64))
    optimizer = Kalma(
        [
            {"params": [layer.weight], "method": "exact", "lr": 1.0, "noise": 0.3, "prior": 5.0 * forgetting,
             "forgetting": forgetting}
        ]
    )  # fmt: skip
    optimizer.attach(layer)
    start = 0
    for portion in portions:
        rows = slice(start, start + portion)
        start += portion
        optimizer.zero_grad()
        (0.5 * (layer(x[rows]) - z[rows]).square().sum()).backward()
        optimizer.step()
        belief = update_by_gain(belief, x[rows], z[rows], 0.3 * torch.eye(portion, dtype=torch.float64))
        assert torch.allclose(layer.weight.T, belief.mean, atol=1e-9)
        belief = predict(belief, forgetting=forgetting)


def test_the_exact_method_solves_least_squares_in_one_step() -> None:
    x, z = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False).double()
    optimizer = Kalma([{"params": [layer.weight], "method": "exact", "lr": 1.0, "prior": 1e9}])
    optimizer.attach(layer)
    (0.5 * (layer(x) - z).square().sum()).backward()
    optimizer.step()
    assert torch.allclose(layer.weight.T, torch.linalg.lstsq(x, z).solution, atol=1e-6)


def test_the_exact_method_sees_every_row_and_goes_on_from_its_state() -> None:
    # More rows than the other methods look at, in two portions, the second of them by another optimiser.
    x, z = torch.randn(6000, 6, dtype=torch.float64), torch.randn(6000, 4, dtype=torch.float64)
    layer, state = nn.Linear(6, 4, bias=False).double(), None
    for rows in (slice(0, 3000), slice(3000, 6000)):
        optimizer = Kalma([{"params": [layer.weight], "method": "exact", "lr": 1.0, "prior": 1e9}])
        optimizer.attach(layer)
        if state is not None:
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        (0.5 * (layer(x[rows]) - z[rows]).square().sum()).backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.detach()
    assert torch.allclose(layer.weight.T, torch.linalg.lstsq(x, z).solution, atol=1e-6)


def test_the_exact_method_needs_the_inputs() -> None:
    layer = nn.Linear(6, 4, bias=False)
    optimizer = Kalma([{"params": [layer.weight], "method": "exact", "lr": 1.0}])
    layer(torch.randn(3, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"call attach\(model\) before the forward"):
        optimizer.step()


def test_a_mixed_group_without_a_method_is_refused() -> None:
    with pytest.raises(ValueError, match="matrices and vectors needs to be divided"):
        Kalma([{"params": [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))]}])
    with pytest.raises(ValueError, match="weight_decay must be in"):
        Kalma([{"params": [nn.Parameter(torch.ones(3, 4))], "weight_decay": -1.0}])


def test_a_deep_copy_steps_on_its_own() -> None:
    model, optimizer = attached()
    training(model, optimizer, range(2))
    copied = copy.deepcopy(optimizer)
    parameter = copied.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    copied.step()
    assert not torch.equal(parameter, before)


def test_attach_counts_every_matrix_of_a_grove_model() -> None:
    model = build_model(model_config("kalmagrove", SIZES), 0)
    groups = kalma_groups(model)
    assert Kalma(groups).attach(model) == len(groups[0]["params"])


def test_scheduler_and_added_group_work() -> None:
    first, second = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))
    optimizer = Kalma([first], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group({"params": [second], "lr": 0.01})
    assert [group["method"] for group in optimizer.param_groups] == ["kalma", "adamw"]
    first.grad, second.grad = torch.ones(3, 4), torch.ones(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
