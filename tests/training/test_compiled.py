"""A compiled run takes the same steps, and Kalma still sees the inputs."""

import shutil

import pytest
import torch

from kalmagrove.data.packing import PackedText
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run import TrainingRun


def run(packed: PackedText, *, compiled: bool) -> TrainingRun:
    return TrainingRun(
        TrainConfig(
            model=ModelConfig(preset="kalmagrove", hidden_size=32, num_hidden_layers=1, head_dim=8),
            optim=OptimConfig(refresh_every=2),
            loop=LoopConfig(
                tokens=5 * 2 * 40, batch_size=2, context_length=40, precision="fp32", device="cpu", compile=compiled
            ),
        ),
        packed,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler cannot link in a folder with a space in its name")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="older compilers give wrong gradients, and are refused")
@pytest.mark.filterwarnings("ignore")  # Of torch's own compiler.
def test_compiled_steps_are_the_plain_ones(packed: PackedText) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = run(packed, compiled=False), run(packed, compiled=True)
    for _ in range(5):
        assert compiled.train_step().loss == pytest.approx(plain.train_step().loss, abs=1e-3)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    kept = [
        [state["covariance"] for state in either.optimizers[0].state.values() if "covariance" in state]
        for either in (plain, compiled)
    ]
    assert len(kept[0]) == len(kept[1]) > 0
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)
