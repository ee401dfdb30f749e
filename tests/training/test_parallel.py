"""Several processes train what one process trains: the same losses, the same checkpoints, the same scores."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from kalmagrove.data.example_store import prepare_examples
from kalmagrove.data.packing import PackedText
from kalmagrove.data.tables.source import table_source
from kalmagrove.errors import UsageError
from kalmagrove.models.convert import load_model
from kalmagrove.training.checkpoint import latest_checkpoint
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.trainer import train
from kalmagrove.world import World

STEPS = 9
TOLERANCE = 2e-3
"""Nats: sums over processes are rounded in another order, and steps carry that on."""

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch.distributed has no gloo here"
)


def config(optim: str = "kalma", **loop: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "tokens": STEPS * 6 * 40,
        "batch_size": 6,
        "context_length": 40,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "eval_every": 3,
        "save_every": 5,
    }
    # Reach 16 and blocks behind it: every scale of Arnold is used.
    return TrainConfig(
        model=ModelConfig(preset="kalmagrove", hidden_size=32, num_hidden_layers=2, head_dim=8),
        optim=OptimConfig(name=optim, refresh_every=3),  # type: ignore[arg-type]
        loop=LoopConfig(**(options | loop)),
    )


def in_processes(count: int, folder: Path, data: PackedText, *jobs: tuple[TrainConfig, str]) -> None:
    """Trains every job's configuration into the folder of its name, by ``count`` processes together."""
    multiprocessing.spawn(_process, (count, folder, data, jobs), nprocs=count)


def _process(rank: int, count: int, folder: Path, data: PackedText, jobs: list[tuple[TrainConfig, str]]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    world = World(rank, rank, count)
    for conf, name in jobs:
        train(conf, data, folder / name, say=lambda line: None, world=world)
    distributed.destroy_process_group()


def records(folder: Path, field: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[field] for line in lines if field in line]


def assert_same(folder: Path, reference: Path) -> None:
    for field in ("loss", "valid_loss"):
        ours, theirs = records(folder, field), records(reference, field)
        assert len(ours) == len(theirs) > 0
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    scores = [json.loads((path / "result.json").read_text())["test"] for path in (folder, reference)]
    assert scores[0]["tokens"] == scores[1]["tokens"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=TOLERANCE)


@pytest.fixture(scope="module")
def alone(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for optim in ("kalma", "adamw"):
        train(config(optim), packed, folder / optim, say=lambda line: None)
    return folder


@needs_gloo
def test_two_processes_train_as_one(alone: Path, packed: PackedText, tmp_path: Path) -> None:
    sharded, parts = config(parallel="fsdp", activation_checkpointing=True), config(micro_batch_size=2)
    jobs = [(config(), "ddp"), (sharded, "fsdp"), (parts, "parts"), (replace_loop(sharded, micro_batch_size=1), "both")]
    in_processes(2, tmp_path, packed, *jobs)
    for _, name in jobs:
        assert_same(tmp_path / name, alone / "kalma")
    weights = [load_model(tmp_path / name).state_dict() for name in ("ddp", "fsdp")]
    first = TrainingRun(config(), packed).model.state_dict()
    for name, value in load_model(alone / "kalma").state_dict().items():
        for other in weights:
            assert (other[name] - value).norm() <= 0.1 * (value - first[name]).norm(), name


@needs_gloo
def test_three_processes_train_as_one_and_go_on_from_another_number_of_processes(
    alone: Path, packed: PackedText, tmp_path: Path
) -> None:
    stopped = {}
    for name, optim in (("kalma-4", "kalma"), ("adamw-4", "adamw"), ("kalma-fsdp", "kalma"), ("adamw-fsdp", "adamw")):
        session = TrainingSession(config(optim), packed, tmp_path / name)
        for _ in range(4):
            session.advance()
        session.save()
        session.close()
        stopped[name] = optim
    jobs = [(config(optim, parallel="fsdp" if "fsdp" in name else "ddp"), name) for name, optim in stopped.items()]
    in_processes(3, tmp_path, packed, (config("adamw", parallel="fsdp"), "whole"), *jobs)
    assert_same(tmp_path / "whole", alone / "adamw")
    for name, optim in stopped.items():
        assert_same(tmp_path / name, alone / optim)
    # And what three processes saved, one goes on from.
    checkpoint, damaged = latest_checkpoint(tmp_path / "kalma-fsdp" / "checkpoints")
    assert checkpoint is not None and not damaged
    run = TrainingRun(config(), packed)
    run.restore(checkpoint)
    assert run.done and run.validation_loss() == pytest.approx(
        records(tmp_path / "kalma-fsdp", "valid_loss")[-1], abs=1e-5
    )


@needs_gloo
def test_a_batch_that_cannot_be_divided_evenly_is_divided_unevenly(packed: PackedText, tmp_path: Path) -> None:
    uneven = config(batch_size=5, tokens=STEPS * 5 * 40)
    train(uneven, packed, tmp_path / "alone", say=lambda line: None)
    # With a context within Arnold's reach its pooling has no gradient.
    short = config(context_length=12, tokens=STEPS * 6 * 12)
    train(short, packed, tmp_path / "short-alone", say=lambda line: None)
    jobs = [(uneven, "three"), (replace_loop(uneven, micro_batch_size=1), "parts"), (short, "short")]
    in_processes(3, tmp_path, packed, *jobs)
    assert_same(tmp_path / "three", tmp_path / "alone")
    assert_same(tmp_path / "parts", tmp_path / "alone")
    assert_same(tmp_path / "short", tmp_path / "short-alone")


def replace_loop(conf: TrainConfig, **loop: Any) -> TrainConfig:
    return replace(conf, loop=replace(conf.loop, **loop))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_read_disjoint_parts_of_the_one_batch(count: int, packed: PackedText) -> None:
    run = TrainingRun(config(), packed)
    whole = run.batch(3)
    parts = []
    for rank in range(count):
        run.world = World(rank, rank, count)
        parts.append(run.batch(3))
    assert torch.equal(torch.cat(parts), whole)
    assert {len(part) for part in parts} <= {len(whole) // count, len(whole) // count + 1}


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"batch_size": 2}, "loop.batch_size 2 is too small for 3 processes"),
        ({"batch_size": 4, "parallel": "fsdp"}, "divides loop.batch_size 4 evenly, and 3 processes cannot"),
    ],
)
def test_a_batch_that_does_not_fit_the_processes_is_an_error(
    loop: dict[str, Any], message: str, packed: PackedText
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        TrainingRun(config(**loop), packed, World(0, 0, 3))


def test_a_compiler_that_is_too_old_is_refused(packed: PackedText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(UsageError, match=r"loop\.compile needs torch 2\.13 or newer, and this is 2\.11\.0"):
        TrainingRun(config(compile=True), packed)


def test_examples_are_not_sharded(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b\n" + "".join(f"{n % 7},{n % 3}\n" for n in range(200)))
    data = prepare_examples(table_source(str(table), seed=0), tmp_path / "packed")
    conf = config(batch_size=6, context_length=8, parallel="fsdp")
    with pytest.raises(UsageError, match=r"loop\.parallel fsdp is for text; train table data with loop\.parallel ddp"):
        TrainingRun(conf, data, World(0, 0, 3))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_an_incomplete_environment_of_torchrun_is_an_error(name: str) -> None:
    from kalmagrove.world import world_of_environment

    whole = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert world_of_environment(whole) == World(1, 1, 2)
    assert world_of_environment({}) == World(0, 0, 1)
    with pytest.raises(UsageError, match="start several processes with torchrun or --nproc"):
        world_of_environment(whole | {name: "first"})
