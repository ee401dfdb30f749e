"""A small Llama with grouped queries, trained briefly, and its text."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import save_tokenizer

CONTEXT = 32


@pytest.fixture(scope="session")
def llama_folder(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a tokeniser."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=packed.vocab_size, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    tokens = torch.from_numpy(packed.tokens("train").astype("int64"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(len(tokens) - CONTEXT, (16, 1), generator=generator)
        batch = tokens[starts + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    save_tokenizer(packed.load_tokenizer(), folder, context_length=64)
    return folder
