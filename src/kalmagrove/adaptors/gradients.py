"""Where a text pulls at a frozen model: the mean gradient of each matrix, and the covariances around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.adaptors.bases import Bases, gradient_bases
from kalmagrove.errors import KalmaGroveError

MOST_OF_A_LAYER = 8
"""Directions that one layer may have, relative to the mean."""


class _LayerSums:
    """Sums over tokens for one layer: x x^T, g g^T and g x^T of its inputs and its outputs' gradients."""

    def __init__(self) -> None:
        self.inputs: Tensor | float = 0.0
        self.outputs: Tensor | float = 0.0
        self.gradient: Tensor | float = 0.0

    def watch(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook: takes the inputs, and the gradients when they come."""
        x = inputs[0].detach().flatten(0, -2).float()

        def take(gradient: Tensor) -> None:
            g = gradient.detach().flatten(0, -2).float()
            self.inputs = self.inputs + x.T @ x
            self.outputs = self.outputs + g.T @ g
            self.gradient = self.gradient + g.T @ x

        output.register_hook(take)


def text_bases(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable[Tensor],
    loss_sum: Callable[[Tensor], Tensor],
    rank: int,
) -> dict[str, Bases]:
    """The gradient's bases of every layer for a text; memory is three matrices a layer.

    The directions are those of the steepest slopes in the whole model, so that a layer at which the text pulls more has
    more of them: at least one, at most `MOST_OF_A_LAYER` times the mean.

    Args:
        model: Frozen; its input embeddings are made to ask for gradients meanwhile.
        layers: Those that are adapted, by name.
        batches: Tokens, (sequences, context + 1).
        loss_sum: The summed nats of a batch.
        rank: Directions of a layer in the mean.

    Raises:
        KalmaGroveError: A gradient is not finite.
    """
    sums = {name: _LayerSums() for name in layers}
    handles = [layer.register_forward_hook(sums[name].watch) for name, layer in layers.items()]
    # Frozen layers have gradients only behind something that asks for them.
    handles.append(_embedding_of(model).register_forward_hook(_ask_for_gradient))
    count = 0
    try:
        for tokens in batches:
            loss_sum(tokens).backward()
            count += tokens[:, 1:].numel()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: _bases_of(name, layer, count, MOST_OF_A_LAYER * rank) for name, layer in sums.items()}
    slopes = torch.cat([own for _, own in found.values()])
    lowest = slopes.topk(min(rank * len(found), len(slopes))).values[-1]
    kept = {name: max(1, int((own >= lowest).sum())) for name, (_, own) in found.items()}
    return {name: (left[:, : kept[name]], right[: kept[name]]) for name, ((left, right), _) in found.items()}


def _embedding_of(model: nn.Module) -> nn.Module:
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # Modules have no types.
    return embedding


def _ask_for_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _bases_of(name: str, sums: _LayerSums, count: int, rank: int) -> tuple[Bases, Tensor]:
    if not isinstance(sums.gradient, Tensor) or not bool(sums.gradient.isfinite().all()):
        raise KalmaGroveError(f"layer {name} has no finite gradient for this text; use --bases weights")
    assert isinstance(sums.inputs, Tensor) and isinstance(sums.outputs, Tensor)
    return gradient_bases(sums.gradient / count, sums.inputs / count, sums.outputs / count, rank)
