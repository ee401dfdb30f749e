"""Every architecture: the same function at full size, and folders that others open."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from kalmagrove.adaptors import Adaptors
from kalmagrove.compression.build import compressed_model
from kalmagrove.compression.direct import fit_directly
from kalmagrove.compression.layerwise import LayerwiseFit
from kalmagrove.compression.plan import Choice, Group
from kalmagrove.compression.refit import RefitLength, refit
from kalmagrove.compression.sites import find_matrices
from kalmagrove.compression.statistics import Moments, gather_moments
from kalmagrove.compression.units import find_feed_forwards, order_units
from kalmagrove.models.accounting import count_parameters
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.compressed import CompressedForCausalLM, to_dense
from kalmagrove.models.compressed_config import CompressedConfig
from kalmagrove.models.merging import merge

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 48,
}  # fmt: skip
OURS = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "head_dim": 8, "max_position_embeddings": 48}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
WINDOWS = torch.randint(0, 61, (6, 21), generator=torch.Generator().manual_seed(0))

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **SIZES)),
    "llama-scaled": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, rope_parameters=SCALED, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=10, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=8, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=48, n_embd=24, n_layer=3, n_head=4)),
    "kalmagrove": lambda: merge(build_model(model_config("kalmagrove", OURS), seed=0)),
}


def dense_model(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=WINDOWS[:, :-1]).logits


def choices_of(model: PreTrainedModel, share: float) -> list[Choice]:
    """The first two matrices share a basis; the others have one of their own."""
    matrices = find_matrices(model)
    members = [(0, 1) if matrices[0].site == matrices[1].site else (0,)]
    members += [(number,) for number in range(len(members[0]), len(matrices))]
    groups = [
        Group(own, matrices[own[0]].in_features, sum(matrices[n].out_features for n in own), torch.zeros(0))
        for own in members
    ]
    return [Choice(group, max(1, int(share * group.full_rank))) for group in groups]


def choices_with_units(model: PreTrainedModel, moments: Moments) -> list[Choice]:
    """Every feed-forward loses units; the other matrices are factors."""
    matrices = find_matrices(model)
    feed_forwards = find_feed_forwards(matrices)
    assert len(feed_forwards) == 3
    inside = {number for members in feed_forwards for number in members}
    choices = [choice for choice in choices_of(model, 0.5) if not inside & set(choice.group.members)]
    for *readers, writer in feed_forwards:
        order = order_units(moments.inputs[matrices[writer].site], moments.sensitivities[writer])
        width = matrices[writer].out_features + sum(matrices[number].in_features for number in readers)
        group = Group((*readers, writer), matrices[writer].in_features, width, order.losses, order.order)
        choices.append(Choice(group, 5))
    return choices


def moments_of(model: PreTrainedModel) -> Moments:
    matrices = dict(enumerate(find_matrices(model)))
    return gather_moments(model, matrices, WINDOWS, seed=0, precision="fp32")


def compressed(name: str, share: float, *, with_units: bool = False) -> tuple[CompressedForCausalLM, PreTrainedModel]:
    dense = dense_model(name)
    matrices, moments = find_matrices(dense), moments_of(dense)
    choices = choices_with_units(dense, moments) if with_units else choices_of(dense, share)
    changed = copy.deepcopy(dense)
    fit = LayerwiseFit(changed, matrices, choices, WINDOWS[:, :-1], precision="fp32")
    factors = {number: own for layer in range(3) for number, own in fit.fit(layer, moments).items()}
    return compressed_model(copy.deepcopy(changed), matrices, choices, factors), changed


@pytest.mark.parametrize("name", MODELS)
def test_at_full_size_the_logits_are_the_same(name: str) -> None:
    model, _ = compressed(name, 1.0)
    assert torch.allclose(logits(model), logits(dense_model(name)), atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense_model(name).parameters())


@pytest.mark.parametrize("name", MODELS)
def test_factors_give_what_they_multiply_out_to_in_every_form(name: str, tmp_path: Path) -> None:
    model, changed = compressed(name, 0.5)
    expected = logits(changed)
    assert not torch.allclose(expected, logits(dense_model(name)), atol=1e-2)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    dense = to_dense(model)
    assert type(dense) is type(changed)
    assert torch.allclose(logits(dense), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed").eval()
    assert isinstance(loaded, CompressedForCausalLM)
    assert torch.equal(logits(loaded), logits(model))
    assert (
        count_parameters(loaded).total == sum(p.numel() for p in model.parameters()) < count_parameters(changed).total
    )
    prompt = WINDOWS[:2, :5]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts = [m.generate(prompt, **options) for m in (loaded, dense)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_without_some_units_is_the_one_whose_units_are_zero_in_every_form(name: str, tmp_path: Path) -> None:
    model, changed = compressed(name, 0.5, with_units=True)
    wanted = logits(changed)
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    matrices = find_matrices(dense_model(name))
    assert len(model.config.sizes) == sum(len(members) for members in find_feed_forwards(matrices))
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again), logits(model))
    dense = to_dense(model)
    assert type(dense) is type(changed) and count_parameters(dense).total == count_parameters(changed).total
    torch.testing.assert_close(logits(dense), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"model.layers.0.mlp.up_proj": [24, 99]}, "cannot be cut to 24 inputs and 99 outputs"),
        ({"model.layers.0.mlp.up_proj": [24, 0]}, "cannot be cut"),
    ],
)
def test_a_size_that_a_layer_cannot_have_is_refused(sizes: dict[str, list[int]], said: str) -> None:
    config = CompressedConfig(text_config=dense_model("llama").config, sizes=sizes)
    with pytest.raises(ValueError, match=said):
        CompressedForCausalLM(config)
    with pytest.raises(ValueError, match="has both factors and a size"):
        CompressedConfig(bases={"a": [1, 2]}, factors={"x": "a"}, sizes={"x": [1, 1]})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_adaptor_is_multiplied_out_too(name: str) -> None:
    model, _ = compressed(name, 0.5)
    adaptors = Adaptors(model)
    for core in adaptors.add_adaptor("legal", 2).values():
        core.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    adaptors.set_adaptor("legal")
    expected = logits(model)
    adaptors.merge()
    assert torch.allclose(logits(to_dense(model)), expected, atol=1e-4)


def test_a_refit_draws_nothing_but_its_order() -> None:
    def refitted() -> tuple[PreTrainedModel, float]:
        model, _ = compressed("gpt2", 0.5)
        options = {"batch_size": 2, "seed": 0, "precision": "fp32"}
        result = refit(model, dense_model("gpt2"), WINDOWS[:4], WINDOWS[4:], RefitLength(None, 400), **options)
        return model, result.loss_after

    (first, loss), (second, again) = refitted(), refitted()
    assert loss == again and torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("name", ["llama", "gpt2", "kalmagrove"])
def test_matrices_of_a_site_are_known_by_the_tensor_that_they_read(name: str) -> None:
    first = [matrix for matrix in find_matrices(dense_model(name)) if matrix.layer == 0]
    kinds = {
        "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
        "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
        "kalmagrove": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["up_proj"], ["down_proj"]],
    }
    sites = sorted({matrix.site for matrix in first})
    assert [[m.kind for m in first if m.site == site] for site in sites] == kinds[name]


def test_a_shared_basis_is_stored_once_and_moves_both_readers() -> None:
    model, _ = compressed("llama", 0.5)
    names = list(model.config.factors)[:2]
    assert model.config.factors[names[0]] == model.config.factors[names[1]]
    layers = [model.decoder.get_submodule(name) for name in names]
    assert layers[0].right_factor().equal(layers[1].right_factor())
    before = [layer.merged_weight() for layer in layers]
    with torch.no_grad():
        model.bases[model.config.factors[names[0]]].rest.add_(1.0)
    assert not any(torch.allclose(layer.merged_weight(), old) for layer, old in zip(layers, before, strict=True))


def test_moments_are_those_of_the_definition() -> None:
    dense = dense_model("llama")
    moments = moments_of(dense)
    matrices = find_matrices(dense)
    reads, feels = [], []
    layer = dense.get_submodule(matrices[4].name)
    generator = torch.Generator().manual_seed(0)
    kept: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.extend((inputs[0], output)))
    for row in WINDOWS:
        found = dense(input_ids=row[None, :-1]).logits[0]
        drawn = torch.multinomial(found.softmax(-1), 1, generator=generator)[:, 0]
        (gradient,) = torch.autograd.grad(-found.log_softmax(-1)[torch.arange(20), drawn].sum(), kept[1])
        reads.append(kept[0][0].detach())
        feels.append(gradient[0] @ layer.weight.detach())
        kept.clear()
    hook.remove()
    read, felt = torch.cat(reads), torch.cat(feels)
    assert matrices[4].kind == "gate_proj"
    assert torch.allclose(moments.inputs[matrices[4].site], read.T @ read / len(read), atol=1e-5)
    assert torch.allclose(moments.sensitivities[4], felt.T @ felt / len(felt), rtol=1e-3, atol=1e-7)


def test_following_the_compressed_layers_keeps_their_outputs_closer_to_the_dense_ones() -> None:
    dense = dense_model("llama")
    matrices, choices, moments = find_matrices(dense), choices_of(dense, 0.5), moments_of(dense)
    direct = compressed_model(
        copy.deepcopy(dense), matrices, choices, fit_directly(dense, matrices, choices, lambda layers: moments)
    )
    following, _ = compressed("llama", 0.5)
    wanted = dense(input_ids=WINDOWS[:, :-1], output_hidden_states=True).hidden_states
    errors = [
        (m(input_ids=WINDOWS[:, :-1], output_hidden_states=True).hidden_states[-2] - wanted[-2]).square().mean()
        for m in (following, direct)
    ]
    assert errors[0] < errors[1]
