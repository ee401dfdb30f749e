"""A small model with a chat template and adaptors, and a server of it as a process of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kalmagrove.adaptors import Adaptors, save_adaptor
from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import save_tokenizer
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import load_model, save_model

sys.path.insert(0, str(Path(__file__).parent))

from serving_client import Server

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTEXT = 6000


@pytest.fixture(scope="session")
def folder(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "book"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "max_position_embeddings": CONTEXT}
    config = model_config("kalmagrove", sizes | {"vocab_size": packed.vocab_size}, bos_token_id=0, eos_token_id=0)
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_model(model, folder)
    save_tokenizer(packed.load_tokenizer(), folder, context_length=CONTEXT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    adaptors = Adaptors(load_model(folder))
    # The numbers of the last one are finite, and what is computed with them is not.
    for name, size in {"legal": 1.0, "medical": 1.0, "overflowing": 1e38}.items():
        with torch.no_grad():
            for core in adaptors.add_adaptor(name, rank=4).values():
                core.normal_(generator=generator).mul_(size)
        save_adaptor(adaptors, name, folder / "adaptors" / name / "adaptor")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server.started(
        folder, "--name", "book", "--concurrency", "2", "--queue", "1", "--max_tokens", "9000"
    ) as server:
        yield server
