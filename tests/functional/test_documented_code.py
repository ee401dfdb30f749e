"""The Python examples of the guides run as they stand."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "parts.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_has_an_example_for_each_part() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=["kalma", "grove", "arnold"])
def test_an_example_runs(block: str) -> None:
    torch.manual_seed(0)
    exec(compile(block, str(PAGE), "exec"), {})
