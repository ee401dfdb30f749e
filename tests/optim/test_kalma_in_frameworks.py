"""Kalma where other people's training loops call it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.kalma import Kalma


def regression(rows: int = 96) -> TensorDataset:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2:].sum(1)], dim=1))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def tiny_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_a_gpt2_of_transformers_is_watched_whole() -> None:
    model = tiny_gpt2()
    groups = kalma_groups(model)
    optimizer = Kalma(groups)
    assert optimizer.attach(model) == 8
    fused = next(group for group in groups if group["split_sizes"] is not None)
    assert fused["transposed"] and fused["split_sizes"] == (24, 24, 24)
    assert all(name.endswith("c_attn.weight") for name in fused["names"])
    ids = torch.arange(12).repeat(2, 1) % 5
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = tiny_gpt2()
    optimizer = Kalma(kalma_groups(model))
    optimizer.attach(model)
    ids = (torch.arange(16) % 5).tolist()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=50, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.02, report_to=[], save_steps=25, logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8, optimizers=(optimizer, None)
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.4 * losses[0]
    assert "gain" in optimizer.state[model.transformer.h[0].mlp.c_fc.weight]
    assert (tmp_path / "checkpoint-25" / "optimizer.pt").is_file()


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = perceptron()
    optimizer = Kalma(kalma_groups(model, auxiliary_lr=0.03))
    optimizer.attach(model)
    loader = DataLoader(regression(), batch_size=12)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(40):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(x), y)
                accelerator.backward(loss)
                wrapped.step()
                wrapped.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert optimizer.param_groups[0]["step"] == 160


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Regression(lightning.LightningModule):
        """Two layers, trained by Kalma."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = perceptron()
            self.losses: list[float] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = F.mse_loss(self.layers(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = Kalma(kalma_groups(self.layers, auxiliary_lr=0.03))
            optimizer.attach(self.layers)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer)}

    module = Regression()
    trainer = lightning.Trainer(
        max_epochs=15, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(regression(), batch_size=12))
    assert sum(module.losses[-8:]) < 0.5 * sum(module.losses[:8])
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    state = torch.load(tmp_path / "model.ckpt", weights_only=False)["optimizer_states"][0]
    assert state["param_groups"][0]["method"] == "kalma"
