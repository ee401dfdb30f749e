"""The first losses of every preset on a fixed text: a refactoring must not move them.

After a change of the mathematics on purpose, ``python tests/functional/test_stored_losses.py`` writes them anew, and
the changelog says so.
"""

import json
import tempfile
from pathlib import Path

import pytest

from kalmagrove.data.packing import PackedText, prepare
from kalmagrove.models.presets import FAMILIES
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run import TrainingRun

STORED = Path(__file__).parent / "stored_losses.json"
OPTIMIZERS = ("adamw", "muon", "soap", "kalma")


def fixed_text(folder: Path) -> PackedText:
    stories = [
        f"Story {n}. " + " ".join(str(n * k % 97) + " steps along the river;" for k in range(60)) for n in range(40)
    ]
    text = folder / "fixed.txt"
    text.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return prepare(str(text), folder / "packed", vocab_size=300)


def first_losses(data: PackedText, family: str, optimizer: str) -> list[float]:
    loop = LoopConfig(tokens="2304", batch_size=4, context_length=48, precision="fp32", device="cpu")
    model = ModelConfig(preset=family, hidden_size=32, num_hidden_layers=3, head_dim=8)
    run = TrainingRun(TrainConfig(model=model, optim=OptimConfig(name=optimizer), loop=loop), data)  # type: ignore[arg-type]
    return [round(run.train_step().loss, 5) for _ in range(run.total_steps)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedText:
    return fixed_text(tmp_path_factory.mktemp("fixed"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_first_losses_are_the_stored_ones(family: str, optimizer: str, data: PackedText) -> None:
    stored = json.loads(STORED.read_text())[f"{family} {optimizer}"]
    found = first_losses(data, family, optimizer)
    # Machines differ in the last digits; bfloat16 products in Kalma and Muon, and bases by QR, differ a little more,
    # the more so the longer it goes.
    late = 1e-4 if optimizer == "adamw" else 1e-2
    assert found[0] == pytest.approx(stored[0], rel=1e-5)
    assert found[:4] == pytest.approx(stored[:4], rel=min(late, 2e-3))
    assert found == pytest.approx(stored, rel=late)


def main() -> None:
    """Writes the stored losses."""
    with tempfile.TemporaryDirectory() as folder:
        data = fixed_text(Path(folder))
        losses = {f"{f} {o}": first_losses(data, f, o) for f in FAMILIES for o in OPTIMIZERS}
    STORED.write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    main()
