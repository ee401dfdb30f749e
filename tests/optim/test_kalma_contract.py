"""Kalma beside everything that people put around an optimiser."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.kalma import Kalma

Batch = tuple[torch.Tensor, torch.Tensor]


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int, rows: int = 96) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:].sum(1)], dim=1)


def loss_of(model: nn.Module, data: Batch) -> torch.Tensor:
    return F.mse_loss(model(data[0]), data[1])


def train(model: nn.Module, optimizer: Kalma, steps: range, loss: Callable[..., torch.Tensor] = loss_of) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        value = loss(model, batch(step))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def attached(model: nn.Module, **options: Any) -> Kalma:
    optimizer = Kalma(kalma_groups(model, lr=0.02), refresh_every=3, **options)
    optimizer.attach(model)
    return optimizer


def same(a: nn.Module, b: nn.Module, **tolerance: float) -> bool:
    return all(torch.allclose(p, q, **tolerance) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("bare", ["parameters", "names"])
def test_bare_parameters_without_hooks_train(bare: str) -> None:
    model = perceptron()
    optimizer = Kalma(model.parameters() if bare == "parameters" else model.named_parameters(), lr=0.02)
    losses = train(model, optimizer, range(150))
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_attached_it_trains() -> None:
    model = perceptron()
    losses = train(model, attached(model), range(150))
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_accumulated_micro_batches_are_one_batch() -> None:
    whole, parts = perceptron(), perceptron()
    first, second = attached(whole), attached(parts)
    for step in range(5):
        x, y = batch(step)
        first.zero_grad()
        loss_of(whole, (x, y)).backward()
        first.step()
        second.zero_grad()
        for i, j in zip(x.chunk(3), y.chunk(3), strict=True):
            (loss_of(parts, (i, j)) / 3).backward()
        second.step()
    assert same(whole, parts, atol=2e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    plain, saving = perceptron(), perceptron()

    def checkpointed(model: nn.Module, data: Batch) -> torch.Tensor:
        x = data[0].clone().requires_grad_()
        return F.mse_loss(checkpoint(model, x, use_reentrant=use_reentrant), data[1])

    losses = train(plain, attached(plain), range(5))
    assert train(saving, attached(saving), range(5), checkpointed) == pytest.approx(losses, rel=1e-4)


def test_evaluation_between_steps_changes_nothing() -> None:
    plain, evaluated = perceptron(), perceptron()
    first, second = attached(plain), attached(evaluated)
    train(plain, first, range(4))
    for step in range(4):
        evaluated.eval()
        loss_of(evaluated, batch(99))
        evaluated.train()
        with torch.no_grad():
            loss_of(evaluated, batch(98))
        train(evaluated, second, range(step, step + 1))
    assert same(plain, evaluated, atol=0)


def test_a_saved_state_is_read_without_pickled_code_and_goes_on_bit_for_bit() -> None:
    unbroken, broken = perceptron(), perceptron()
    losses = train(unbroken, attached(unbroken), range(7))
    optimizer = attached(broken)
    first = train(broken, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": broken.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = perceptron(seed=5)
    resumed.load_state_dict(saved["model"])
    second = attached(resumed)
    second.load_state_dict(saved["optimizer"])
    assert first + train(resumed, second, range(4, 7)) == losses
    assert same(unbroken, resumed, atol=0)


def test_a_parameter_without_gradient_at_the_first_step_after_resuming_is_left_alone() -> None:
    model = perceptron()
    optimizer = attached(model)
    train(model, optimizer, range(2))
    resumed = attached(model)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer.zero_grad()
    train(model, resumed, range(2, 4))
    assert torch.equal(model[0].weight, before)


def test_a_state_of_another_model_is_refused_whole() -> None:
    optimizer = attached(perceptron())
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
    other_optimizer = attached(other)
    train(other, other_optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of shape \(9, 6\), but this optimiser has \(16, 6\) in its place"):
        optimizer.load_state_dict(other_optimizer.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_an_older_state_gets_the_new_options() -> None:
    optimizer = Kalma([nn.Parameter(torch.ones(2, 3))])
    state = optimizer.__getstate__()
    del state["param_groups"][0]["block_size"]
    restored = Kalma.__new__(Kalma)
    restored.__setstate__(state)
    assert restored.param_groups[0]["block_size"] == 1024


def test_a_gradient_scaler_skips_the_step_that_overflowed() -> None:
    model = perceptron()
    optimizer = attached(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = model[0].weight.clone()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(step))).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == (step == 1)


def test_it_maximizes() -> None:
    up, down = perceptron(), perceptron()
    train(up, attached(up, maximize=True), range(4), lambda m, d: -loss_of(m, d))
    train(down, attached(down), range(4))
    assert same(up, down, atol=1e-6)


def test_a_learning_rate_may_be_a_tensor() -> None:
    tensor, number = perceptron(), perceptron()
    train(tensor, Kalma(tensor.parameters(), lr=torch.tensor(0.02)), range(3))
    train(number, Kalma(number.parameters(), lr=0.02), range(3))
    assert same(tensor, number, atol=1e-6)


def test_bfloat16_parameters_train() -> None:
    model = perceptron().bfloat16()
    optimizer = attached(model)
    losses = train(model, optimizer, range(60), lambda m, d: F.mse_loss(m(d[0].bfloat16()).float(), d[1]))
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_tied_linear_layers_share_one_covariance() -> None:
    model = perceptron()
    model[5] = nn.Linear(16, 16)
    model[5].weight = model[2].weight
    optimizer = attached(model)
    inputs: list[torch.Tensor] = []
    for layer in (model[2], model[5]):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(batch(0)[0]).square().mean().backward()
    optimizer.step()
    seen = torch.cat(inputs)
    assert torch.allclose(optimizer.state[model[2].weight]["covariance"][0], seen.T @ seen / len(seen), atol=1e-5)


class Residual(nn.Module):
    """A small residual network of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images)
        return self.head((hidden + self.block(hidden)).mean((2, 3)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_train(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = Residual().to(memory_format=memory_format)
    optimizer = Kalma(kalma_groups(model))
    labels = torch.arange(32) % 4
    images = torch.randn(32, 3, 8, 8) + 2 * F.one_hot(labels, 4)[:, :3, None, None]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_attention_that_passes_by_its_layer_has_no_p_and_says_so_once() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, dropout=0.0)
    optimizer = Kalma(kalma_groups(model))
    with pytest.warns(RuntimeWarning, match=r"no layer shows the inputs of self_attn\.in_proj_weight; there is no P"):
        assert optimizer.attach(model) == 3
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(2, 5, 12)).square().mean().backward()
            optimizer.step()
    (only,) = warned
    assert "inputs of self_attn.out_proj.weight were not seen" in str(only.message)
    assert "gain" not in optimizer.state[model.self_attn.out_proj.weight]
    assert "gain" in optimizer.state[model.linear1.weight]


def test_a_layer_that_is_not_used_in_a_refresh_keeps_its_covariance() -> None:
    model = perceptron()
    optimizer = attached(model)
    train(model, optimizer, range(3))
    before = optimizer.state[model[0].weight]["covariance"].clone()
    optimizer.zero_grad()
    hidden = torch.randn(4, 16)
    (model[2:](hidden).sum() + model[0].weight.sum()).backward()
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["covariance"], before)


