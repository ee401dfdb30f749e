"""A Grove model as a dense one, and as a stock Llama."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import from_stock, save_model, to_stock
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.merging import merge
from kalmagrove.nn.grove import GroveLinear

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "head_dim": 8, "max_position_embeddings": 32}
FORMS: dict[str, dict[str, Any]] = {
    "preset": {},
    "mix": {"sharing": "mix", "grove_parts": "all"},
    "letter": {"grove_parts": "all", "rank": 8, "shared_sides": "both", "core": "dense", "sharing": "group"},
    "dense": {"projections": "dense"},
    "factorised": {"embedding_rank": 8},
}


def model_of(preset: str, **options: Any) -> KalmaGroveForCausalLM:
    model = build_model(model_config(preset, SIZES | options), seed=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
def test_a_merged_model_is_dense_and_gives_the_same_logits(form: str, tmp_path: Path) -> None:
    model = model_of("kalmagrove", **FORMS[form])
    merged = merge(model)
    assert not any(isinstance(module, GroveLinear) for module in merged.modules())
    assert not {id(p) for p in merged.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        logits = model(tokens()).logits
        assert torch.allclose(merged(tokens()).logits, logits, atol=1e-5)
        save_model(merged, tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(loaded(tokens()).logits, logits, atol=1e-5)


def test_merging_takes_the_active_adaptor_along() -> None:
    model = model_of("kalmagrove")
    model.add_adaptor("legal")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, GroveLinear):
                layer.adaptors["legal"].normal_()
    base = merge(model)(tokens()).logits
    model.set_adaptor("legal")
    merged = merge(model)
    assert merged.config.adaptors == []
    assert torch.allclose(merged(tokens()).logits, model(tokens()).logits, atol=1e-5)
    assert not torch.allclose(merged(tokens()).logits, base, atol=1e-3)


@pytest.mark.parametrize("form", [{}, {"rank": 8, "shared_sides": "both", "core": "dense"}, {"sharing": "mix"}])
def test_grove_with_full_attention_is_written_as_a_stock_llama(form: dict[str, Any], tmp_path: Path) -> None:
    options = {"projections": "grove", "sharing": "cycle", "group_size": 2} | form
    model = model_of("llama", **options)
    stock = to_stock(model)
    assert isinstance(stock, LlamaForCausalLM)
    stock.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5)


@pytest.mark.parametrize("preset", ["llama", "gpt2"])
def test_conversions_keep_the_type_and_how_text_is_generated(preset: str) -> None:
    model = model_of(preset).to(torch.bfloat16)
    model.generation_config.temperature, model.generation_config.eos_token_id = 0.3, 5
    for converted in (merge(model), to_stock(model), from_stock(to_stock(model))):
        assert converted.dtype == torch.bfloat16
        assert converted.generation_config.temperature == 0.3 and converted.generation_config.eos_token_id == 5


def test_arnold_is_no_stock_llama() -> None:
    with pytest.raises(ValueError, match="it differs in attention, qk_norm, short_conv"):
        to_stock(model_of("kalmagrove"))
