"""Text from a prompt, token by token: a model is opened once, and any number of texts are generated with it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kalmagrove.adaptors.opening import open_with_adaptor
from kalmagrove.data.compressed import is_unicode
from kalmagrove.data.tokenizer import end_of_text_id, load_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.evaluation.generated_text import GeneratedText
from kalmagrove.evaluation.next_logits import begin_text
from kalmagrove.models.convert import context_of, model_folder
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import choose_device

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to generate, any number of texts at once.

    Attributes:
        model: In evaluation mode, on its device.
        tokenizer: The model's own.
        ends: Tokens that end a text.
        context: Longest text in tokens, the prompt included.
        turn: Makes what each forward runs within: where threads or adaptors share the model, their order.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    ends: frozenset[int]
    context: int
    turn: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: Most tokens to add.
        temperature: See :func:`choose_token`.
        top_k: See :func:`choose_token`.
        top_p: See :func:`choose_token`.
        seed: Of the draws.
        stop: Texts that end the generation.
    """

    max_new_tokens: int
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One more token.

    Attributes:
        text: That is sure now; often empty.
        tokens: Generated so far.
        finish: Of the last piece why it is the last: "stop" at an end-of-text token or a stop string, "length" at the
            most tokens or the end of the context; None before.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


LEAST_TEMPERATURE = 1e-6
"""Below it nothing is left to chance, and a quotient might not be finite."""


def choose_token(logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Draws one token for each row of logits (batch, vocabulary); returns (batch,).

    Args:
        logits: Of the last position.
        temperature: Below `LEAST_TEMPERATURE` the likeliest is taken.
        top_k: Only the k likeliest; 0 is all.
        top_p: Only the likeliest whose probabilities reach this sum; 1 is all.
        generator: Of the draw; on the CPU.
    """
    if temperature < LEAST_TEMPERATURE:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1).cpu()
    values, order = probabilities.sort(dim=-1, descending=True)
    keep = values.cumsum(dim=-1) - values < top_p
    # A top_p that float32 does not hold would keep nothing.
    keep[:, 0] = True
    if top_k > 0:
        keep[:, top_k:] = False
    drawn = torch.multinomial(values * keep, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1).to(logits.device)


def open_model(source: str, *, adaptor: str | None = None, device: str = "auto") -> OpenModel:
    """Reads a model and its tokeniser.

    Args:
        source: A run folder, a model folder or a Hub name.
        adaptor: The name of one of the model's adaptors, or its folder, to be merged; None is the model alone.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UsageError: The device is not here, or there is no such adaptor.
        KalmaGroveError: The model cannot be read.
    """
    chosen_device = choose_device(device)
    model = open_with_adaptor(source, adaptor).to(chosen_device)
    tokenizer = load_tokenizer(model_folder(source))
    # A chat model ends its turn with a token of its own, beside the one that ends a text.
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = frozenset([end_of_text_id(tokenizer), *(own if isinstance(own, list) else [] if own is None else [own])])
    return OpenModel(model, tokenizer, ends, context_of(model.config))


def encode_prompt(opened: OpenModel, prompt: str, *, is_templated: bool = False) -> list[int]:
    """The tokens of a prompt, with those that its tokeniser wants before a text; of none the end-of-text token.

    Args:
        opened: The model.
        prompt: Text.
        is_templated: Whether a chat template wrote it, with all special tokens that it wants.

    Raises:
        UsageError: It is not text.
        KalmaGroveError: The tokeniser does not belong to the model.
    """
    if not is_unicode(prompt):
        raise UsageError("the prompt is not valid UTF-8")
    ids = opened.tokenizer.encode(prompt, add_special_tokens=not is_templated).ids
    ids = ids or [end_of_text_id(opened.tokenizer)]
    if max(ids) >= opened.model.config.vocab_size:
        raise KalmaGroveError("the tokeniser has tokens that its model does not know; put back the model's own")
    return list(ids)


def check_room(opened: OpenModel, prompt: Sequence[int]) -> None:
    """That a prompt leaves room for an answer in the context.

    Raises:
        UsageError: It does not.
    """
    if len(prompt) >= opened.context:
        raise UsageError(f"the prompt has {len(prompt)} tokens, the model's context is {opened.context}; shorten it")


def generate(opened: OpenModel, prompt: Sequence[int], sampling: Sampling) -> Generator[Piece, None, None]:
    """A piece for each token, the last one with the reason why.

    The weights of Grove's layers are made in every step unless the caller holds `composed_weights`.

    Args:
        opened: The model.
        prompt: Tokens, fewer than the context.
        sampling: How tokens are chosen.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    options: dict[str, Any] = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    next_logits, text = begin_text(opened.model), GeneratedText(opened.tokenizer, sampling.stop)
    count = min(sampling.max_new_tokens, opened.context - len(prompt))
    feed = prompt
    for number in range(1, count + 1):
        with opened.turn(), torch.inference_mode():
            logits = next_logits(feed)
        token = int(choose_token(logits, generator=generator, **options))
        if token in opened.ends:
            yield Piece(text.rest(), number, "stop")
            return
        shown = text.add(token)
        if text.is_stopped:
            yield Piece(shown, number, "stop")
            return
        if number == count:
            yield Piece(shown + text.rest(), number, "stop" if text.is_stopped else "length")
            return
        yield Piece(shown, number)
        feed = [token]


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
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UsageError("need --temperature >= 0, --top_k >= 0, 0 < --top_p <= 1 and --max_new_tokens >= 1")
    opened = open_model(model, adaptor=adaptor, device=device)
    tokens = encode_prompt(opened, prompt)
    check_room(opened, tokens)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    return _texts(opened, tokens, sampling)


def _texts(opened: OpenModel, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    with composed_weights(opened.model):
        yield from (piece.text for piece in generate(opened, prompt, sampling) if piece.text)
