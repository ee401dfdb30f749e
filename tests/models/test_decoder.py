"""The decoder as a whole: causality, cached decoding, saving and loading, generation, adaptors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.presets import FAMILIES
from kalmagrove.nn.decoding import DecodingCache
from kalmagrove.nn.loss import linear_cross_entropy

ARNOLD = [
    {"num_heads": 2, "head_dim": 4, "scales": [[1, 5]]},
    {"num_heads": 1, "head_dim": 6, "scales": [[1, 4], [3, 12], [6, None]]},
]
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "max_position_embeddings": 40,
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"preset": family} for family in FAMILIES},
    "band": {"preset": "kalmagrove", "grove_parts": "all", "sharing": "band"},
    "letter": {
        "preset": "kalmagrove",
        "grove_parts": "all",
        "rank": 10,
        "shared_sides": "both",
        "core": "dense",
        "sharing": "group",
    },
    "inner-block": {
        "preset": "kalmagrove",
        "grove_parts": "all",
        "rank": 8,
        "shared_sides": "inner",
        "core": "block",
        "core_block_size": 4,
    },
    "inner-full": {
        "preset": "kalmagrove",
        "grove_parts": "all",
        "shared_sides": "inner",
        "sharing": "group",
        "group_size": 3,
    },
    "grove-feed-forward": {"preset": "kalmagrove", "grove_parts": "feed_forward"},
    "grove-group": {"preset": "kalmagrove", "grove_parts": "all", "sharing": "group"},
    "mix": {"preset": "kalmagrove", "grove_parts": "all", "sharing": "mix"},
    "cycle": {"preset": "kalmagrove", "grove_parts": "all", "group_size": 3},
    "factorised": {"preset": "kalmagrove", "embedding_rank": 12},
    "factorised-untied": {"preset": "llama", "embedding_rank": 12, "tie_word_embeddings": False},
    "untied": {"preset": "llama", "tie_word_embeddings": False},
    "blocks": {"preset": "kalmagrove", "resolutions": [{"num_heads": 2, "head_dim": 8, "scales": [[1, 8], [4, None]]}]},
    "arnold-alone": {"preset": "llama", "attention": "arnold", "resolutions": ARNOLD},
}


def variant(name: str) -> KalmaGroveForCausalLM:
    options = dict(VARIANTS[name])
    config = model_config(options.pop("preset"), SIZES | options)
    model = build_model(config, seed=5).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 99, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", ["llama", "factorised"])
def test_embeddings_may_be_given_in_the_place_of_tokens(name: str) -> None:
    model, ids = variant(name), tokens(9)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_a_model_exports_and_has_torch_funcs_gradients() -> None:
    model, ids = variant("kalmagrove"), tokens(9)
    torch.export.export(model, (ids,), strict=False)
    parameters = dict(model.named_parameters())
    loss = model(ids, labels=ids).loss
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (ids,), {"labels": ids}).loss)(
        parameters
    )
    for name, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-3)


def test_a_factorised_embedding_starts_as_large_as_a_full_one() -> None:
    sizes = {"vocab_size": 4000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model(KalmaGroveConfig(**sizes, embedding_rank=16), seed=0)
    table, full = model.model.embed_tokens.weight, build_model(KalmaGroveConfig(**sizes), seed=0)
    assert table.shape == (4000, 16)
    for product in (table @ model.model.embed_proj.weight.T, table @ model.lm_head_proj.weight):
        assert float(product.detach().std()) == pytest.approx(float(full.output_weight().detach().std()), rel=0.15)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_do_not_depend_on_later_tokens(name: str) -> None:
    model, ids = variant(name), tokens(21)
    before = model(ids).logits
    for position in (1, 7, 20):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 99
        after = model(changed).logits
        assert torch.allclose(after[:, :position], before[:, :position], atol=1e-5)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prompt", [1, 4, 37])
def test_cached_decoding_equals_the_full_forward(name: str, prompt: int) -> None:
    model, ids = variant(name), tokens(40)
    expected = model(ids).logits
    cache = model.new_cache()
    pieces = [model(ids[:, :prompt], cache=cache).logits]
    pieces += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, 40)]
    assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_save_and_load_give_the_same_logits_and_shared_tensors_are_stored_once(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    model, ids = variant(name), tokens(13)
    model.save_pretrained(tmp_path)
    loaded = KalmaGroveForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored == sum(p.numel() for p in model.parameters())


def test_a_loaded_model_still_shares_its_bases(tmp_path: Path) -> None:
    variant("band").save_pretrained(tmp_path)
    layers = KalmaGroveForCausalLM.from_pretrained(tmp_path).model.layers
    assert layers[0].mlp.up_proj._right[1] is layers[1].mlp.up_proj._right[1]


def test_auto_classes_open_our_folders(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = variant("kalmagrove")
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), KalmaGroveConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), KalmaGroveForCausalLM)


@pytest.mark.parametrize("name", ["llama", "kalmagrove"])
def test_generate_with_the_cache_equals_generate_without(name: str) -> None:
    model, ids = variant(name), tokens(9)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 98, "eos_token_id": None}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    step = ids
    for _ in range(12):
        step = torch.cat((step, model(step).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(cached, step)


def test_beam_search_reorders_the_cache() -> None:
    model, ids = variant("kalmagrove"), tokens(6)
    options: dict[str, Any] = {
        "max_new_tokens": 9,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 98,
        "eos_token_id": None,
    }
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", ["llama", "kalmagrove", "untied"])
def test_the_training_loss_equals_the_loss_with_labels(name: str) -> None:
    model, ids = variant(name), tokens(14)
    total = model.token_loss_sum(ids[:, :-1], ids[:, 1:])
    assert torch.allclose(total / 26, model(ids, labels=ids).loss, atol=1e-5)


def test_the_residual_stream_of_a_factorised_embedding_stays_precise_under_autocast() -> None:
    model = variant("factorised")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(5), output_hidden_states=True).hidden_states[1].dtype == torch.float32


def test_the_loss_has_no_second_derivative_and_says_so() -> None:
    model, ids = variant("llama"), tokens(6)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(
            model.token_loss_sum(ids[:, :-1], ids[:, 1:]), model.model.embed_tokens.weight, create_graph=True
        )


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older compilers give wrong gradients, and are refused")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["llama", "kalmagrove", "blocks"])
def test_a_compiled_model_gives_the_same_at_every_length(name: str) -> None:
    torch.compiler.reset()
    model = variant(name).train()
    compiled = torch.compile(lambda ids: model.token_loss_sum(ids[:, :-1], ids[:, 1:]), backend="aot_eager")
    for length in (40, 23, 31):
        losses, gradients = [], []
        for loss_of in (compiled, lambda ids: model.token_loss_sum(ids[:, :-1], ids[:, 1:])):
            loss = loss_of(tokens(length))
            losses.append(loss)
            used = [p for p in model.parameters() if p.requires_grad]
            gradients.append(torch.autograd.grad(loss, used, allow_unused=True))
        torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-4)
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None and ours is not None:
                torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


def test_the_training_loss_works_in_torch_func() -> None:
    model, ids = variant("kalmagrove"), tokens(9)
    weight = "model.norm.weight"

    def loss(norm: torch.Tensor) -> torch.Tensor:
        hidden = torch.func.functional_call(model.model, {"norm.weight": norm}, (ids[:, :-1],)).last_hidden_state
        return linear_cross_entropy(hidden.flatten(0, 1), model.output_weight(), ids[:, 1:].flatten())

    parameter = dict(model.named_parameters())[weight]
    (expected,) = torch.autograd.grad(model.token_loss_sum(ids[:, :-1], ids[:, 1:]), parameter)
    torch.testing.assert_close(torch.func.grad(loss)(parameter.detach()), expected, atol=1e-3, rtol=1e-3)


def test_a_stored_cache_holds_no_more_than_it_counts() -> None:
    model, ids = variant("arnold-alone"), tokens(30)
    cache = model.new_cache()
    model(ids, cache=cache)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for layer in cache.layers for t in layer.values()
    }
    assert sum(held.values()) == cache.num_bytes()


def test_labels_ask_for_all_logits() -> None:
    model, ids = variant("llama"), tokens(6)
    assert torch.equal(model(ids, labels=ids, logits_to_keep=1).loss, model(ids, labels=ids).loss)


def test_labels_of_minus_100_are_left_out() -> None:
    model, ids = variant("llama"), tokens(10)
    labels = ids.clone()
    labels[:, 5:] = -100
    assert torch.allclose(model(ids, labels=labels).loss, model(ids[:, :5], labels=ids[:, :5]).loss, atol=1e-5)


PADDED = ["gpt2", "llama", "kalmagrove", "blocks", "arnold-alone"]


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_computed_as_if_they_were_alone(name: str, side: str) -> None:
    model, ids = variant(name), tokens(23, batch=3)
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 4, 11)):
        mask[row, slice(0, count) if side == "left" else slice(23 - count, 23)] = 0
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    for row in range(3):
        alone = model(ids[row : row + 1, mask[row].bool()], output_hidden_states=True)
        assert torch.allclose(output.logits[row, mask[row].bool()], alone.logits[0], atol=1e-4)
        for states, expected in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert torch.allclose(states[row, mask[row].bool()], expected[0], atol=1e-4)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}], ids=str)
def test_a_padded_batch_generates_what_its_rows_generate_alone(name: str, options: dict[str, Any]) -> None:
    model, ids = variant(name), tokens(14, batch=3)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 98, "eos_token_id": None} | options
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 3, 9)):
        ids[row, :count], mask[row, :count] = 98, 0
    together = model.generate(ids, attention_mask=mask, **options)
    for row, count in enumerate((0, 3, 9)):
        text = ids[row : row + 1, count:]
        alone = model.generate(text, attention_mask=torch.ones_like(text), **options)
        assert torch.equal(together[row, count:], alone[0])


def test_texts_in_two_axes_may_have_padding_behind_them_alone() -> None:
    model, ids = variant("llama"), tokens(4)
    axes = torch.arange(4)[None, :, None].expand(2, -1, 2)
    behind, before = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    alone = model(ids[1:, :2], axes=axes[1:, :2]).logits
    assert torch.allclose(model(ids, attention_mask=behind, axes=axes).logits[1:, :2], alone, atol=1e-5)
    with pytest.raises(ValueError, match="put it behind the texts"):
        model(ids, attention_mask=before, axes=axes)


@pytest.mark.parametrize(
    ("row", "with_cache", "message"),
    [
        ([0, 0, 0, 0], False, "one run of ones in each row"),
        ([1, 0, 1, 1], False, "one run of ones in each row"),
        ([1, 1, 1, 0], True, "padding must come before the texts"),
        ([0, 1, 1, 1, 1], False, "as the tokens"),
    ],
)
def test_masks_with_holes_are_refused(row: list[int], with_cache: bool, message: str) -> None:
    model, ids = variant("kalmagrove"), tokens(4)
    mask = torch.tensor([[1] * len(row), row])
    cache = model.new_cache() if with_cache else None
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=mask, cache=cache)


@pytest.mark.parametrize("name", PADDED)
def test_a_cache_goes_on_after_it_was_stored(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, ids = variant(name), tokens(30)
    mask = torch.ones_like(ids[:, :17])
    mask[1, :5] = 0
    cache = model.new_cache()
    model(ids[:, :17], attention_mask=mask, cache=cache)
    save_file(cache.to_tensors(), tmp_path / "cache.safetensors")
    restored = DecodingCache.from_tensors(load_file(tmp_path / "cache.safetensors"))
    assert restored.num_bytes() == cache.num_bytes() and restored.get_seq_length() == 17
    for place in range(17, 30):
        token = ids[:, place : place + 1]
        assert torch.equal(model(token, cache=restored).logits, model(token, cache=cache).logits)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({}, "length, num_layers is missing"), ({"layers.9.keys": torch.zeros(1)}, "it has a tensor 'layers.9.keys'")],
)
def test_other_tensors_are_no_cache(tensors: dict[str, torch.Tensor], message: str) -> None:
    whole = {"length": torch.tensor(1), "num_layers": torch.tensor(2)} if tensors else {}
    with pytest.raises(ValueError, match=message):
        DecodingCache.from_tensors(whole | tensors)


@pytest.mark.parametrize("name", PADDED)
def test_documents_in_one_sequence_do_not_see_each_other(name: str) -> None:
    options = dict(VARIANTS[name])
    model = build_model(
        model_config(options.pop("preset"), SIZES | options | {"document_mask": True}, eos_token_id=7), seed=5
    ).eval()
    ids = tokens(30).masked_fill(tokens(30) == 7, 8)
    ids[:, 9], ids[:, 19] = 7, 7
    before = model(ids).logits
    for first, last in ((0, 10), (10, 20), (20, 30)):
        changed = (ids + 1) % 99
        changed = changed.masked_fill(changed == 7, 8)
        changed[:, 9], changed[:, 19] = 7, 7
        changed[:, first:last] = ids[:, first:last]
        assert torch.allclose(model(changed).logits[:, first:last], before[:, first:last], atol=1e-5)
    for portion in (1, 7, 10):
        cache = model.new_cache()
        pieces = [model(part, cache=cache).logits for part in ids.split(portion, dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), before, atol=1e-4)
    # And in a padded batch, whose padding is the end-of-text token.
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = ids.masked_fill(mask == 0, 7)
    for cache in (None, model.new_cache()):
        alone = model(ids[1:, 4:]).logits[0]
        assert torch.allclose(model(padded, attention_mask=mask, cache=cache).logits[1, 4:], alone, atol=1e-4)


def test_any_of_several_end_tokens_ends_a_document() -> None:
    model = build_model(model_config("llama", SIZES | {"document_mask": True}, eos_token_id=[7, 9]), seed=0).eval()
    ids = torch.tensor([[1, 2, 9, 3, 4, 7, 5]])
    changed = torch.tensor([[2, 1, 9, 3, 4, 7, 5]])
    assert torch.allclose(model(ids).logits[:, 3:], model(changed).logits[:, 3:], atol=1e-6)


def test_a_document_mask_needs_the_token_that_ends_a_document() -> None:
    model = build_model(model_config("llama", SIZES | {"document_mask": True}), seed=0)
    with pytest.raises(ValueError, match="document_mask needs eos_token_id"):
        model(tokens(5))


def test_a_text_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="the text is 41 tokens long, the model's context is 40"):
        variant("llama")(tokens(41))


def test_adaptors_switch_the_whole_model_and_dense_models_have_none() -> None:
    model, ids = variant("kalmagrove"), tokens(8)
    base = model(ids).logits
    model.add_adaptor("legal")
    model.set_adaptor("legal")
    for name, parameter in model.named_parameters():
        if "adaptors.legal" in name:
            parameter.data.add_(0.1)
    assert not torch.allclose(model(ids).logits, base, atol=1e-3)
    model.set_adaptor(None)
    assert torch.equal(model(ids).logits, base)
    with pytest.raises(ValueError, match="adaptors need projections = grove"):
        variant("llama").add_adaptor("legal")


def test_an_adaptor_is_saved_and_loaded_with_the_model(tmp_path: Path) -> None:
    model, ids = variant("kalmagrove"), tokens(8)
    model.add_adaptor("legal")
    for name, parameter in model.named_parameters():
        if "adaptors.legal" in name:
            parameter.data.normal_()
    model.set_adaptor("legal")
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = KalmaGroveForCausalLM.from_pretrained(tmp_path).eval()
    loaded.set_adaptor("legal")
    assert torch.equal(loaded(ids).logits, expected)


def test_hidden_states_and_tuples_as_transformers_gives_them() -> None:
    model, ids = variant("llama"), tokens(8)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1] @ model.output_weight().T, output.logits)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)


@pytest.mark.parametrize("name", ["letter", "inner-block", "band"])
def test_initial_products_have_the_configured_scale(name: str) -> None:
    options = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 2}
    variant_options = {k: v for k, v in VARIANTS[name].items() if k not in ("preset", "rank")}
    rank = {} if name == "band" else {"rank": 48}
    model = build_model(model_config("kalmagrove", options | variant_options | rank), seed=0)
    std = model.model.layers[0].mlp.up_proj.merged_weight().std().item()
    assert std == pytest.approx(0.02, rel=0.15)


def test_the_seed_alone_decides_the_initial_weights_and_the_global_state_is_left_alone() -> None:
    config = model_config("kalmagrove", SIZES)
    torch.manual_seed(1)
    first = build_model(config, seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    second = build_model(config, seed=3)
    other = build_model(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


CHECKPOINT_NAMES = [
    "model.bases.left.down_proj.bases.0.weight",
    "model.bases.left.o_proj.bases.0.weight",
    "model.bases.right.k_proj.bases.0.weight",
    "model.bases.right.q_proj.bases.0.weight",
    "model.bases.right.up_proj.bases.0.weight",
    "model.bases.right.v_proj.bases.0.weight",
    "model.embed_tokens.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.mlp.down_proj.core",
    "model.layers.1.mlp.up_proj.core",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.1.residual_mix",
    "model.layers.1.self_attn.k_conv.weight",
    "model.layers.1.self_attn.k_proj.core",
    "model.layers.1.self_attn.o_proj.core",
    "model.layers.1.self_attn.pools.0_1.bias",
    "model.layers.1.self_attn.pools.0_1.query",
    "model.layers.1.self_attn.q_proj.core",
    "model.layers.1.self_attn.query_gain",
    "model.layers.1.self_attn.v_conv.weight",
    "model.layers.1.self_attn.v_proj.core",
    "model.layers.1.self_attn.value_mix",
    "model.norm.weight",
]


def test_checkpoint_names_are_a_contract() -> None:
    names = {n for n in variant("band").state_dict() if ".bases.0." in n or ".layers.1." in n or "layers" not in n}
    names = {n for n in names if ".bases." not in n.removeprefix("model.bases") or ".bases.0." in n}
    assert sorted(names) == CHECKPOINT_NAMES
