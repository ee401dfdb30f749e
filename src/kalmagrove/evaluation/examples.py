"""Scores of a model on packed examples: nats a token and by kind, and bits a byte."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from kalmagrove.data.example_store import PackedExamples
from kalmagrove.evaluation.perplexity import Scores, scores_from_nats
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.scoring import evaluating
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import Precision, autocast
from kalmagrove.world import ALONE, World

TOKENS_AT_ONCE = 1 << 13


def score_examples(
    model: KalmaGroveForCausalLM,
    data: PackedExamples,
    split: str,
    *,
    device: torch.device,
    precision: Precision,
    most: int | None = None,
    world: World = ALONE,
) -> Scores:
    """Scores of the examples of a split, in orders of their parts that are always the same.

    Args:
        model: Knows the data's modalities.
        data: The examples.
        split: train, valid or test.
        device: Of the model.
        precision: Of the forward.
        most: Only so many examples, the first; None is all.
        world: Processes that share the work; all of them call this together and get the same.
    """
    count = min(data.splits[split].documents, most or data.splits[split].documents)
    size = max(1, TOKENS_AT_ONCE // data.longest)
    nats: dict[str, float] = defaultdict(float)
    elements: dict[str, int] = defaultdict(int)
    with evaluating(model), torch.no_grad(), composed_weights(model):
        for first in range(world.rank * size, count, world.size * size):
            rows = data.rows(split, range(first, min(first + size, count))).to(device)
            inputs, targets = rows[:, :-1], rows[:, 1:]
            with autocast(precision, device):
                found = model.nats_by_kind(inputs, targets)
            for kind, values in found.items():
                nats[kind] += float(values.sum())
                elements[kind] += targets.numel() if kind == "token" else values.numel()
    kinds = ["token", *data.modalities]
    sums = world.sum([float(values[kind]) for values in (nats, elements) for kind in kinds], device)
    by_kind: dict[str, Any] = {
        kind: {"nats": sums[place], "elements": int(sums[place + len(kinds)])} for place, kind in enumerate(kinds)
    }
    info, share = data.splits[split], count / data.splits[split].documents
    scores = scores_from_nats(
        sum(sums[: len(kinds)]),
        tokens=by_kind["token"]["elements"],
        words=round(info.words * share),
        text_bytes=round(info.bytes * share),
    )
    return replace(scores, kinds=by_kind)
