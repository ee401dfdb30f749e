"""Sampling rules, decoding step by step of every architecture, and text as it comes."""

import copy
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from kalmagrove.data.packing import PackedText
from kalmagrove.evaluation.generated_text import GeneratedText
from kalmagrove.evaluation.generation import OpenModel, Piece, Sampling, choose_token, encode_prompt, generate
from kalmagrove.evaluation.next_logits import begin_text
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.compressed import CompressedForCausalLM
from kalmagrove.models.compressed_config import CompressedConfig
from kalmagrove.models.merging import merge

VOCABULARY = 99
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40,
}  # fmt: skip
OURS = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "head_dim": 8} | {
    "max_position_embeddings": 40
}
FOREIGN: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=40, n_embd=48, n_layer=2, n_head=4)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=8, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=10, **SIZES)),
}
MODELS = FOREIGN | {
    "kalmagrove": lambda: build_model(model_config("kalmagrove", OURS), seed=0),
    "compressed llama": lambda: compressed(FOREIGN["llama"](), "mlp.down_proj"),
    "compressed mistral": lambda: compressed(FOREIGN["mistral"](), "mlp.down_proj"),
    "compressed gpt2": lambda: compressed(FOREIGN["gpt2"](), "mlp.c_proj"),
    "compressed kalmagrove": lambda: compressed(
        merge(build_model(model_config("kalmagrove", OURS), seed=0)), "mlp.down_proj"
    ),
}
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def draws(**options: float) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return [int(choose_token(LOGITS, generator=generator, **(defaults | options))) for _ in range(2000)]  # type: ignore[arg-type]


def test_temperature_zero_is_the_argmax() -> None:
    assert set(draws(temperature=0)) == {0}


def test_draws_follow_the_softmax() -> None:
    counts = torch.bincount(torch.tensor(draws()), minlength=4) / 2000
    assert torch.allclose(counts, LOGITS[0].softmax(0), atol=0.03)


def test_a_high_temperature_flattens() -> None:
    counts = torch.bincount(torch.tensor(draws(temperature=100.0)), minlength=4) / 2000
    assert torch.allclose(counts, torch.full((4,), 0.25), atol=0.04)


def test_top_k_keeps_the_likeliest() -> None:
    assert set(draws(top_k=2)) == {0, 1}


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.65, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(top_p=top_p)) == kept


def test_a_top_p_that_is_nearly_nothing_keeps_the_likeliest() -> None:
    assert set(draws(top_p=1e-50)) == {0}


def compressed(dense: PreTrainedModel, kind: str) -> CompressedForCausalLM:
    """A model whose layers of a kind are factors, with weights of its own."""
    layers = [name for name, _ in dense.named_modules() if name.endswith(kind)]
    width = dict(dense.named_parameters())[f"{layers[0]}.weight"].numel() // 48
    bases = {str(number): [12, width] for number in range(len(layers))}
    config = CompressedConfig(copy.deepcopy(dense.config), bases, dict(zip(layers, bases, strict=True)))
    return CompressedForCausalLM(config)


