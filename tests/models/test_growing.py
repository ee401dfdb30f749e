"""A larger rank that changes nothing until it is trained."""

from typing import Any

import pytest
import torch

from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.growing import grow_rank
from kalmagrove.nn.grove import GroveLinear

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "head_dim": 8, "max_position_embeddings": 32}
CASES: dict[str, dict[str, Any]] = {
    "letter": {"sharing": "group", "group_size": 4, "shared_sides": "both", "core": "dense"},
    "diagonal": {"sharing": "cycle", "shared_sides": "both", "core": "diagonal"},
    "blocks": {"sharing": "group", "shared_sides": "both", "core": "block", "core_block_size": 4},
    "absorbed": {"sharing": "cycle", "shared_sides": "residual", "core": "diagonal"},
    "inner": {"sharing": "group", "shared_sides": "inner", "core": "dense"},
}


def model_of(case: str, rank: int = 8) -> KalmaGroveForCausalLM:
    options = SIZES | {"grove_parts": "all", "rank": rank} | CASES[case]
    return build_model(model_config("kalmagrove", options), seed=2)


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_growing_keeps_the_function_and_gives_every_new_direction_a_gradient(case: str) -> None:
    model = model_of(case).double()
    with torch.no_grad():
        before = model(tokens()).logits
        grow_rank(model, 16, seed=1)
        assert torch.allclose(model(tokens()).logits, before, atol=1e-12)
    assert {layer.rank for layer in model.modules() if isinstance(layer, GroveLinear)} == {16}
    model(tokens(), labels=tokens()).loss.backward()
    for layer in (module for module in model.modules() if isinstance(module, GroveLinear)):
        learns = [
            parameter.grad[..., 8:].abs().sum() + (parameter.grad[8:].abs().sum() if parameter.shape[0] == 16 else 0)
            for parameter in (*layer.parameters(), *(basis.weight for basis in (*layer._left, *layer._right)))
            if parameter.grad is not None and 16 in parameter.shape
        ]
        assert any(float(slope) > 0 for slope in learns) or layer.core_kind == "block"
        if layer.core_kind == "block":
            assert float(layer.core.grad[2:].abs().sum()) > 0


@pytest.mark.parametrize("case", CASES)
def test_a_grown_model_has_the_form_of_a_new_one_and_still_shares(case: str) -> None:
    grown, new = model_of(case), model_of(case, rank=16)
    grow_rank(grown, 16, seed=1)
    assert grown.config.rank == 16
    assert {n: p.shape for n, p in grown.named_parameters()} == {n: p.shape for n, p in new.named_parameters()}
    new.load_state_dict(grown.state_dict())
    assert torch.allclose(new(tokens()).logits, grown(tokens()).logits)


def test_adaptors_grow_too() -> None:
    model = model_of("letter")
    model.add_adaptor("legal")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, GroveLinear):
                layer.adaptors["legal"].normal_()
    model.set_adaptor("legal")
    before = model(tokens()).logits
    grow_rank(model, 12, seed=0)
    assert torch.allclose(model(tokens()).logits, before, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "rank", "message"),
    [
        ({"projections": "dense"}, 16, "dense or of full rank"),
        ({"rank": None}, 16, "dense or of full rank"),
        ({}, 8, "must be above 8, got 8"),
        ({"rank": 1}, 8, "begin with 2 or more"),
        ({}, 25, "rank 25 must be between 1 and 16"),
        ({"core": "block", "core_block_size": 4, "shared_sides": "both"}, 10, "not divisible by the core's block size"),
        ({"sharing": "band"}, 16, "bands cut the rank"),
    ],
)
def test_what_cannot_grow_is_refused(options: dict[str, Any], rank: int, message: str) -> None:
    model = build_model(model_config("kalmagrove", SIZES | {"grove_parts": "all", "rank": 8} | options), seed=0)
    with pytest.raises(ValueError, match=message):
        grow_rank(model, rank, seed=0)
