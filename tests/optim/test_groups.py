"""Who trains which parameter."""

import pytest
import torch
from torch import nn

from kalmagrove.models.build import build_model, model_config
from kalmagrove.optim.groups import describe_groups, kalma_groups
from kalmagrove.optim.kalma import Kalma

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8, "max_position_embeddings": 40}


@pytest.mark.parametrize("preset", ["gpt2", "llama", "kalmagrove"])
def test_groups_hold_every_parameter_once_and_embeddings_are_tables(preset: str) -> None:
    model = build_model(model_config(preset, SIZES), 0)
    groups = kalma_groups(model)
    matrices, tables, rest, *cores = groups
    assert len(cores) == (preset == "kalmagrove")
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all("embed" not in name for name in matrices["names"])
    assert all(p.ndim == 2 for p in matrices["params"])
    assert "model.embed_tokens.weight" in tables["names"]
    assert not any("embed" in name for name in rest["names"])
    text = describe_groups(groups)
    assert text.startswith(f"kalma: {len(matrices['params'])} tensors, ")
    assert "table: " in text and "embed_tokens" in text and "adamw: " in text


def test_cores_and_adaptors_have_a_rate_of_their_own() -> None:
    model = build_model(model_config("kalmagrove", SIZES | {"adaptors": ["law"]}), 0)
    cores = kalma_groups(model, core_lr=0.004)[-1]
    assert cores["lr"] == 0.004 and cores["method"] == "adamw"
    assert {name.split(".")[-1] for name in cores["names"]} == {"core", "law"}
    dense = build_model(model_config("kalmagrove", SIZES | {"core": "dense"}), 0)
    matrices = kalma_groups(dense)[0]["names"]
    assert any(name.endswith(".core") for name in matrices)


def test_a_tied_head_is_found_by_identity() -> None:
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    groups = kalma_groups(nn.ModuleDict({"output": head, "table": embedding, "hidden": nn.Linear(6, 6)}))
    assert groups[0]["names"] == ["hidden.weight"]


def test_an_untied_head_is_a_table() -> None:
    model = build_model(model_config("llama", SIZES | {"tie_word_embeddings": False}), 0)
    assert "lm_head.weight" in kalma_groups(model)[1]["names"]


def test_convolutions_over_all_channels_are_matrices_and_depth_wise_ones_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    matrices, rest = kalma_groups(model)
    assert matrices["names"] == ["0.weight"]
    assert rest["names"] == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]


def test_fused_projections_are_split() -> None:
    groups = kalma_groups(nn.ModuleDict({"attention": nn.MultiheadAttention(12, 2), "hidden": nn.Linear(12, 5)}))
    assert [(g["names"], g["split_sizes"]) for g in groups[:2]] == [
        (["attention.in_proj_weight"], (12, 12, 12)),
        (["attention.out_proj.weight", "hidden.weight"], None),
    ]
    assert kalma_groups(nn.ModuleDict({"qkv": nn.Linear(12, 20)}))[0]["split_sizes"] is None


def test_experts_are_a_matrix_each() -> None:
    module = nn.Module()
    module.experts = nn.ParameterDict({"up": nn.Parameter(torch.ones(4, 6, 5))})
    module.other = nn.Parameter(torch.ones(4, 6, 5))
    matrices, rest = kalma_groups(module)
    assert matrices["names"] == ["experts.up"] and matrices["stacked"]
    assert rest["names"] == ["other"]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert [name for group in kalma_groups(model) for name in group["names"]] == ["1.weight", "1.bias"]
    Kalma(kalma_groups(model))


@pytest.mark.parametrize("named", [True, False])
def test_groups_that_were_not_made_here_are_described_too(named: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    text = describe_groups(Kalma(model.named_parameters() if named else model.parameters()).param_groups)
    assert ("(0.weight)" if named else "a parameter of shape (6, 4)") in text
