"""Contestant: a plain loop in nanoGPT's style, with ``LlamaForCausalLM`` of transformers.

As its train.py does: the memory-mapped file is opened for every batch, the next batch is made right after the forward,
AdamW with betas 0.9 and 0.95, clipping at 1, the loss printed every few steps.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from loop_lab.turns import Race, race_and_turns


def get_batch(race: Race, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, (batch, context) each."""
    data, length = race.tokens(), race.context_length
    x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
    return x, y


def main() -> None:
    """Trains in turns."""
    race, turns = race_and_turns()
    model = LlamaForCausalLM.from_pretrained(race.model_folder).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=race.lr, betas=(0.9, 0.95))
    starts = race.starts()
    turns.begin()
    x, y = get_batch(race, starts[0])
    t0 = time.time()
    for step in range(race.steps):
        for group in optimizer.param_groups:
            group["lr"] = race.lr * (1 - step / race.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=x, use_cache=False).logits
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)
        x, y = get_batch(race, starts[min(step + 1, race.steps - 1)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            turns.first_loss(loss.item())
        if step % race.log_every == 0:
            t1 = time.time()
            print(f"iter {step}: loss {loss.item():.4f}, time {(t1 - t0) * 1000:.2f}ms", flush=True)
            t0 = t1
        turns.step_ended()


if __name__ == "__main__":
    main()
