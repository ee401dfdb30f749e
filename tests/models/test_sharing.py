"""Shared bases are one tensor through everything that a model goes through, and a step moves all who use them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.nn.grove import GroveLinear

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "head_dim": 8, "max_position_embeddings": 64}
SHARINGS = ["group", "cycle", "mix", "band"]
RANKS, STEPS = 2, 4


def model_of(sharing: str) -> KalmaGroveForCausalLM:
    options = {"grove_parts": "all", "sharing": sharing, "intermediate_size": 48}
    return build_model(model_config("kalmagrove", SIZES | options), seed=2)


def owners(model: torch.nn.Module) -> dict[str, list[str]]:
    """For each parameter by name, the Grove layers that use it."""
    found: dict[str, list[str]] = {name: [] for name, _ in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, GroveLinear):
            for basis in (*layer._left, *layer._right):
                found[names[id(basis.weight)]].append(name)
    return found


def saved_and_loaded(model: KalmaGroveForCausalLM, folder: Path) -> KalmaGroveForCausalLM:
    model.save_pretrained(folder)
    return KalmaGroveForCausalLM.from_pretrained(folder)


PASSAGES: dict[str, Any] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "bfloat16": lambda model, _: model.to(torch.bfloat16),
    "float64": lambda model, _: model.double(),
    "meta and back": lambda model, _: model.to("meta").to_empty(device="cpu"),
    "save and load": saved_and_loaded,
}


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("passage", PASSAGES)
def test_every_layer_still_uses_the_tensors_that_it_shared(sharing: str, passage: str, tmp_path: Path) -> None:
    before = owners(model_of(sharing))
    assert max(map(len, before.values())) > 1
    assert owners(PASSAGES[passage](model_of(sharing), tmp_path)) == before


def train(model: torch.nn.Module, rank: int = 0, ranks: int = 1) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        ids = torch.randint(0, 61, (4, 64), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(rank: int, folder: str, sharing: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    model = model_of(sharing)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, rank, RANKS)
    torch.save({n: v.full_tensor() for n, v in get_model_state_dict(model).items()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch.distributed has no gloo here"
)
@pytest.mark.parametrize("sharing", ["cycle", "band"])
def test_sharded_over_two_processes_it_trains_as_in_one(sharing: str, tmp_path: Path) -> None:
    alone = model_of(sharing)
    train(alone)
    multiprocessing.spawn(sharded, (str(tmp_path), sharing), nprocs=RANKS)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name, value in alone.state_dict().items():
        assert torch.equal(results[0][name], results[1][name]), name
        torch.testing.assert_close(results[0][name], value, atol=1e-4, rtol=1e-3, msg=name)