def model_of(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def count_tokens(model: PreTrainedModel) -> list[int]:
    """The lengths of the texts that the embedding is given from now on."""
    lengths: list[int] = []
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    embedding.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    return lengths


@pytest.mark.parametrize("name", MODELS)
def test_decoding_step_by_step_equals_the_whole_forward_and_reads_each_token_once(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(0, VOCABULARY, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    next_logits = begin_text(model)
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([ids])).logits[0, 2:]
        lengths = count_tokens(model)
        steps = [next_logits(ids[:3]), *(next_logits([token]) for token in ids[3:12]), next_logits(ids[12:14])]
        steps += [next_logits([token]) for token in ids[14:]]
    assert lengths == [3, *[1] * 9, 2, *[1] * 6]
    expected = torch.cat((whole[:10], whole[11:]))
    assert torch.allclose(torch.cat(steps), expected, atol=1e-4)
    assert not torch.allclose(expected[1:], expected[:-1], atol=1e-2)


def test_a_model_that_gives_no_cache_back_reads_the_whole_text_again() -> None:
    model = model_of("llama")
    forward = model.forward
    ids = [5, 17, 3, 98, 41, 6]

    def forgetful(input_ids: torch.Tensor, **_: object) -> object:
        return CausalLMOutput(logits=forward(input_ids).logits)

    with torch.inference_mode():
        whole = model(torch.tensor([ids])).logits[0, 2:]
        lengths = count_tokens(model)
        model.forward = forgetful
        next_logits = begin_text(model)
        steps = [next_logits(ids[:3]), *(next_logits([token]) for token in ids[3:])]
    assert lengths == [3, 4, 5, 6]
    assert torch.allclose(torch.cat(steps), whole, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer(packed: PackedText) -> Tokenizer:
    return packed.load_tokenizer()


@pytest.mark.parametrize(
    "text", ["The river follows 17 gardens.", "na\u00efve \u20ac5 \U0001f600\U0001f600 end", " a\n\n"]
)
def test_pieces_make_the_text_of_all_tokens_and_cut_no_character(text: str, tokenizer: Tokenizer) -> None:
    generated = GeneratedText(tokenizer)
    pieces = [generated.add(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) == text and generated.rest() == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_not_whole_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    generated = GeneratedText(tokenizer)
    tokens = tokenizer.encode("ab\u20ac").ids[:-1]
    assert "".join(generated.add(token) for token in tokens) == "ab"
    assert generated.rest() == tokenizer.decode(tokens)[2:] != ""


STOPS = {
    "none": ((), "The river follows 17 gardens."),
    "inside": (("llows",), "The river fo"),
    "first of two": (("17", "river"), "The "),
    "over tokens": (("s 17 g",), "The river follow"),
    "a beginning that goes on otherwise": (("ver!", "gardens.!"), "The river follows 17 gardens."),
    "at the end": (("dens.",), "The river follows 17 gar"),
    "all": (("T",), ""),
}


@pytest.mark.parametrize("case", STOPS)
def test_nothing_of_a_stop_string_is_given(case: str, tokenizer: Tokenizer) -> None:
    stop, expected = STOPS[case]
    generated, text = GeneratedText(tokenizer, stop), ""
    for token in tokenizer.encode("The river follows 17 gardens.").ids:
        text += generated.add(token)
        assert expected.startswith(text)
        if generated.is_stopped:
            break
    assert text + generated.rest() == expected
    assert generated.is_stopped == (case not in ("none", "a beginning that goes on otherwise"))


def opened(tokenizer: Tokenizer, ends: frozenset[int] = frozenset()) -> OpenModel:
    sizes = OURS | {"vocab_size": tokenizer.get_vocab_size()}
    return OpenModel(build_model(model_config("kalmagrove", sizes), seed=0).eval(), tokenizer, ends, 40)


def test_a_prompt_gets_the_tokens_that_its_tokeniser_wants_before_a_text(tokenizer: Tokenizer) -> None:
    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert encode_prompt(opened(own), "The river") == [0, *encode_prompt(opened(tokenizer), "The river")]
    assert encode_prompt(opened(own), "The river", is_templated=True) == encode_prompt(opened(tokenizer), "The river")


def test_a_text_ends_at_its_most_tokens_at_the_context_or_at_an_end_token(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer)
    prompt = encode_prompt(model, "The river")
    greedy = [list(generate(model, prompt, Sampling(count, temperature=0))) for count in (7, 1000)]
    assert [piece.tokens for piece in greedy[0]] == list(range(1, 8))
    assert [piece.finish for piece in greedy[0]] == [None] * 6 + ["length"]
    assert len(greedy[1]) == 40 - len(prompt) and greedy[1][-1].finish == "length"
    whole = "".join(piece.text for piece in greedy[1])
    first = whole[:1]
    stopped = list(generate(model, prompt, Sampling(1000, temperature=0, stop=(first,))))
    assert stopped[-1].finish == "stop" and "".join(piece.text for piece in stopped) == ""
    with torch.inference_mode():
        likeliest = int(begin_text(model.model)(prompt).argmax())
    ended = list(generate(opened(tokenizer, frozenset([likeliest])), prompt, Sampling(9, temperature=0)))
    assert ended == [Piece("", 1, "stop")]


def test_draws_depend_on_the_seed_alone(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer)
    prompt = encode_prompt(model, "The river")
    texts = ["".join(p.text for p in generate(model, prompt, Sampling(20, 1.0, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
