"""Text from a prompt, token by token, with the model's own decoding cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kalmagrove.adaptors.opening import open_with_adaptor
from kalmagrove.data.tokenizer import end_of_text_id, load_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.models.convert import as_decoder, model_folder
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import choose_device


def choose_token(logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Draws one token for each row of logits (batch, vocabulary); returns (batch,).

    Args:
        logits: Of the last position.
        temperature: 0 takes the likeliest.
        top_k: Only the k likeliest; 0 is all.
        top_p: Only the likeliest whose probabilities reach this sum; 1 is all.
        generator: Of the draw; on the CPU.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1).cpu()
    values, order = probabilities.sort(dim=-1, descending=True)
    keep = values.cumsum(dim=-1) - values < top_p
    if top_k > 0:
        keep[:, top_k:] = False
    drawn = torch.multinomial(values * keep, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1).to(logits.device)


def generate_text(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    device: str = "auto",
    adaptor: str | None = None,
) -> Iterator[str]:
    """Pieces of text as they are generated, until the end-of-text token or the end of the context.

    Args:
        model: A run folder, a model folder or a Hub name.
        prompt: The beginning; empty starts from the end-of-text token.
        max_new_tokens: Most tokens to add.
        temperature: See :func:`choose_token`.
        top_k: See :func:`choose_token`.
        top_p: See :func:`choose_token`.
        seed: Of the draws.
        device: auto, cpu, cuda, cuda:N or mps.
        adaptor: The name of one of the model's adaptors, or its folder; None is the model alone.

    Raises:
        UsageError: An option is out of its range, or the prompt is longer than the context.
        KalmaGroveError: The model cannot be read.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be between 0 and 2**63, got {seed}")
    if not prompt.isprintable() and any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        raise UsageError("the prompt is not valid UTF-8")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UsageError("need --temperature >= 0, --top_k >= 0, 0 < --top_p <= 1 and --max_new_tokens >= 1")
    try:
        chosen_device = choose_device(device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    loaded = open_with_adaptor(model, adaptor).to(chosen_device)
    tokenizer = load_tokenizer(model_folder(model))
    end = end_of_text_id(tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
    limit = loaded.config.max_position_embeddings
    if len(ids) >= limit:
        raise UsageError(f"the prompt has {len(ids)} tokens, the model's context is {limit}; shorten it")
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        return int(choose_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))

    count = min(max_new_tokens, limit - len(ids))
    return _with_composed_weights(loaded, _pieces(_next_logits(loaded), choose, tokenizer, ids, end, count))


def _with_composed_weights(model: PreTrainedModel, pieces: Iterator[str]) -> Iterator[str]:
    with composed_weights(model):
        yield from pieces


def _next_logits(model: PreTrainedModel) -> Callable[[list[int]], Tensor]:
    """A function from the tokens that are new since its last call to the logits (1, vocabulary) of the next one."""
    try:
        decoder = as_decoder(model)
    except KalmaGroveError:
        return _next_logits_without_cache(model)
    cache = decoder.new_cache()

    def decode(new: list[int]) -> Tensor:
        logits: Tensor = decoder(torch.tensor([new], device=model.device), cache=cache, logits_to_keep=1).logits
        return logits[:, -1]

    return decode


def _next_logits_without_cache(model: PreTrainedModel) -> Callable[[list[int]], Tensor]:
    """For architectures that are not ours: slower, and independent of how they keep a cache."""
    seen: list[int] = []

    def decode(new: list[int]) -> Tensor:
        seen.extend(new)
        logits: Tensor = model(input_ids=torch.tensor([seen], device=model.device), use_cache=False).logits
        return logits[:, -1]

    return decode


def _pieces(
    next_logits: Callable[[list[int]], Tensor],
    choose: Callable[[Tensor], int],
    tokenizer: Any,
    prompt: list[int],
    end: int,
    count: int,
) -> Iterator[str]:
    new: list[int] = []
    shown = ""
    feed = prompt
    for _ in range(count):
        with torch.inference_mode():
            token = choose(next_logits(feed))
        if token == end:
            break
        new.append(token)
        feed = [token]
        text = tokenizer.decode(new)
        # A character of several bytes is shown when it is whole.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
