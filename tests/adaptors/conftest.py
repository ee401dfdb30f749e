"""Each kind of model that can be adapted, and a batch for it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

# Test folders are not on the path of imports, and these tests share a few helpers.
sys.path.insert(0, str(Path(__file__).parent))

from adapted_models import BUILDERS, VOCABULARY


@pytest.fixture(params=sorted(BUILDERS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return BUILDERS[request.param]()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(5))
