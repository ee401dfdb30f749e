"""The noise scale is the one that the data has, the update ratio the one that the step made; neither changes a run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kalmagrove.data.packing import PackedText
from kalmagrove.errors import UsageError
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.measures import gradient_noise_scale, update_ratio
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.session import TrainingSession
from kalmagrove.world import World


def config(**loop: object) -> TrainConfig:
    options: dict[str, object] = {"tokens": 6 * 4 * 24, "batch_size": 4, "context_length": 24, "log_every": 2}
    return TrainConfig(
        model=ModelConfig(hidden_size=32, num_hidden_layers=2, head_dim=8),
        optim=OptimConfig(refresh_every=2),
        loop=LoopConfig(device="cpu", precision="fp32", **(options | loop)),  # type: ignore[arg-type]
    )


def test_the_noise_scale_of_a_known_gradient_is_found() -> None:
    # The gradient of a token is (3, 4) and noise of variance 2 in each of two directions: 4 / 25 tokens.
    weight, chance = nn.Parameter(torch.zeros(2)), torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([3.0, 4.0]), 2.0**0.5
    signals, noises = [], []
    for _ in range(400):
        drawn = mean + deviation * torch.randn(8, 5, 2, generator=chance)
        places = torch.arange(8)[:, None].expand(8, 6)

        def loss_sum(part: torch.Tensor, drawn: torch.Tensor = drawn) -> torch.Tensor:
            return (drawn[part[:, 0]] * weight).sum()

        scale = gradient_noise_scale([weight], places, loss_sum)
        if scale is not None:
            signals.append(1.0)
            noises.append(scale)
    # Estimates that have no meaning are left out, so the mean of the others is a little high.
    assert sum(noises) / sum(signals) == pytest.approx(4 / 25, rel=0.3)
    assert weight.grad is None


def test_the_update_ratio_is_that_of_the_step() -> None:
    before = [torch.ones(2, 2), 2 * torch.ones(3, 3), torch.zeros(2, 2)]
    after = [1.01 * before[0], 1.03 * before[1], before[2]]
    assert update_ratio(before, after) == pytest.approx(((0.01**2 + 0.03**2) / 2) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_run_that_is_measured_is_the_same_run(
    micro_batch_size: int | None, packed: PackedText, tmp_path: Path
) -> None:
    runs = []
    for measured in (False, True):
        conf = config(gradient_metrics=measured, micro_batch_size=micro_batch_size)
        session = TrainingSession(conf, packed, tmp_path / str(measured))
        losses = [session.advance().loss for _ in range(6)]
        session.close()
        runs.append((losses, session.run.model.state_dict(), session.folder.read_metrics()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert not any("update_ratio" in record for record in runs[0][2])
    logged = [record for record in runs[1][2] if record["step"] % 2 == 0 and "loss" in record]
    assert [record["step"] for record in logged] == [2, 4, 6]
    assert all(0 < record["update_ratio"] < 1 for record in logged)
    assert any(record.get("gradient_noise_scale", 0) > 0 for record in logged)


def test_several_processes_cannot_be_measured(packed: PackedText) -> None:
    with pytest.raises(UsageError, match=r"loop\.gradient_metrics needs one process"):
        TrainingRun(config(gradient_metrics=True), packed, World(0, 0, 2))
