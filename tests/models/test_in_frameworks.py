"""Our models beside what frameworks do around a model: trainers, compilers, positions, guesses, incomplete folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from kalmagrove.errors import KalmaGroveError
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.compressed import CompressedForCausalLM
from kalmagrove.models.compressed_config import CompressedConfig
from kalmagrove.models.convert import context_of, load_model
from kalmagrove.models.decoder import KalmaGroveForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 40,
}


def ours() -> KalmaGroveForCausalLM:
    return build_model(model_config("kalmagrove", SIZES), seed=0).eval()


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=False, **sizes)).eval()


def compressed(dense: PreTrainedModel) -> CompressedForCausalLM:
    config = CompressedConfig(text_config=dense.config.to_dict(), sizes={}, factors={}, bases={})
    model = CompressedForCausalLM(config).eval()
    model.decoder.load_state_dict(dense.state_dict())
    return model


def ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 90, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [ours, lambda: compressed(small_llama())], ids=["kalmagrove", "compressed"])
def test_a_trainer_that_smooths_labels_shifts_them(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, tokens = make(), ids()
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=1e-6, report_to=[], use_cpu=True)
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": tokens, "labels": tokens})
    assert found.item() == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), abs=1e-3)


def test_a_compressed_model_tells_a_trainer_what_it_takes() -> None:
    import inspect

    names = inspect.signature(CompressedForCausalLM.forward).parameters
    assert {"input_ids", "attention_mask", "labels"} <= names.keys()
    assert compressed(ours()).accepts_loss_kwargs is False and compressed(small_llama()).accepts_loss_kwargs is True


def test_a_compressed_model_keeps_its_vocabulary() -> None:
    model = compressed(small_llama())
    with pytest.raises(NotImplementedError, match="keeps its vocabulary"):
        model.resize_token_embeddings(120)
    assert model.get_input_embeddings().weight.shape[0] == 99


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older compilers give wrong gradients, and are refused")
def test_padding_counts_in_a_compiled_model_too() -> None:
    torch.compiler.reset()
    model, tokens = ours(), ids()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    found = torch.compile(model, backend="aot_eager")(tokens, attention_mask=mask).logits
    assert torch.allclose(found[1, 5:], model(tokens[1:, 5:]).logits[0], atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        ([0, 1, 2, 3, 4, 5], None),
        ([0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 0, 0]),
        ([1, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]),
    ],
)
def test_usual_positions_change_nothing(positions: list[int], mask: list[int] | None) -> None:
    model, tokens = ours(), ids(1, 6)
    seen = None if mask is None else torch.tensor([mask])
    found = model(tokens, attention_mask=seen, position_ids=torch.tensor([positions])).logits
    assert torch.equal(found, model(tokens, attention_mask=seen).logits)


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 7, 8], [0, 2, 4, 6, 8, 10]])
def test_positions_of_several_texts_in_a_row_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="position_ids must count each row's tokens one by one from 0"):
        ours()(ids(1, 6), position_ids=torch.tensor([positions]))


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}])
def test_what_takes_tokens_back_is_refused(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is not possible with this model"):
        ours().generate(ids(1), max_new_tokens=3, **option)


def test_another_model_s_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"made by its new_cache\(\); got a DynamicCache"):
        ours()(ids(1), past_key_values=DynamicCache())


def test_guidance_reads_its_second_text_as_a_whole() -> None:
    model, tokens = ours(), ids(1)
    options = {"max_new_tokens": 6, "do_sample": False, "guidance_scale": 3.0, "pad_token_id": 0, "eos_token_id": None}
    negative = {"negative_prompt_ids": tokens.flip(1), "output_scores": True, "return_dict_in_generate": True}
    found, expected = (model.generate(tokens, use_cache=cache, **options, **negative) for cache in (True, False))
    assert torch.allclose(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-5)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_folder_without_some_of_its_weights_is_refused(lost: str, tmp_path: Path) -> None:
    small_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(KalmaGroveError, match=f"its weights have no {lost}; give a whole folder"):
        load_model(tmp_path)


def test_the_context_of_any_architecture() -> None:
    from transformers import BloomConfig, GPT2Config, MptConfig

    assert context_of(GPT2Config(n_positions=77)) == 77 and context_of(MptConfig(max_seq_len=88)) == 88
    with pytest.raises(KalmaGroveError, match="this bloom does not say how long its context is"):
        context_of(BloomConfig())
