"""A text that goes through a model layer by layer, so that one layer can be changed before the next one is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.sites import decoder_layers
from kalmagrove.models.decoder import DecoderLayer
from kalmagrove.precision import Precision, autocast

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward whose first layer was reached."""


class LayerStream:
    """What the layers of a model make of windows of tokens, one layer after the other.

    The hidden states of all windows are kept, the layers' other arguments (positions, masks) once: they are the same
    for windows of one length.

    Args:
        model: In evaluation mode; its layers may be changed while the stream is before them.
        windows: Tokens, (windows, context).
        precision: "bf16" or "fp32", of the products.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, windows: Tensor, *, precision: Precision) -> None:
        self.layers = decoder_layers(model)[1]
        self.precision = precision
        self.device = next(model.parameters()).device
        self._calls = _record_calls(model, self.layers, windows[:1].to(self.device))
        self.states = torch.stack([_first_state(model, self.layers[0], row[None].to(self.device)) for row in windows])
        # Our own layers also read the embeddings and the first layer's values.
        self._embedded = self.states.clone() if isinstance(self.layers[0], DecoderLayer) else None
        self._first_values: list[Tensor] = []

    @torch.no_grad()
    def inputs_of(self, layer: int, module: nn.Module, part: nn.Module) -> Iterator[Tensor]:
        """What a part of a layer reads in each window, (context, features); the stream stays before the layer.

        Args:
            layer: That the stream is before.
            module: The layer, or another one in its place.
            part: Of the module; what comes behind it is not computed.
        """
        found: list[Tensor] = []

        def stop(part: nn.Module, arguments: tuple[Any, ...]) -> None:
            found.append(arguments[0][0].float())
            raise _Stop

        for window in range(len(self.states)):
            hook = part.register_forward_pre_hook(stop)
            try:
                with suppress(_Stop):
                    self._output(layer, module, window)
            finally:
                hook.remove()
            yield found.pop()

    @torch.no_grad()
    def advance(self, layer: int, module: nn.Module) -> None:
        """Lets all windows through a layer, or through another one in its place."""
        for window in range(len(self.states)):
            output, values = self._output(layer, module, window)
            self.states[window] = output
            if layer == 0 and values is not None:
                self._first_values.append(values)

    def _output(self, layer: int, module: nn.Module, window: int) -> tuple[Tensor, Tensor | None]:
        arguments, keywords = self._calls[layer]
        x = self.states[window][None]
        with autocast("bf16" if self.precision == "bf16" else "fp32", self.device):
            if isinstance(module, DecoderLayer):
                assert self._embedded is not None
                first = self._first_values[window] if layer > 0 else None
                output, values = module(x, self._embedded[window][None], first, *arguments[3:], **keywords)
                return output[0].float(), values
            output = module(x, *arguments[1:], **keywords)
        return (output[0] if isinstance(output, tuple) else output)[0].float(), None


def _record_calls(model: PreTrainedModel, layers: nn.ModuleList, row: Tensor) -> list[_Call]:
    calls: list[_Call] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not arguments:
            keywords = dict(keywords)
            arguments = (keywords.pop("hidden_states"),)
        calls.append((arguments, keywords))

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=row, **({} if isinstance(layers[0], DecoderLayer) else {"use_cache": False}))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _first_state(model: PreTrainedModel, layer: nn.Module, row: Tensor) -> Tensor:
    found: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else keywords["hidden_states"])
        raise _Stop

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Stop):
            model(input_ids=row)
    finally:
        hook.remove()
    return found[0][0].float()
