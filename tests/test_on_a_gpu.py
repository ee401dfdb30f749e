"""What differs on a GPU: other kernels must compute the same; skipped without one."""

import pytest
import torch

from kalmagrove.models.build import build_model, model_config
from kalmagrove.nn import flex
from kalmagrove.nn.arnold import BlockPooling, Resolution, attend, block_ends, masked_attention, with_null_key
from kalmagrove.optim.build import build_optimizers

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch's compiler says of itself when it is first used.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def plain_attention(
    resolution: Resolution, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """One matrix of all scores."""
    positions, ends = torch.arange(query.shape[2]), block_ends(key.shape[2], resolution.stride, torch.device("cpu"))
    visible = resolution.visible(positions, ends).to(query.device)
    if resolution.stride > 1:
        key, value = with_null_key(key, value)
        visible = torch.nn.functional.pad(visible, (1, 0), value=True)
    return masked_attention(query, key, value, visible)


@pytest.mark.parametrize("length", [100, 1024, 1280])
@pytest.mark.parametrize(("stride", "window"), [(1, None), (1, 64), (4, None), (4, 256)])
def test_every_pattern_equals_masked_attention_with_its_gradients(length: int, stride: int, window: int | None) -> None:
    resolution = Resolution(2, 32, stride, window)
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (torch.randn(2, 2, length, 32, device="cuda", generator=generator) for _ in range(3))
    if stride > 1:
        key, value = BlockPooling(2, 32, stride).cuda()(key, value)
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    own, plain = attend(resolution, *inputs), plain_attention(resolution, *inputs)
    torch.testing.assert_close(own, plain, atol=2e-3, rtol=2e-3)
    weights = torch.randn(own.shape, device="cuda", generator=generator)
    gradients = torch.autograd.grad(own, inputs, weights), torch.autograd.grad(plain, inputs, weights)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


def test_long_texts_take_the_fused_window() -> None:
    assert flex.fits(torch.empty(1, 1, 2048, 64, device="cuda"))
    assert not flex.fits(torch.empty(1, 1, 2000, 64, device="cuda"))


def test_a_later_token_changes_nothing_before_it_and_the_cache_gives_the_same() -> None:
    config = model_config("kalmagrove-tiny", {"vocab_size": 64, "max_position_embeddings": 1024})
    model = build_model(config, seed=0).cuda().eval()
    tokens = torch.randint(64, (1, 1024), generator=torch.Generator().manual_seed(1)).cuda()
    changed = tokens.clone()
    changed[0, 700] = (changed[0, 700] + 1) % 64
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
        cache = model.new_cache()
        pieces = torch.cat([model(part, cache=cache).logits for part in tokens.split([600, 1, 423], dim=1)], dim=1)
    torch.testing.assert_close(after[:, :700], before[:, :700], atol=0, rtol=0)
    assert not torch.allclose(after[:, 700:], before[:, 700:])
    torch.testing.assert_close(pieces, before, atol=1e-3, rtol=1e-3)


def test_kalma_takes_the_steps_that_it_takes_on_a_cpu() -> None:
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        config = model_config("kalmagrove-tiny", {"vocab_size": 64, "max_position_embeddings": 64})
        model = build_model(config, seed=0).to(device).train()
        optimizers = build_optimizers("kalma", model, lr=3e-3)
        losses[device] = []
        for step in range(12):
            tokens = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(step)).to(device)
            loss = model.token_loss_sum(tokens[:, :-1], tokens[:, 1:]) / 256
            loss.backward()
            losses[device].append(float(loss))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
