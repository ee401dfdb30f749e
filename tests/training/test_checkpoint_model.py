"""A checkpoint's model can be written, opened and scored like a finished run's."""

from pathlib import Path

import pytest
import torch

from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import load_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.models.convert import load_model
from kalmagrove.training.checkpoint_model import export_checkpoint
from kalmagrove.training.config import LoopConfig, ModelConfig, TrainConfig
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.session import TrainingSession

CONFIG = TrainConfig(
    model=ModelConfig(hidden_size=32, num_hidden_layers=2, head_dim=8),
    loop=LoopConfig(
        tokens=9 * 2 * 24,
        batch_size=2,
        context_length=24,
        device="cpu",
        precision="fp32",
        save_every=3,
        keep_last=2,
        keep_best=1,
        eval_every=2,
        log_every=1,
    ),
)


@pytest.fixture
def run(packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[int, torch.Tensor]]:
    """A run that was left after step 6, whose second evaluation was its best, and its logits at each step."""
    monkeypatch.setattr(TrainingRun, "validation_loss", lambda self: {2: 4.0, 4: 3.0, 6: 3.5}[self.step])
    session = TrainingSession(CONFIG, packed, tmp_path / "run")
    logits = {}
    for _ in range(6):
        session.advance()
        with torch.no_grad():
            logits[session.run.step] = session.run.model.eval()(session.run.batch(0)[:, :20]).logits
        session.run.model.train()
    session.close()
    return tmp_path / "run", logits


@pytest.mark.parametrize(("which", "step"), [("best", 4), ("last", 6), ("3", None), ("4", 4)])
def test_the_model_of_a_checkpoint_is_that_of_its_step(
    which: str, step: int | None, run: tuple[Path, dict[int, torch.Tensor]], packed: PackedText, tmp_path: Path
) -> None:
    folder, logits = run
    if step is None:
        with pytest.raises(UsageError, match="must be last, best or one of the steps 4, 6, got '3'"):
            export_checkpoint(folder, which, tmp_path / "model", open_data=lambda _: packed)
        return
    assert export_checkpoint(folder, which, tmp_path / "model", open_data=lambda _: packed) == step
    with torch.no_grad():
        assert torch.equal(
            load_model(tmp_path / "model")(TrainingRun(CONFIG, packed).batch(0)[:, :20]).logits, logits[step]
        )
    assert load_tokenizer(str(tmp_path / "model")).to_str() == packed.load_tokenizer().to_str()


def test_what_is_no_run_or_no_free_folder_is_refused(
    run: tuple[Path, dict[int, torch.Tensor]], packed: PackedText, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="holds no checkpoint"):
        export_checkpoint(tmp_path, "last", tmp_path / "model", open_data=lambda _: packed)
    with pytest.raises(UsageError, match="exists and is not empty"):
        export_checkpoint(run[0], "last", run[0], open_data=lambda _: packed)
    (run[0] / "config.yaml").write_text("model: 3\n")
    with pytest.raises(KalmaGroveError, match="is not the folder of a training run"):
        export_checkpoint(run[0], "last", tmp_path / "model", open_data=lambda _: packed)
    assert not (tmp_path / "model").exists()
