"""Sampling rules, and decoding of architectures that are not ours."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kalmagrove.evaluation.generation import _next_logits, choose_token

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


@pytest.mark.parametrize("key_value_heads", [4, 2], ids=["converted", "grouped queries, not converted"])
def test_decoding_step_by_step_equals_the_whole_forward(key_value_heads: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=key_value_heads, max_position_embeddings=40,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    next_logits = _next_logits(model)
    ids = [5, 17, 3, 98, 41, 6]
    with torch.inference_mode():
        steps = [next_logits(ids[:3]), *(next_logits([token]) for token in ids[3:])]
        whole = model(torch.tensor([ids])).logits[0, 2:]
    assert torch.allclose(torch.cat(steps), whole, atol=1e-5)
