"""A small table whose columns say much about each other, and a model that has learnt it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from kalmagrove.data.example_store import PackedExamples, prepare_examples
from kalmagrove.data.tables.cells import Row
from kalmagrove.data.tables.codec import TableCodec, Value, open_codec
from kalmagrove.data.tables.source import table_source
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.trainer import train

COLUMNS = ("x", "y", "side", "day", "note", "flag")


def table_text(count: int, seed: int) -> str:
    """y is 2 x, side and flag say where x is, day counts x, and the note ends with the side; some y are missing."""
    chance = random.Random(seed)
    lines = [",".join(COLUMNS)]
    for _ in range(count):
        x = chance.uniform(0, 10)
        side = "high" if x > 5 else "low"
        y = "" if chance.random() < 0.1 else f"{2 * x + chance.gauss(0, 0.2):.2f}"
        note = f"{chance.randrange(100, 999)}{'+' if x > 5 else '-'}"
        lines.append(f"{x:.2f},{y},{side},2024-01-{int(2 * x) + 1:02d},{note},{int(x > 5)}")
    return "\n".join(lines) + "\n"


def train_table(text: str, family: str, folder: Path, steps: int) -> PackedExamples:
    """Trains a small model by the real loop; the run is ``folder / "run"``."""
    (folder / "table.csv").write_text(text)
    data = prepare_examples(table_source(str(folder / "table.csv"), seed=0, bins=16), folder / "packed")
    context, batch = data.longest - 1, 16
    loop = LoopConfig(
        tokens=steps * batch * context, batch_size=batch, context_length=context, precision="fp32", device="cpu"
    )
    model = ModelConfig(preset=f"{family}-tiny", hidden_size=32, num_hidden_layers=2, head_dim=16)
    config = TrainConfig(model=model, optim=OptimConfig(name="kalma"), loop=loop)
    train(config, data, folder / "run", say=lambda line: None)
    return data


@dataclass(frozen=True)
class LearntTable:
    """What the tests look at.

    Attributes:
        run: The run folder.
        model: Its model.
        codec: Of the table.
    """

    run: Path
    model: KalmaGroveForCausalLM
    codec: TableCodec

    def place(self, name: str) -> int:
        return self.codec.places[name]

    def values(self, **cells: str | None) -> dict[int, Value]:
        return self.codec.read(Row(Path("new.csv"), 2, dict(cells), typed=False))


def open_learnt(folder: Path, data: PackedExamples) -> LearntTable:
    model = KalmaGroveForCausalLM.from_pretrained(folder / "run" / "model").eval()
    return LearntTable(folder / "run", model, open_codec(data.schema(), data.load_tokenizer()))
