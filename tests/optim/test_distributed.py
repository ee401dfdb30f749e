"""Kalma on several ranks gives what one process gives."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

from kalmagrove.optim.distributed import average_across_ranks
from kalmagrove.optim.division import _balanced
from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.kalma import Kalma

RANKS = 2
STEPS = 5

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch.distributed has no gloo here"
)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 16), nn.LayerNorm(16), nn.Linear(16, 3))


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, optimizer: Kalma, rank: int = 0, ranks: int = 1, steps: Iterable[int] = range(STEPS)
) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = batch(step).chunk(ranks)[rank]
        F.mse_loss(model(x), torch.stack([x[:, 0], x[:, 1].sin(), x[:, 2:].sum(1)], dim=1)).backward()
        optimizer.step()


def kalma(model: nn.Module, *, divide_work: bool = False) -> Kalma:
    optimizer = Kalma(kalma_groups(model), refresh_every=2)
    optimizer.attach(model, divide_work=divide_work)
    return optimizer


def one_process() -> dict[str, torch.Tensor]:
    model = small_model()
    train(model, kalma(model))
    return model.state_dict()


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)


def end(model: nn.parallel.DistributedDataParallel) -> None:
    # The reducer, as the last to hold the connection, would wait for its threads with Python's lock, which they need.
    del model.reducer, model.logger
    distributed.destroy_process_group()


def data_parallel(rank: int, folder: str) -> None:
    start(rank, folder)
    model = nn.parallel.DistributedDataParallel(small_model())
    optimizer = kalma(model.module)
    train(model, optimizer, rank, RANKS)
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    end(model)


def fully_sharded(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, folder)
    model = small_model()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = kalma(model)
    train(model, optimizer, rank, RANKS)
    whole = {name: value.full_tensor() for name, value in get_model_state_dict(model).items()}
    torch.save(whole, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def divided(rank: int, folder: str) -> None:
    """As data_parallel, with the work divided; half-way everything is saved and loaded into a new optimiser."""
    start(rank, folder)
    model = nn.parallel.DistributedDataParallel(small_model())
    optimizer = kalma(model.module, divide_work=True)
    train(model, optimizer, rank, RANKS, steps=range(3))
    saved = [optimizer.gathered_state_dict()]
    distributed.broadcast_object_list(saved)
    optimizer.detach()
    optimizer = kalma(model.module, divide_work=True)
    optimizer.load_state_dict(saved[0])
    train(model, optimizer, rank, RANKS, steps=range(3, STEPS))
    own = [sorted(state) for state in optimizer.state_dict()["state"].values()]
    torch.save({"model": model.module.state_dict(), "gathered": optimizer.gathered_state_dict()["state"], "own": own},
               f"{folder}/{rank}.pt")  # fmt: skip
    end(model)


def detached(rank: int, folder: str) -> None:
    """The work divided, and the watch ended half-way."""
    start(rank, folder)
    model = nn.parallel.DistributedDataParallel(small_model())
    optimizer = kalma(model.module, divide_work=True)
    train(model, optimizer, rank, RANKS, steps=range(3))
    optimizer.detach()
    train(model, optimizer, rank, RANKS, steps=range(3, STEPS))
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    end(model)


def uneven_statistics(rank: int, folder: str) -> None:
    """Only the first rank saw the second matrix, and nobody the third."""
    start(rank, folder)
    seen = {1: (torch.full((1, 2, 2), 1.0 + rank), 3 + rank)} | ({2: (torch.ones(1, 3, 3), 5)} if rank == 0 else {})
    shapes = {1: (1, 2, 2), 2: (1, 3, 3), 3: (2, 1, 1)}
    together = average_across_ranks(seen, shapes, device=torch.device("cpu"))
    torch.save(together, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def on_all_ranks(function: Any, folder: Path) -> list[dict[Any, Any]]:
    multiprocessing.spawn(function, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("function", [data_parallel, fully_sharded])
def test_ranks_train_as_one_process_with_the_whole_batch(function: Any, tmp_path: Path) -> None:
    expected, results = one_process(), on_all_ranks(function, tmp_path)
    for name, value in expected.items():
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.allclose(results[0][name], value, atol=2e-3), name


def test_ranks_that_divide_the_work_do_what_one_process_does(tmp_path: Path) -> None:
    alone = small_model()
    optimizer = kalma(alone)
    train(alone, optimizer)
    results = on_all_ranks(divided, tmp_path)
    for name, value in alone.state_dict().items():
        assert torch.equal(results[0]["model"][name], results[1]["model"][name]), name
        assert torch.allclose(results[0]["model"][name], value, atol=2e-3), name
    # Each matrix has its statistics on one rank, vectors have theirs on both; together they are those of one process.
    has_basis = [[any("basis" in name for name in state) for state in result["own"]] for result in results]
    assert sum(map(sum, has_basis)) == 3 and all(any(own) for own in has_basis)
    expected, gathered = optimizer.state_dict()["state"], results[0]["gathered"]
    assert gathered.keys() == expected.keys()
    for index, state in expected.items():
        assert gathered[index].keys() == state.keys()
        for name in ("momentum", "covariance", "exp_avg"):
            if name in state:
                torch.testing.assert_close(gathered[index][name], state[name], atol=5e-3, rtol=0.02)


def test_ranks_that_divided_the_work_stay_equal_when_the_watch_ends(tmp_path: Path) -> None:
    first, second = on_all_ranks(detached, tmp_path)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_the_costliest_matrices_are_divided_first() -> None:
    owners = _balanced({1: 9, 2: 5, 3: 4, 4: 1}, 2)
    assert owners == {1: 0, 2: 1, 3: 1, 4: 0}
    assert _balanced({}, 3) == {}


def test_statistics_that_not_every_rank_has_are_summed(tmp_path: Path) -> None:
    for together in on_all_ranks(uneven_statistics, tmp_path):
        assert together.keys() == {1, 2}
        assert together[1][1] == 7 and torch.equal(together[1][0], torch.full((1, 2, 2), 3.0))
        assert together[2][1] == 5 and torch.equal(together[2][0], torch.ones(1, 3, 3))


def test_one_process_sends_nothing() -> None:
    seen = {1: (torch.ones(1, 2, 2), 3)}
    assert average_across_ranks(seen, {1: (1, 2, 2)}, device=torch.device("cpu")) is seen
