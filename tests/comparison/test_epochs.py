"""How often a comparison reads its training split."""

from pathlib import Path

import pytest

from kalmagrove.comparison.collect import epochs_of
from kalmagrove.comparison.config import CompareConfig
from kalmagrove.data.example_store import prepare_examples
from kalmagrove.data.packing import PackedText
from kalmagrove.data.tables.source import table_source
from kalmagrove.training.config import LoopConfig


def config_of(batch_size: int, context_length: int) -> CompareConfig:
    return CompareConfig(loop=LoopConfig(tokens="10k", batch_size=batch_size, context_length=context_length))


@pytest.mark.parametrize("context_length", [8, 64])
def test_examples_are_read_as_a_whole_whatever_the_context_is(context_length: int, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b\n" + "".join(f"{n % 7},{n % 3}\n" for n in range(200)))
    data = prepare_examples(table_source(str(table), seed=0), tmp_path / "packed")
    rows = data.splits["train"].documents
    assert epochs_of(config_of(6, context_length), data, steps=rows) == 6.0


def test_a_text_is_read_by_its_tokens(packed: PackedText) -> None:
    tokens = packed.splits["train"].tokens
    assert epochs_of(config_of(4, 25), packed, steps=7) == pytest.approx(700 / tokens)
