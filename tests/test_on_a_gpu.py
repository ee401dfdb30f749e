"""What differs on a GPU: other kernels must compute the same; skipped without one."""

import pytest
import torch

from kalmagrove.models.build import build_model, model_config
from kalmagrove.nn import flex
from kalmagrove.nn.attend import attend
from kalmagrove.nn.pooling import BlockPooling
from kalmagrove.nn.resolution import Resolution
from kalmagrove.optim.build import build_optimizers

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch's compiler says of itself when it is first used.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.mark.parametrize("length", [100, 1024, 1300])
@pytest.mark.parametrize(
    "scales", [[(1, None)], [(1, 64)], [(1, 128), (16, None)], [(1, 64), (4, 256), (16, 700)]], ids=str
)
def test_every_resolution_is_what_the_cpu_computes_with_its_gradients(
    length: int, scales: list[tuple[int, int | None]]
) -> None:
    resolution = Resolution(2, 32, scales)
    drawn = torch.randn(3, 2, 2, length, 32, generator=torch.Generator().manual_seed(0))
    slope = torch.randn(2, 2, length, 32, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for device in ("cuda", "cpu"):
        inputs = [t.to(device).detach().requires_grad_() for t in drawn]
        pools = [BlockPooling(2, 32, stride).to(device) for _, (stride, _) in resolution.coarse]
        blocks = [pool(inputs[1], inputs[2]) for pool in pools]
        keys, values = [inputs[1], *(k for k, _ in blocks)], [inputs[2], *(v for _, v in blocks)]
        own = attend(resolution, inputs[0], keys, values)
        outcomes.append([own, *torch.autograd.grad(own, inputs, slope.to(device))])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=5e-3, rtol=5e-3)


def test_long_texts_take_the_fused_kernel() -> None:
    assert flex.fits(torch.empty(1, 1, 2000, 64, device="cuda"))
    assert not flex.fits(torch.empty(1, 1, 1000, 64, device="cuda"))


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
            losses[device].append(float(loss.detach()))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
