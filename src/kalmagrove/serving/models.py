"""The models of a server: one base, and the base with each of its adaptors, whose weights are in memory once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedModel

from kalmagrove.adaptors.adaptors import Adaptors
from kalmagrove.adaptors.opening import adaptor_folder, adaptor_names
from kalmagrove.adaptors.storage import load_adaptor
from kalmagrove.errors import KalmaGroveError, UsageError, first_line
from kalmagrove.evaluation.generation import OpenModel, open_model
from kalmagrove.models.convert import model_folder
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.serving.errors import RequestError

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class ServedModels:
    """Models by the names that requests give.

    Attributes:
        name: Of the base.
        models: The base under its name, and with an adaptor under NAME:ADAPTOR. One forward at a time: they share the
            base's weights, and each forward switches to its adaptor.
        chat_prompt: Makes a prompt of messages; None where the tokeniser has no chat template.
    """

    name: str
    models: dict[str, OpenModel]
    chat_prompt: Callable[[Messages], str] | None

    def find(self, wanted: str | None) -> tuple[str, OpenModel]:
        """A model and its name, by that name, by its adaptor's alone, or the base where none is given.

        Raises:
            RequestError: There is none of that name.
        """
        name = self.name if wanted is None else wanted
        for known in (name, f"{self.name}:{name}"):
            if known in self.models:
                return known, self.models[known]
        raise RequestError(
            404,
            f"there is no model {name[:100]!r}; there are: {', '.join(self.models)}",
            param="model",
            code="model_not_found",
        )

    def messages_prompt(self, messages: Messages) -> str:
        """The prompt of a conversation, after which the model's answer follows.

        Raises:
            RequestError: The tokeniser has no chat template, or the template refuses the messages.
        """
        if self.chat_prompt is None:
            raise RequestError(
                400,
                f"the tokeniser of {self.name} has no chat template; send the text to /v1/completions",
                code="no_chat_template",
            )
        try:
            return self.chat_prompt(messages)
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            reason = first_line(error)
            raise RequestError(
                400, f"the model's chat template refuses the messages: {reason}", param="messages"
            ) from None


def open_models(source: str, *, name: str | None, adaptors: str, device: str) -> ServedModels:
    """Opens a model once, with its adaptors.

    Args:
        source: A run folder, a model folder or a Hub name.
        name: Of the base in requests; None is the source as it was given.
        adaptors: "all" of the model's, "none", or names with commas between them.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UsageError: There is no such adaptor or device.
        KalmaGroveError: The model or an adaptor cannot be read, or they do not belong together.
    """
    opened = open_model(source, device=device)
    base = source if name is None else name
    cores = opened.model.config.adaptors if isinstance(opened.model, KalmaGroveForCausalLM) else []
    known = [*cores, *(found for found in adaptor_names(source) if found not in cores)]
    chosen = _chosen(adaptors, known)
    beside = [adaptor for adaptor in chosen if adaptor not in cores]
    switch = _switch(opened.model, _loaded(opened.model, source, beside), cores)
    models = {base: replace(opened, turn=switch(None))}
    models |= {f"{base}:{adaptor}": replace(opened, turn=switch(adaptor)) for adaptor in chosen}
    return ServedModels(base, models, _chat_prompt(model_folder(source)))


def _chosen(adaptors: str, known: list[str]) -> list[str]:
    if adaptors in ("all", "none"):
        return known if adaptors == "all" else []
    chosen = [name.strip() for name in adaptors.split(",")]
    for name in chosen:
        if name not in known:
            raise UsageError(f"--adaptors: no adaptor {name!r}; the model has: {', '.join(known) or 'none'}")
    return list(dict.fromkeys(chosen))


def _loaded(model: PreTrainedModel, source: str, names: list[str]) -> Adaptors | None:
    """Adaptors that are kept beside the weights; without any the model has no hooks."""
    if not names:
        return None
    adaptors = Adaptors(model)
    for name in names:
        load_adaptor(adaptors, adaptor_folder(source, name), name=name)
    return adaptors


def _switch(
    model: PreTrainedModel, adaptors: Adaptors | None, cores: list[str]
) -> Callable[[str | None], Callable[[], AbstractContextManager[None]]]:
    """What each forward of a model with an adaptor runs within.

    Args:
        model: The base.
        adaptors: Kept beside it.
        cores: Names of task cores that are saved within it; these are chosen by making weights again.
    """
    active: str | None = None

    def with_adaptor(name: str | None) -> Callable[[], AbstractContextManager[None]]:
        core = name if name in cores else None

        @contextmanager
        def turn() -> Iterator[None]:
            nonlocal active
            if core != active:
                model.set_adaptor(core)
                active = core
            if adaptors is not None:
                adaptors.set_adaptor(name if core is None else None)
            yield

        return turn

    return with_adaptor


def _chat_prompt(folder: str) -> Callable[[Messages], str] | None:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # What is wrong with the files reaches the library's own code, which has no common error for it.
    except Exception as error:
        reason = first_line(error)
        raise KalmaGroveError(f"cannot read a tokeniser from {Path(folder)}: {reason}") from error
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    return lambda messages: str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    )
