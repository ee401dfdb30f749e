"""The logits of the next token, step by step, each step with what the model remembers of those before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kalmagrove.models.compressed import CompressedForCausalLM
from kalmagrove.models.decoder import KalmaGroveForCausalLM

NextLogits = Callable[[Sequence[int]], Tensor]
"""From the tokens that are new since its last call to the logits (1, vocabulary) of the one after them."""


def begin_text(model: PreTrainedModel) -> NextLogits:
    """A function that decodes one text; each text has one of its own.

    Args:
        model: Ours, a compressed one, or any causal language model of transformers. Where it gives its cache back that
            is used; one that keeps none reads the whole text again in each step.
    """
    inner = model.decoder if isinstance(model, CompressedForCausalLM) else model
    if isinstance(inner, KalmaGroveForCausalLM):
        return _with_our_cache(inner)
    return _with_cache_of_transformers(model, inner)


def _with_our_cache(decoder: KalmaGroveForCausalLM) -> NextLogits:
    cache = decoder.new_cache()

    def decode(new: Sequence[int]) -> Tensor:
        logits: Tensor = decoder(_batch(new, decoder), cache=cache, logits_to_keep=1).logits
        return logits[:, -1]

    return decode


def _with_cache_of_transformers(model: PreTrainedModel, inner: PreTrainedModel) -> NextLogits:
    """Of any architecture.

    Args:
        model: Is called.
        inner: Whose forward it is: the same, or what a compressed model holds.
    """
    arguments = inspect.signature(inner.forward).parameters
    options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in arguments else {})
    # transformers renamed its cache: the older name is that of older versions.
    name = "cache" if "cache" in arguments else "past_key_values"
    seen: list[int] = []
    cache: Any = None

    def decode(new: Sequence[int]) -> Tensor:
        nonlocal cache
        seen.extend(new)
        if cache is not None:
            options[name] = cache
        outputs = model(input_ids=_batch(seen if cache is None else new, model), **options)
        cache = getattr(outputs, name, None)
        logits: Tensor = outputs.logits
        return logits[:, -1]

    return decode


def _batch(tokens: Sequence[int], model: PreTrainedModel) -> Tensor:
    return torch.tensor([list(tokens)], device=model.device)
