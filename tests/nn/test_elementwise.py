"""Gradients by hand against autograd's, in float64, and what the functions promise of types."""

import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from kalmagrove.nn import elementwise
from kalmagrove.nn.elementwise import (
    depthwise_convolution,
    made_again,
    rms_norm,
    rotate_halves,
    squared_relu,
    weighted_sum,
)
from kalmagrove.nn.layers import FeedForward


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_equal_with_gradients(own: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    weights = torch.randn(own.shape, dtype=own.dtype)
    gradients = (torch.autograd.grad(y, inputs, weights) for y in (own, plain))
    for ours, theirs in ((own, plain), *zip(*gradients, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape: tuple[int, ...], weighted: bool) -> None:
    x, weight = draw(*shape), draw(7) if weighted else None
    plain = torch.nn.functional.rms_norm(x, (7,), weight, 1e-3)
    inputs = [x] if weight is None else [x, weight]
    assert_equal_with_gradients(rms_norm(x, weight, 1e-3), plain, inputs)


def test_rms_norm_of_transposed_heads() -> None:
    x = draw(2, 5, 3, 8).transpose(1, 2).detach().requires_grad_()
    assert_equal_with_gradients(rms_norm(x, None, 1e-6), torch.nn.functional.rms_norm(x, (8,), None, 1e-6), [x])


def test_rms_norm_gives_autocasts_type_and_its_gradients_the_inputs() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        normed = rms_norm(x, weight, 1e-5)
    assert normed.dtype == torch.bfloat16
    normed.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert rms_norm(x, weight, 1e-5).dtype == torch.float32
    torch.testing.assert_close(normed.float(), rms_norm(x, weight, 1e-5), atol=2e-2, rtol=1e-2)


def test_squared_relu() -> None:
    x = draw(5, 9)
    squared, again = squared_relu(x)
    assert torch.equal(again(), squared)
    assert_equal_with_gradients(squared, torch.relu(x).square(), [x])


@pytest.mark.parametrize("first", [1.0, -0.3, 0.01])
def test_weighted_sum(first: float) -> None:
    x, y = draw(3, 4, 5), draw(3, 4, 5)
    weights = torch.tensor([first, 0.7], dtype=torch.float64, requires_grad=True)
    assert_equal_with_gradients(weighted_sum(x, y, weights), weights[0] * x + weights[1] * y, [x, y, weights])


def test_a_weighted_sum_with_a_weight_of_zero_has_finite_gradients() -> None:
    x, y = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    weights = torch.tensor([0.0, 1.0], requires_grad=True)
    weighted_sum(x, y, weights).sum().backward()
    assert weights.grad is not None and weights.grad[0] == 0
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, y, weights))


def test_a_product_makes_its_input_again_instead_of_keeping_it() -> None:
    x, weight = draw(6, 5), draw(4, 5)
    kept = []
    outcomes = []

    def look_on(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    look_on.only_looks_on = True  # type: ignore[attr-defined]
    for keeps in (True, False):
        squared, again = squared_relu(x)
        with torch.autograd.graph.saved_tensors_hooks(look_on, lambda t: t):
            if keeps:
                product = squared @ weight.T
                assert len(kept) == 2
            else:
                with made_again(squared, again):
                    product = squared @ weight.T
                assert len(kept) == 3
        outcomes.append([product, *torch.autograd.grad(product.sin().sum(), [x, weight])])
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def test_a_small_first_weight_has_autograds_gradient_in_single_precision() -> None:
    x, y, slope = torch.randn(3, 400, 16)
    weights = torch.tensor([1e-4, 0.7], requires_grad=True)
    (own,) = torch.autograd.grad(weighted_sum(x, y, weights), weights, slope)
    torch.testing.assert_close(own[0], (slope * x).sum(), atol=0.2, rtol=0)


def test_what_is_kept_in_another_form_is_kept() -> None:
    x, weight = draw(6, 6), draw(6, 6)
    squared, again = squared_relu(x)
    with made_again(squared, again):
        product = (weight @ squared.mT).mT
    plain = (weight @ torch.relu(x).square().mT).mT
    assert_equal_with_gradients(product, plain, [x, weight])


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "relu2"])
def test_activation_checkpointing_frees_a_feed_forward(kind: str) -> None:
    torch.manual_seed(0)
    layer = FeedForward(6, 50, kind, lambda _, n_in, n_out: nn.Linear(n_in, n_out, bias=False))  # type: ignore[arg-type]
    made: list[weakref.ref[Tensor]] = []
    layer.up_proj.register_forward_hook(lambda _module, _inputs, output: made.append(weakref.ref(output)))
    layer.down_proj.register_forward_pre_hook(lambda _module, inputs: made.append(weakref.ref(inputs[0])))
    y = torch.utils.checkpoint.checkpoint(layer, torch.randn(40, 6, requires_grad=True), use_reentrant=False)
    assert len(made) == 2 and all(tensor() is None for tensor in made)
    y.sum().backward()


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "relu2"])
def test_a_feed_forward_keeps_no_hidden_units_and_has_the_same_gradients(kind: str) -> None:
    torch.manual_seed(0)
    layer = FeedForward(6, 10, kind, lambda _, n_in, n_out: nn.Linear(n_in, n_out, bias=False)).double()  # type: ignore[arg-type]
    x = draw(2, 7, 6)
    outcomes = []
    for by_hand in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not by_hand:
                patch.setattr(elementwise, "is_by_hand", lambda _: False)
            y = layer(x)
            outcomes.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_rotate_halves(transposed: bool) -> None:
    x = draw(2, 3, 5, 8)
    x = x.detach().transpose(1, 2).requires_grad_() if transposed else x
    angles = torch.randn(x.shape[2], 4, dtype=torch.float64)
    complex_numbers = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    plain = torch.cat((complex_numbers.real, complex_numbers.imag), dim=-1)
    assert_equal_with_gradients(rotate_halves(x, angles.cos(), angles.sin()), plain, [x])


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_depthwise_convolution(kernel_size: int) -> None:
    padded, taps = draw(2, 6 + kernel_size - 1, 3), draw(kernel_size, 3)
    for convolve in (depthwise_convolution, elementwise._convolve):
        plain = torch.nn.functional.conv1d(padded.mT, taps.T.unsqueeze(1), groups=3).mT
        assert_equal_with_gradients(convolve(padded, taps), plain, [padded, taps])


def test_second_derivatives_are_refused_and_transforms_take_the_plain_form() -> None:
    x = draw(3, 8)
    for function in (lambda y: squared_relu(y)[0], lambda y: rms_norm(y, None, 1e-5)):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
        (gradient,) = torch.autograd.grad(function(x).pow(2).sum(), x)
        transformed = torch.func.grad(lambda y, function=function: function(y).pow(2).sum())(x.detach())
        torch.testing.assert_close(transformed, gradient.detach())


def test_without_data_nothing_is_asked_of_autocast() -> None:
    assert rms_norm(torch.empty(2, 8, device="meta"), None, 1e-5).shape == (2, 8)
