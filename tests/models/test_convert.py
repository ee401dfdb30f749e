"""Our decoder equals the stock models on the same weights, and its folders are stock folders."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kalmagrove.errors import KalmaGroveError
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import from_stock, load_model, save_model, stock_family, to_stock

SIZES = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "head_dim": 16, "max_position_embeddings": 40}
IDS = torch.randint(0, 99, (3, 37), generator=torch.Generator().manual_seed(0))


def stock_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_positions=40, n_embd=48, n_layer=2, n_head=4, n_inner=100)
    return GPT2LMHeadModel(config).eval()


def stock_llama(tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-6,
    )
    return LlamaForCausalLM(config).eval()


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("stock", [stock_gpt2(), stock_llama(True), stock_llama(False)], ids=["gpt2", "tied", "untied"])
def test_a_stock_model_becomes_ours_with_the_same_logits_and_back(stock: PreTrainedModel) -> None:
    stock = perturbed(stock)
    expected = stock(IDS).logits
    ours = from_stock(stock)
    assert torch.allclose(ours(IDS).logits, expected, atol=2e-5)
    assert torch.allclose(to_stock(ours)(IDS).logits, expected, atol=2e-5)


@pytest.mark.parametrize(("preset", "stock"), [("gpt2", GPT2LMHeadModel), ("llama", LlamaForCausalLM)])
def test_the_folder_of_a_stock_preset_is_opened_by_the_stock_class(preset: str, stock: type, tmp_path: Path) -> None:
    model = perturbed(build_model(model_config(preset, SIZES), seed=1)).eval()
    save_model(model, tmp_path)
    loaded = stock.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=2e-5)


def test_gradients_of_ours_equal_the_stock_models() -> None:
    stock = perturbed(stock_llama(True)).train()
    ours = from_stock(stock)
    stock(IDS, labels=IDS).loss.backward()
    (ours.token_loss_sum(IDS[:, :-1], IDS[:, 1:]) / IDS[:, 1:].numel()).backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name


@pytest.mark.parametrize("preset", ["llama-plus", "slim", "kalmagrove"])
def test_other_presets_are_not_stock(preset: str) -> None:
    model = build_model(model_config(preset, SIZES), seed=1)
    assert stock_family(model.config) is None
    with pytest.raises(ValueError, match="this model is no Llama"):
        to_stock(model)


def test_a_llama_with_grouped_queries_is_refused_by_name() -> None:
    config = LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(KalmaGroveError, match="num_key_value_heads = 2"):
        from_stock(LlamaForCausalLM(config))


def test_a_gpt2_with_other_attention_scales_is_refused_by_name() -> None:
    config = GPT2Config(vocab_size=99, n_positions=40, n_embd=48, n_layer=1, n_head=4)
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(KalmaGroveError, match="scale_attn_by_inverse_layer_idx = True"):
        from_stock(GPT2LMHeadModel(config))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_a_pickle_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    model = build_model(model_config("llama", SIZES), seed=1)
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be opened")
    with pytest.raises(KalmaGroveError, match="cannot load a model"):
        load_model(tmp_path)
