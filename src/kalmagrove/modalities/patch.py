"""Patches of images: read by a projection of their pixels, predicted by a density of all of them together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.modalities.modality import Modality

SMALLEST_LOG_SCALE = -7.0


class PatchModality(Modality):
    """A square of pixels with whole-numbered levels.

    The density is a mixture whose components say how all pixels go together, each pixel by a discretised logistic
    distribution (PixelCNN++, Salimans et al., arXiv:1701.05517). Within the patch a pixel's mean also follows the pixels
    before it, linearly, so that next to nothing has to be said about smooth areas.

    Args:
        hidden_size: Width of the decoder.
        placeholder: The token that stands for a patch.
        patch_size: Pixels of a side.
        channels: Of a pixel.
        levels: Values of a pixel: 0 to ``levels - 1``.
        mixtures: Components of the density.
    """

    def __init__(
        self, hidden_size: int, placeholder: int, *, patch_size: int, channels: int, levels: int, mixtures: int = 8
    ) -> None:
        super().__init__(hidden_size, placeholder)
        if min(patch_size, channels, mixtures) < 1 or levels < 2:
            raise ValueError(
                "patches need patch_size, channels and mixtures of at least 1 and at least 2 levels, got "
                f"{patch_size}, {channels}, {mixtures} and {levels}"
            )
        self.patch_size, self.channels, self.levels, self.mixtures = patch_size, channels, levels, mixtures
        self.feature_size = size = patch_size * patch_size * channels
        self.pixel_proj = nn.Linear(size, hidden_size)
        self.head = nn.Linear(hidden_size, mixtures * (1 + 2 * size))
        # Three axes, so that optimisers for matrices leave it alone: no layer multiplies it.
        self.before = nn.Parameter(torch.zeros(1, size, size))
        self.component_means = nn.Parameter(torch.linspace(-0.9, 0.9, mixtures).reshape(mixtures, 1, 1))
        self.macs = hidden_size * (size + mixtures * (1 + 2 * size)) + size * size

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Pixels that do not follow each other, and components from dark to light."""
        self.before.zero_()
        spread = torch.linspace(-0.9, 0.9, self.mixtures, device=self.component_means.device)
        self.component_means.copy_(spread.reshape(self.mixtures, 1, 1))

    def scaled(self, features: Tensor) -> Tensor:
        """Pixels between -1 and 1."""
        return features * (2 / (self.levels - 1)) - 1

    def encode(self, features: Tensor) -> Tensor:
        encoded: Tensor = self.pixel_proj(self.scaled(features).to(self.pixel_proj.weight.dtype))
        return encoded

    def density(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights (elements, mixtures), means and log scales (elements, mixtures, pixels) of the components.

        The means are those of pixels whose predecessors are grey; `nats` moves them.
        """
        values = self.head(hidden).float().unflatten(-1, (self.mixtures, -1))
        weights, means, scales = values.split((1, self.feature_size, self.feature_size), dim=-1)
        means = means + self.component_means.squeeze(-1).float()
        return weights.squeeze(-1).log_softmax(-1), means, (scales - 2).clamp(min=SMALLEST_LOG_SCALE)

    def nats(self, hidden: Tensor, features: Tensor) -> Tensor:
        weights, means, log_scales = self.density(hidden)
        pixels = self.scaled(features.float())
        means = means + F.linear(pixels, self.before[0].float().tril(-1))[:, None]
        chances = _log_chance(pixels[:, None], means, log_scales, self.levels).sum(-1)
        return -torch.logsumexp(weights + chances, dim=-1)

    @torch.no_grad()
    def sample(self, hidden: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Draws patches, (elements, feature_size), for ``hidden`` (elements, hidden).

        Args:
            hidden: Of the tokens before them.
            generator: Of the draws; on the CPU.
            temperature: Multiplies the scales and sharpens the choice of components; 0 gives means of the likeliest.
        """
        weights, means, log_scales = (value.cpu() for value in self.density(hidden))
        if temperature == 0:
            chosen = weights.argmax(-1)
        else:
            chosen = torch.multinomial((weights / temperature).softmax(-1), 1, generator=generator).squeeze(-1)
        rows = torch.arange(len(chosen))
        means, scales = means[rows, chosen], log_scales[rows, chosen].exp() * temperature
        uniform = torch.rand(means.shape, generator=generator).clamp(1e-5, 1 - 1e-5)
        noise = scales * (uniform.log() - (-uniform).log1p())
        lower, pixels = self.before[0].float().cpu().tril(-1), torch.zeros_like(means)
        for place in range(self.feature_size):
            drawn = means[:, place] + pixels @ lower[place] + noise[:, place]
            level = ((drawn + 1) * (self.levels - 1) / 2).round().clamp(0, self.levels - 1)
            pixels[:, place] = level * (2 / (self.levels - 1)) - 1
        return ((pixels + 1) * (self.levels - 1) / 2).round().to(hidden.device)


def _log_chance(pixels: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """Log probability of each level under a logistic distribution; the outermost levels take what lies beyond them."""
    half = 1 / (levels - 1)
    inverse = (-log_scales).exp()
    upper, lower = (pixels - means + half) * inverse, (pixels - means - half) * inverse
    below = F.logsigmoid(upper)
    above = F.logsigmoid(-lower)
    # sigmoid(upper) - sigmoid(lower), without the loss of digits where both are near 0 or 1.
    between = below + above + torch.log1p(-(lower - upper).exp())
    return torch.where(pixels < -1 + half, below, torch.where(pixels > 1 - half, above, between))


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """Bits a pixel and channel, of the nats of an image."""
    return nats / math.log(2) / max(1, dimensions)
