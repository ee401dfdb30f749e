"""Other densities of a patch, read as `PatchModality` reads it, so that the density is the only difference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.modalities.patch import PatchModality, _log_chance


class _Density(PatchModality):
    """What all have in common; parameters of the density that is replaced are dropped."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("errors", "state_bias", "mixture", "mixture_bias"):
            delattr(self, name)
        self.components = 8 if isinstance(self, WholeMixture) else 4
        self.spread = nn.Parameter(torch.linspace(-0.9, 0.9, self.components)[:, None, None])

    def reset_parameters(self) -> None:
        """Each sets its own when it is made."""

    def linear_means(self, pixels: Tensor) -> Tensor:
        """What the pixels before each pixel say of it, (elements, pixels)."""
        return F.linear(pixels, self.before[0].tril(-1))

    def nats(self, hidden: Tensor, features: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.density(hidden.float(), self._scaled(features[:, : self.pixels].float()))

    def density(self, hidden: Tensor, pixels: Tensor) -> Tensor:
        """Nats (elements,) of ``pixels`` (elements, pixels) between -1 and 1."""
        raise NotImplementedError


class WholeMixture(_Density):
    """Eight components for the whole patch; a component's means are also linear in the pixels before."""

    def __init__(self, hidden_size: int, placeholder: int, **options: Any) -> None:
        super().__init__(hidden_size, placeholder, **options)
        self.head = nn.Linear(hidden_size, self.components * (1 + 2 * self.pixels))

    def density(self, hidden: Tensor, pixels: Tensor) -> Tensor:
        values = self.head(hidden).unflatten(-1, (self.components, -1))
        weights, means, scales = values.split((1, self.pixels, self.pixels), dim=-1)
        means = means + self.spread[..., 0] + self.linear_means(pixels)[:, None]
        chances = _log_chance(pixels[:, None], means, (scales - 2).clamp(-7, 3), self.levels).sum(dim=-1)
        return -torch.logsumexp(weights.squeeze(-1).log_softmax(dim=-1) + chances, dim=-1)


class PixelMixtures(_Density):
    """Four components for each pixel, whose means are also linear in the pixels before."""

    def __init__(self, hidden_size: int, placeholder: int, **options: Any) -> None:
        super().__init__(hidden_size, placeholder, **options)
        self.head = nn.Linear(hidden_size, self.pixels * 3 * self.components)

    def density(self, hidden: Tensor, pixels: Tensor) -> Tensor:
        weights, means, scales = self.head(hidden).unflatten(-1, (self.pixels, 3, self.components)).unbind(dim=-2)
        means = means + self.spread[:, 0, 0] + self.linear_means(pixels)[..., None]
        chances = _log_chance(pixels[..., None], means, (scales - 2).clamp(-7, 3), self.levels)
        return -torch.logsumexp(weights.log_softmax(dim=-1) + chances, dim=-1).sum(dim=-1)


class PixelNade(_Density):
    """NADE (arXiv:1605.02226) of 64 units over the pixels themselves; means are also linear in those before."""

    units = 64

    def __init__(self, hidden_size: int, placeholder: int, **options: Any) -> None:
        super().__init__(hidden_size, placeholder, **options)
        self.head = nn.Linear(hidden_size, self.units)
        self.seen = nn.Parameter(torch.randn(1, self.pixels, self.units) * self.pixels**-0.5)
        self.bias = nn.Parameter(torch.randn(1, self.pixels, self.units) * 0.1)
        self.out = nn.Parameter(torch.zeros(self.pixels, self.units, 3 * self.components))
        self.out_bias = nn.Parameter(torch.zeros(1, self.pixels, 3 * self.components))

    def density(self, hidden: Tensor, pixels: Tensor) -> Tensor:
        terms = pixels[..., None] * self.seen
        states = self.head(hidden)[:, None] + terms.cumsum(dim=1) - terms + self.bias
        mixed = torch.einsum("eph,pho->epo", F.silu(states), self.out) + self.out_bias
        weights, means, scales = mixed.unflatten(-1, (3, self.components)).unbind(dim=-2)
        means = means + self.spread[:, 0, 0] + self.linear_means(pixels)[..., None]
        chances = _log_chance(pixels[..., None], means, (scales - 2).clamp(-7, 3), self.levels)
        return -torch.logsumexp(weights.log_softmax(dim=-1) + chances, dim=-1).sum(dim=-1)


DENSITIES: dict[str, tuple[str, type[PatchModality]]] = {
    "whole": ("mixture of 8 for the whole patch", WholeMixture),
    "pixels": ("mixture of 4 for each pixel", PixelMixtures),
    "nade": ("NADE of 64 units over the pixels", PixelNade),
    "errors": ("**NADE of 32 units over the errors**, as in `PatchModality`", PatchModality),
}