def test_the_conv1d_of_transformers_is_a_transposed_linear_layer() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    theirs, linear = nn.Sequential(conv1d(4, 6)), nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        linear[0].weight.copy_(theirs[0].weight.T)
        linear[0].bias.copy_(theirs[0].bias)
    for model in (theirs, linear):
        optimizer = attached(model)
        for step in range(2):
            optimizer.zero_grad()
            model(batch(step)[0]).square().mean().backward()
            optimizer.step()
    assert torch.allclose(theirs[0].weight.T, linear[0].weight, atol=2e-3)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (5, 2, 2)])
def test_fused_projections_are_whitened_alone(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(9, 6))
    single = [nn.Parameter(part.clone()) for part in fused.detach().split(sizes)]
    optimizers = [Kalma([{"params": [fused], "split_sizes": sizes}], turn_every=2), Kalma(single, turn_every=2)]
    for step in range(4):
        fused.grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(step))
        fused.grad *= 10.0 ** torch.arange(9)[:, None].div(3).floor()
        for parameter, part in zip(single, fused.grad.split(sizes), strict=True):
            parameter.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(fused, torch.cat(single), atol=1e-5)


def test_stacked_experts_are_whitened_alone() -> None:
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(2, 3, 6))
    single = [nn.Parameter(expert.clone()) for expert in stacked.detach()]
    optimizers = [Kalma([{"params": [stacked], "method": "kalma", "stacked": True}]), Kalma(single)]
    for step in range(4):
        stacked.grad = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(step))
        stacked.grad *= torch.tensor([1.0, 1000.0])[:, None, None]
        for parameter, gradient in zip(single, stacked.grad, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(stacked, torch.stack(list(single)), atol=1e-5)


def test_wide_inputs_are_cut_into_blocks() -> None:
    model = perceptron()
    optimizer = attached(model, block_size=5)
    losses = train(model, optimizer, range(60))
    assert optimizer.state[model[2].weight]["covariance"].shape == (4, 4, 4)
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


# torch's compiler looks at the gradient of what a linear layer's hook was given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_and_a_compiled_step_give_the_same(backend: str) -> None:
    plain, compiled = perceptron(), perceptron()
    losses = train(plain, attached(plain), range(5))
    optimizer = attached(compiled)
    forward = torch.compile(compiled, backend=backend)
    step = torch.compile(optimizer.step, backend=backend)
    result = []
    for number in range(5):
        optimizer.zero_grad()
        value = loss_of(forward, batch(number))
        value.backward()
        step()
        result.append(value.item())
    assert result == pytest.approx(losses, rel=1e-4)
    assert "gain" in optimizer.state[compiled[2].weight]


def test_a_copy_of_model_and_optimizer_goes_its_own_way() -> None:
    model = perceptron()
    optimizer = attached(model)
    train(model, optimizer, range(2))
    both = copy.deepcopy({"model": model, "optimizer": optimizer})
    assert both["optimizer"].param_groups[0]["params"][0] is both["model"][0].weight
    before = [p.clone() for p in model.parameters()]
    both["optimizer"].attach(both["model"])
    train(both["model"], both["optimizer"], range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_all_zero_weights_stay_finite() -> None:
    model = perceptron()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    train(model, attached(model), range(3))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 5)])
