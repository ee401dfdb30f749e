"""Contestant: the loop of ``litgpt pretrain`` with litgpt's own Llama, in an environment that has litgpt.

With ``--compile`` the model is compiled first, as ``litgpt pretrain`` does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from loop_lab.turns import Race, Turns, race_and_turns


class Windows(Dataset):
    """The windows of all steps, one after the other."""

    def __init__(self, race: Race) -> None:
        self.tokens, self.starts, self.length = race.tokens(), race.starts().flatten(), race.context_length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = self.starts[index]
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype("int64"))


class PausingLoader(DataLoader):
    """Lets the referee in where a loop asks for its next batch: the step before is done then."""

    turns: Turns | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.turns is not None:
            self.turns.begin()
        for number, batch in enumerate(super().__iter__()):
            if number and self.turns is not None:
                self.turns.step_ended()
            yield batch


def stock_llama(race: Race) -> GPT:
    """litgpt's model with the weights of the stock folder."""
    stock = json.loads((Path(race.model_folder) / "config.json").read_text("utf-8"))
    config = Config(
        name="llama",
        block_size=race.context_length,
        vocab_size=stock["vocab_size"],
        padded_vocab_size=stock["vocab_size"],
        n_layer=stock["num_hidden_layers"],
        n_head=stock["num_attention_heads"],
        n_query_groups=stock["num_attention_heads"],
        head_size=stock["head_dim"],
        n_embd=stock["hidden_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=stock["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=stock["intermediate_size"],
        rope_base=int(stock["rope_parameters"]["rope_theta"]),
    )
    model = GPT(config)
    weights: dict[str, torch.Tensor] = {}
    theirs: dict[str, Any] = load_file(str(Path(race.model_folder) / "model.safetensors"))
    copy_weights_hf_llama(config, {}, weights, theirs)
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    model.load_state_dict(weights, strict=True)
    model.transformer.wte.weight = model.lm_head.weight
    return model


def main() -> None:
    """Trains in turns."""
    race, turns = race_and_turns()
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model: Any = stock_llama(race)
    if "--compile" in sys.argv:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), lr=race.lr, weight_decay=0.1, betas=(0.9, 0.95))
    )
    backward = fabric.backward

    def backward_and_remember(loss: torch.Tensor, *arguments: Any, **named: Any) -> None:
        turns.first_loss(float(loss))
        backward(loss, *arguments, **named)

    fabric.backward = backward_and_remember  # type: ignore[method-assign]
    loader = PausingLoader(Windows(race), batch_size=race.batch_size)
    loader.turns = turns
    train = TrainArgs(
        save_interval=None,
        log_interval=race.log_every,
        global_batch_size=race.batch_size,
        micro_batch_size=race.batch_size,
        lr_warmup_steps=0,
        max_tokens=race.steps * race.batch_size * race.context_length,
        max_norm=1.0,
        max_seq_length=race.context_length,
    )
    pretrain.fit(
        fabric=fabric,
        devices=1,
        state={
            "model": model,
            "optimizer": optimizer,
            "train_dataloader": loader,
            "iter_num": 0,
            "step_count": 0,
        },
        train_dataloader=loader,
        # One batch, for the check that the loop begins with.
        val_dataloader=DataLoader(Windows(race), batch_size=1),
        out_dir=Path(race.scratch) / "litgpt",
        tokenizer_dir=None,
        train=train,
        eval=EvalArgs(interval=race.steps + 1, max_iters=1, initial_validation=False, final_validation=False),
    )


if __name__ == "__main__":
    main()
