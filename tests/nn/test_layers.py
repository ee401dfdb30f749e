"""Norms, rotary positions, the short convolution, the feed-forward and the sliced loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kalmagrove.nn import loss as loss_module
from kalmagrove.nn.layers import FeedForward, RMSNorm, RotaryEmbedding, ShortConvolution, make_norm
from kalmagrove.nn.loss import linear_cross_entropy


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(6, eps=0.0)
    x = torch.randn(2, 3, 6)
    assert torch.allclose(norm(x), x / x.square().mean(-1, keepdim=True).sqrt(), atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> float:
        return float((rotary(q, torch.tensor([query_at])) * rotary(k, torch.tensor([key_at]))).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_rotary_needs_an_even_head() -> None:
    with pytest.raises(ValueError, match="head_dim must be even"):
        RotaryEmbedding(7)


def test_the_short_convolution_starts_as_the_identity_and_equals_conv1d() -> None:
    convolution = ShortConvolution(5, 4)
    x = torch.randn(2, 9, 5)
    assert torch.equal(convolution(x)[0], x)
    convolution.weight.data.normal_()
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), convolution.weight, groups=5).transpose(1, 2)
    assert torch.allclose(convolution(x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "relu2"])
def test_the_feed_forward_is_what_its_name_says(kind: str) -> None:
    layer = FeedForward(6, 10, kind, lambda name, n_in, n_out: nn.Linear(n_in, n_out, bias=False))  # type: ignore[arg-type]
    x = torch.randn(3, 6)
    up = layer.up_proj(x)
    hidden = {
        "gelu": lambda: F.gelu(up, approximate="tanh"),
        "swiglu": lambda: F.silu(layer.gate_proj(x)) * up,
        "relu2": lambda: F.relu(up) ** 2,
    }[kind]()
    assert torch.allclose(layer(x), layer.down_proj(hidden))
    assert hasattr(layer, "gate_proj") == (kind == "swiglu")


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "relu2"])
def test_what_changes_the_hidden_units_in_place_is_in_the_gradients(kind: str) -> None:
    def gradients(*, inplace: bool) -> list[torch.Tensor]:
        def linear(name: str, n_in: int, n_out: int) -> nn.Module:
            layer = nn.Linear(n_in, n_out)
            return nn.Sequential(nn.Dropout(0.5, inplace=inplace), layer) if name == "down_proj" else layer

        torch.manual_seed(0)
        layer = FeedForward(6, 10, kind, linear)  # type: ignore[arg-type]
        layer(torch.randn(7, 6)).square().sum().backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    for changed, plain in zip(gradients(inplace=True), gradients(inplace=False), strict=True):
        assert torch.allclose(changed, plain, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_sliced_loss_and_its_gradients_equal_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "ROWS", rows)
    hidden = torch.randn(13, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(0, 11, (13,))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected * 0.7, (hidden, weight))
    actual = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(actual * 0.7, (hidden, weight))
    assert torch.allclose(actual, expected)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_sliced_loss_in_bfloat16_is_as_near_as_its_logits() -> None:
    hidden, weight = torch.randn(600, 16), torch.randn(300, 16) * 0.5
    targets = torch.randint(0, 300, (600,))
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_cross_entropy(hidden, weight, targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_the_loss_in_bfloat16_still_teaches_where_the_model_is_sure() -> None:
    hidden = torch.eye(4, 64).bfloat16().requires_grad_()
    weight, targets = (torch.eye(64) * 11).bfloat16(), torch.arange(4)
    exact = hidden.detach().float().requires_grad_()
    expected = F.cross_entropy(exact @ weight.float().T, targets, reduction="sum")
    actual = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=0)
    (own,), (plain,) = torch.autograd.grad(actual, hidden), torch.autograd.grad(expected, exact)
    assert (own.float() - plain).norm() < 1e-2 * plain.norm()


def test_the_sliced_loss_without_gradients() -> None:
    hidden, weight, targets = torch.randn(5, 6), torch.randn(11, 6), torch.randint(0, 11, (5,))
    with torch.no_grad():
        assert torch.allclose(
            linear_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        )


def test_a_feed_forward_or_a_norm_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be gelu, swiglu or relu2, got 'relu'"):
        FeedForward(6, 10, "relu", lambda name, n_in, n_out: nn.Linear(n_in, n_out))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind must be rmsnorm or layernorm, got 'rms'"):
        make_norm("rms", 6, 1e-5)  # type: ignore[arg-type]