def test_narrow_matrices_step(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = Kalma([parameter])
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert bool(parameter.isfinite().all()) and not torch.equal(parameter, torch.ones(shape))


def test_an_embedding_among_the_matrices_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"0\.weight is an embedding or a head.*kalma_groups\(model\)"):
        Kalma(model.parameters()).attach(model)


def test_another_model_is_refused() -> None:
    optimizer = Kalma(perceptron().parameters())
    with pytest.raises(ValueError, match="attach the model whose parameters the optimiser was made with"):
        optimizer.attach(perceptron())
    with pytest.raises(RuntimeError, match=r"count_tokens needs attach\(model\)"):
        optimizer.count_tokens(None)


def test_a_transposed_layer_in_a_plain_group_is_refused() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(4, 6))
    with pytest.raises(ValueError, match=r"0\.weight is stored as \(inputs, outputs\)"):
        Kalma(model.parameters()).attach(model)


def test_sparse_complex_and_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Kalma([])
    with pytest.raises(ValueError, match="dense real parameters"):
        Kalma([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    table = nn.Embedding(9, 6, sparse=True)
    optimizer = Kalma([{"params": table.parameters(), "method": "adamw"}])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="cannot use sparse gradients"):
        optimizer.step()


def test_a_refused_group_is_not_added() -> None:
    optimizer = Kalma([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="lr must be in"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_padding_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = attached(model)
    x, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    optimizer.count_tokens(mask)
    model(x).square().mean().backward()
    optimizer.step()
    kept = x[mask.bool()]
    assert torch.allclose(optimizer.state[model[0].weight]["covariance"][0], kept.T @ kept / 7, atol=1e-5)


def test_double_parameters_keep_their_precision() -> None:
    ours, theirs = (nn.Parameter(torch.full((5,), 1 / 3, dtype=torch.float64)) for _ in range(2))
    kalma = Kalma([{"params": [ours], "method": "adamw", "lr": 0.01, "weight_decay": 0.1}], betas=(0.8, 0.9))
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    for step in range(4):
        ours.grad = torch.full((5,), step - 1 / 7, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        kalma.step()
        adamw.step()
    assert torch.allclose(ours, theirs, rtol=1e-14, atol=0)


def test_double_matrices_are_whitened_in_double() -> None:
    model = perceptron().double()
    optimizer = attached(model)
    losses = train(model, optimizer, range(40), lambda m, d: F.mse_loss(m(d[0].double()), d[1].double()))
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert optimizer.state[model[2].weight]["variance"].dtype == torch.float64


def test_bfloat16_matrices_are_rounded_once() -> None:
    """Decay and step are each below half of bfloat16's spacing at one; together they are above it."""
    parameter = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    optimizer = Kalma([parameter], lr=0.0015, weight_decay=1.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.item() < 1


def test_inputs_that_overflow_do_not_spoil_the_covariance() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = Kalma(kalma_groups(model), refresh_every=1)
    optimizer.attach(model)
    for step in range(4):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(step))
        if step in (0, 2):
            x[0, 0] = float("inf")
        optimizer.zero_grad()
        model(x)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
    gain = optimizer.state[model[0].weight]["gain"]
    assert bool(gain.isfinite().all()) and not torch.equal(gain[0], torch.eye(6))


def test_each_group_looks_at_its_inputs_at_its_own_steps() -> None:
    model = perceptron()
    groups = [{"params": [model[0].weight], "refresh_every": 1}, {"params": [model[2].weight], "refresh_every": 5}]
    optimizer = Kalma(groups)
    optimizer.attach(model)
    seen = []
    for step in range(6):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        seen.append(optimizer.state[model[2].weight]["covariance"].clone())
    assert all(torch.equal(seen[0], other) for other in seen[1:5]) and not torch.equal(seen[0], seen[5])


def test_a_layer_may_be_called_by_name() -> None:
    model = perceptron()
    optimizer = attached(model)
    model[0](input=torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert "gain" in optimizer.state[model[0].weight]


def test_a_step_under_autocast_keeps_float32() -> None:
    model = perceptron()
    optimizer = attached(model)
    loss_of(model, batch(0)).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert all(value.dtype == torch.float32 for value in tensors)


def test_a_plain_layer_in_a_transposed_group_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"0\.weight is stored as \(outputs, inputs\)"):
        Kalma([{"params": [model[0].weight], "transposed": True}]).attach(model)


def test_the_exact_method_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="method exact needs 2-D parameters stored as"):
        Kalma([{"params": [nn.Parameter(torch.ones(4, 4))], "method": "exact", "transposed": True}])


def test_blocks_of_a_loaded_state_are_those_that_are_watched() -> None:
    model = perceptron()
    saved = attached(model, block_size=5)
    train(model, saved, range(2))
    resumed = attached(model)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(model, resumed, range(2, 8))
    assert resumed.state[model[2].weight]["covariance"].shape == (4, 4, 4)
