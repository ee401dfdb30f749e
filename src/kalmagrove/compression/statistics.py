"""What a model's matrices read, and how much its predictions depend on it.

Let a matrix W read x' in the place of x. The Kullback-Leibler divergence of the model's predictions then grows, to
second order, by half of

    trace(H E[(x - x')(x - x')^T]),   H = E[h h^T],   h = W^T g

with g the gradient at the matrix's output of -log p(y), y drawn from the model (the Gauss-Newton matrix, with tokens
taken as independent: Martens and Grosse, arXiv:1503.05671). So two second moments say all that a choice of bases needs:
A = E[x x^T] of what is read, and H of how it is felt. With H = W^T W, which looks at the matrix's own output alone, the
same formulas are the whitened decomposition of SVD-LLM (arXiv:2403.07378).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.sites import Matrix
from kalmagrove.models.merging import dense_weight
from kalmagrove.precision import Precision, autocast


@dataclass(frozen=True)
class Moments:
    """Of matrices, by their numbers in the list of all.

    Attributes:
        inputs: A of what each site reads, (in_features, in_features), by the site's number.
        sensitivities: H of each matrix, (in_features, in_features), in nats by squared unit of the input, a token.
    """

    inputs: dict[int, Tensor]
    sensitivities: dict[int, Tensor]


def gather_moments(
    model: PreTrainedModel,
    matrices: Mapping[int, Matrix],
    windows: Tensor,
    *,
    seed: int,
    precision: Precision,
    progress: Callable[[], None] = lambda: None,
) -> Moments:
    """Both moments of matrices, over windows (windows, context + 1), one window at a time.

    Args:
        model: Dense; its parameters need no gradients.
        matrices: Those that are watched, by number.
        windows: Tokens; the last of each is not read.
        seed: Of the draws from the model's predictions.
        precision: "bf16" or "fp32", of the model's products; the moments are float32.
        progress: Called after each window.
    """
    device = next(model.parameters()).device
    watched = _Watched(model, matrices, device)
    generator = torch.Generator().manual_seed(seed)
    with watched:
        for row in windows:
            tokens = row[None, :-1].to(device)
            # Gradients flow from the first layer on, though no parameter has one.
            embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
            with torch.enable_grad(), autocast(precision, device):
                logits = model(inputs_embeds=embedded).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                nats = F.cross_entropy(logits, drawn.to(device), reduction="sum")
            watched.add_gradients(nats)
            progress()
    tokens_seen = windows.shape[0] * (windows.shape[1] - 1)
    return Moments(
        {number: total / tokens_seen for number, total in watched.inputs.items()},
        {number: total / tokens_seen for number, total in watched.sensitivities.items()},
    )


class _Watched:
    """Hooks that add up what matrices read and, after a backward, what they feel."""

    def __init__(self, model: PreTrainedModel, matrices: Mapping[int, Matrix], device: torch.device) -> None:
        self.layers = {number: model.get_submodule(matrix.name) for number, matrix in matrices.items()}
        sizes = {number: matrix.in_features for number, matrix in matrices.items()}
        self.sensitivities = {number: torch.zeros(size, size, device=device) for number, size in sizes.items()}
        # Matrices of a site read one tensor: it is counted once.
        first = {matrix.site: number for number, matrix in reversed(list(matrices.items()))}
        self.inputs = {site: torch.zeros(sizes[n], sizes[n], device=device) for site, n in first.items()}
        self._site_of = {number: site for site, number in first.items()}
        self._outputs: dict[int, Tensor] = {}

    def __enter__(self) -> _Watched:
        self._hooks = [layer.register_forward_hook(self._keep(number)) for number, layer in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, number: int) -> Callable[..., None]:
        def keep(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            self._outputs[number] = output
            if number in self._site_of:
                rows = _rows(arguments[0])
                self.inputs[self._site_of[number]].addmm_(rows.T, rows)

        return keep

    def add_gradients(self, nats: Tensor) -> None:
        numbers = list(self._outputs)
        gradients = torch.autograd.grad(nats, [self._outputs[number] for number in numbers])
        for number, gradient in zip(numbers, gradients, strict=True):
            felt = _rows(gradient) @ dense_weight(self.layers[number]).detach().float()
            self.sensitivities[number].addmm_(felt.T, felt)
        self._outputs.clear()


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float()
