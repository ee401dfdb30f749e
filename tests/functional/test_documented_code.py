"""The Python examples of the guides run as they stand."""

import re
from pathlib import Path

import pytest
import torch

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in ("parts", "kalma", "grove", "arnold", "adapt")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (GUIDES / f"{page}.md").read_text(), re.DOTALL))
]


def test_the_pages_have_an_example_for_each_part_and_for_the_optimiser() -> None:
    assert len(BLOCKS) == 8


# Of transformers, when peft asks it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs(block: str) -> None:
    torch.manual_seed(0)
    exec(compile(block, "<guide>", "exec"), {})
