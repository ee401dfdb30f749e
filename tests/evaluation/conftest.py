"""A model of a table, trained once."""

import sys
from pathlib import Path

import pytest

# Test folders are not on the path of imports, and these tests share a few helpers.
sys.path.insert(0, str(Path(__file__).parent))

from table_models import LearntTable, open_learnt, table_text, train_table


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> LearntTable:
    folder = tmp_path_factory.mktemp("table")
    return open_learnt(folder, train_table(table_text(400, seed=0), "kalmagrove", folder, steps=160))
