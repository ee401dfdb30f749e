"""The card of a model's folder: read by the Hub's own reader, true to the result, silent about this machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from kalmagrove.data.packing import PackedText
from kalmagrove.training.checkpoint_model import export_checkpoint
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.trainer import train

CONFIG = TrainConfig(
    model=ModelConfig(preset="llama", hidden_size=32, num_hidden_layers=1, head_dim=8),
    optim=OptimConfig(name="adamw"),
    loop=LoopConfig(
        tokens=4 * 2 * 24, batch_size=2, context_length=24, device="cpu", precision="fp32", save_every=2, seed=5
    ),
)


@pytest.fixture(scope="module")
def run(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "run"
    train(CONFIG, packed, folder, say=lambda line: None)
    return folder


def test_the_card_of_a_finished_run_holds_its_scores(run: Path, packed: PackedText) -> None:
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert set(card.data.tags) == {"kalmagrove", "llama", "adamw"}
    result = json.loads((run / "result.json").read_text())
    for split in ("valid", "test"):
        assert f"| {split} | {result[split]['perplexity']:.4g} |" in card.text
    assert f"{result['parameters']['total']:,}" in card.text and "192 tokens in 4 steps, seed 5" in card.text
    assert packed.source is not None and Path(packed.source).name in card.text
    assert str(Path(packed.source).parent) not in card.text


def test_the_card_of_a_checkpoint_says_that_it_was_not_scored(run: Path, packed: PackedText, tmp_path: Path) -> None:
    export_checkpoint(run, "2", tmp_path / "model", open_data=lambda _: packed)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "was not scored" in card.text and "96 tokens in 2 steps" in card.text


def test_one_run_names_the_optimiser_that_it_had(packed: PackedText, tmp_path: Path) -> None:
    train(replace(CONFIG, optim=OptimConfig(name="muon", lr=0.02)), packed, tmp_path / "run", say=lambda line: None)
    assert "muon, learning rate 0.02" in (tmp_path / "run" / "model" / "README.md").read_text()
