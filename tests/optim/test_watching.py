"""What Kalma says, and does not do, where a model is watched in an unusual way."""

import copy
import warnings

import pytest
import torch
from torch import nn

from kalmagrove.nn.grove import GroveBank, GroveLinear
from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.kalma import Kalma


def two_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def step(model: nn.Module, optimizer: Kalma) -> None:
    optimizer.zero_grad()
    model(torch.randn(16, 6)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_grove_in_sixteen_bits_has_p(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    bank = GroveBank(8, 6, num_layers=2, group_size=2, sharing="cycle", rank_axis=0)
    model = nn.ModuleList([bank, GroveLinear(6, 8, 8, left="identity", right=bank.of_layer(0))]).to(kind)
    optimizer = Kalma(kalma_groups(model))
    optimizer.attach(model)
    model[1](torch.randn(5, 6).to(kind)).float().square().mean().backward()
    optimizer.step()
    gains = [state["gain"] for state in optimizer.state.values() if "gain" in state]
    assert gains and all(gain.dtype == torch.float32 and gain.isfinite().all() for gain in gains)


def test_a_group_that_is_added_to_a_watched_model_is_said_to_have_no_p() -> None:
    model = two_layers()
    optimizer = Kalma([model[0].weight])
    optimizer.attach(model)
    with pytest.warns(RuntimeWarning, match=r"added after attach\(model\); attach again"):
        optimizer.add_param_group({"params": [model[2].weight]})
    assert optimizer.attach(model) == 2
    step(model, optimizer)
    assert all("gain" in optimizer.state[model[place].weight] for place in (0, 2))


def test_matrices_of_another_model_are_said_to_have_no_p() -> None:
    first, second = two_layers(), two_layers(1)
    optimizer = Kalma([*first.named_parameters(prefix="first"), *second.named_parameters(prefix="second")])
    with pytest.warns(
        RuntimeWarning, match=r"no layer shows the inputs of second\.0\.weight, second\.2\.weight; there"
    ):
        assert optimizer.attach(first) == 2


def test_a_model_in_evaluation_mode_is_said_to_show_nothing() -> None:
    model = two_layers().eval()
    optimizer = Kalma(kalma_groups(model))
    optimizer.attach(model)
    with pytest.warns(RuntimeWarning, match=r"inputs of 0\.weight, 2\.weight were not seen before this step"):
        step(model, optimizer)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            step(model, optimizer)
    assert "gain" in optimizer.state[model[0].weight]


def test_gradients_of_each_sample_leave_a_watched_model_alone() -> None:
    model = two_layers()
    optimizer = Kalma(kalma_groups(model), refresh_every=1)
    optimizer.attach(model)
    step(model, optimizer)
    before = optimizer.state[model[0].weight]["covariance"].clone()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, given, (x,)).square().mean()

    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.randn(5, 6))
    for name, parameter in model.named_parameters():
        parameter.grad = samples[name].mean(0)
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["covariance"], before)


def test_the_first_group_may_be_empty() -> None:
    model = two_layers()
    optimizer = Kalma([{"params": []}, {"params": [model[0].weight, model[2].weight]}])
    optimizer.attach(model)
    before = model[0].weight.clone()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)


def test_a_copy_of_a_watched_model_trains_alone_and_is_not_watched() -> None:
    model = two_layers()
    optimizer = Kalma(kalma_groups(model), refresh_every=1)
    optimizer.attach(model)
    loss = model(torch.randn(16, 6)).square().mean()
    twin = copy.deepcopy(model)
    twin(torch.full((16, 6), 1e3)).square().mean().backward()
    loss.backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["covariance"].max() < 10


def test_wide_gradients_of_float16_are_finite() -> None:
    parameter = nn.Parameter(torch.zeros(400, 400, dtype=torch.float16))
    optimizer = Kalma([parameter])
    parameter.grad = 200 * torch.randn(400, 400).sign().half()
    before = parameter.detach().clone()
    optimizer.step()
    assert not torch.equal(parameter, before) and parameter.isfinite().all()


@pytest.mark.parametrize("after", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("before", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_state_goes_on_in_another_type(before: torch.dtype, after: torch.dtype) -> None:
    def model_of(kind: torch.dtype) -> tuple[nn.Module, Kalma]:
        model = two_layers().to(kind)
        optimizer = Kalma(kalma_groups(model), refresh_every=1)
        optimizer.attach(model)
        return model, optimizer

    def one_step(model: nn.Module, optimizer: Kalma, kind: torch.dtype) -> None:
        optimizer.zero_grad()
        model(torch.randn(16, 6).to(kind)).float().square().mean().backward()
        optimizer.step()

    first, saved = model_of(before)
    one_step(first, saved, before)
    second, resumed = model_of(after)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    one_step(second, resumed, after)
    assert all(parameter.isfinite().all() for parameter in second.parameters())
    kinds = {value.dtype for state in resumed.state.values() for name, value in state.items() if name == "momentum"}
    assert kinds == {torch.promote_types(after, torch.float32)}
