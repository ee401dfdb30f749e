"""Small models of each kind whose layers an adaptor can change, with sides that are all different."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kalmagrove.adaptors import Adaptors
from kalmagrove.models.build import build_model, model_config

VOCABULARY, CONTEXT = 61, 40


def grove(**options: object) -> nn.Module:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "head_dim": 4, "num_attention_heads": 3}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "attention": "full"}
    config = model_config("kalmagrove", sizes | options, bos_token_id=0, eos_token_id=0)
    return build_model(config, seed=1).eval()


def llama() -> nn.Module:
    """With fewer key heads than query heads, which our own decoder does not have."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()


BUILDERS: dict[str, Callable[[], nn.Module]] = {"grove": grove, "llama": llama, "gpt2": gpt2}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def fill(adaptors: Adaptors, name: str, seed: int) -> None:
    """Numbers as a training would leave them, for an adaptor that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for core in adaptors.cores(name).values():
            core.copy_(torch.randn(core.shape, generator=generator) * 0.1)
