"""Where a model's matrices stand: the layers of its decoder, and which of their matrices read the same tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kalmagrove.errors import KalmaGroveError
from kalmagrove.models.compressed import matrix_sizes


@dataclass(frozen=True)
class Matrix:
    """A linear layer of the decoder.

    Attributes:
        name: As the model names it.
        layer: Of the decoder, from 0.
        site: Number of the tensor that it reads: matrices that read one tensor have one site.
        in_features: Of the matrix.
        out_features: Of the matrix.
    """

    name: str
    layer: int
    site: int
    in_features: int
    out_features: int

    @property
    def kind(self) -> str:
        """What it is called in every layer."""
        return self.name.rpartition(".")[2]


def find_matrices(model: PreTrainedModel) -> list[Matrix]:
    """All matrices of the decoder's layers, site by site in the order in which they are computed.

    Embeddings and the output head are not among them.

    Raises:
        KalmaGroveError: The model has no layers with linear parts.
    """
    prefix, layers = decoder_layers(model)
    calls: list[tuple[int, str, nn.Module, Tensor]] = []
    hooks = []
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):

                def record(module: nn.Module, inputs: tuple[Any, ...], number: int = number, name: str = name) -> None:
                    calls.append((number, f"{prefix}.{number}.{name}", module, inputs[0]))

                hooks.append(module.register_forward_pre_hook(record))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    matrices: list[Matrix] = []
    site = 0
    while calls:
        read = calls[0][3]
        for place, name, module, _ in (call for call in calls if call[3] is read):
            matrices.append(Matrix(name, place, site, *matrix_sizes(module)))
        calls = [call for call in calls if call[3] is not read]
        site += 1
    return matrices


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers and its name.

    Raises:
        KalmaGroveError: There is none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear | Conv1D) for m in module.modules())
    ]
    if not found:
        raise KalmaGroveError("this model has no layers with linear parts; there is nothing to compress")
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))
