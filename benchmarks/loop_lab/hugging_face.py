"""Contestant: ``transformers.Trainer`` with ``LlamaForCausalLM``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from loop_lab.turns import Race, Turns, race_and_turns


class Windows(Dataset):
    """The windows of all steps, one after the other."""

    def __init__(self, race: Race) -> None:
        self.tokens, self.starts, self.length = race.tokens(), race.starts().flatten(), race.context_length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.starts[index]
        window = torch.from_numpy(self.tokens[start : start + self.length + 1].astype("int64"))
        # Targets are given as they are, so that the last token of a window is scored as in the other loops.
        return {"input_ids": window[:-1], "labels": window[1:], "shift_labels": window[1:]}


class Pause(TrainerCallback):
    """Waits for the referee between steps."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turns.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.step_ended()


class LossKeepingTrainer(Trainer):
    """Remembers the loss of the first step."""

    turns: Turns

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        self.turns.first_loss(float(loss))
        return loss


def main() -> None:
    """Trains in turns."""
    race, turns = race_and_turns()
    model = LlamaForCausalLM.from_pretrained(race.model_folder)
    arguments = TrainingArguments(
        output_dir=str(Path(race.scratch) / "trainer"),
        max_steps=race.steps,
        per_device_train_batch_size=race.batch_size,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=race.lr,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        logging_steps=race.log_every,
        save_strategy="no",
        report_to=[],
    )
    trainer = LossKeepingTrainer(model, arguments, train_dataset=Windows(race), callbacks=[Pause(turns)])
    trainer.turns = turns
    trainer.train()


if __name__ == "__main__":
    main()
