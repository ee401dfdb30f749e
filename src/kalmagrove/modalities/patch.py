"""Patches of images: read with their contrast, predicted pixel by pixel by a density that follows its own errors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.modalities.modality import Modality
from kalmagrove.precision import without_autocast

_MIDDLE_LOG_SCALE, _LOG_SCALE_REACH = -2.5, 5.5
"""From -8, at which one of 256 levels has all but 1e-5 of the probability, to 3, at which all of them are alike."""
_NUMBERS_AT_ONCE = 1 << 19
_FEW_PIXELS = 128


class PatchModality(Modality):
    """A square of pixels with whole-numbered levels.

    A patch is read by its pixels, by how they differ from their mean, compressed by asinh, and by where the patch lies
    that follows it (arXiv:2404.09562): behind the pixels its features have that row and column, or one more than there
    are where none follows.

    It is predicted pixel by pixel. The mean of a pixel is linear in the hidden state and in the pixels before it in the
    patch. Those pixels' errors, in levels and compressed by asinh, are added up in a state of ``inner_size`` units that
    the hidden state begins (NADE, arXiv:1605.02226). The state gives the pixel a mixture of logistic distributions
    around that mean; a level has the probability between its bounds (PixelCNN++, arXiv:1701.05517).

    Args:
        hidden_size: Width of the decoder.
        placeholder: The token that stands for a patch.
        patch_size: Pixels of a side.
        channels: Of a pixel.
        levels: Values of a pixel: 0 to ``levels - 1``.
        rows: Of patches in an image.
        columns: Of patches in an image.

    Attributes:
        mixtures: Components of a pixel's distribution.
        inner_size: Units of the state within a patch.
    """

    mixtures, inner_size = 4, 32

    def __init__(
        self,
        hidden_size: int,
        placeholder: int,
        *,
        patch_size: int,
        channels: int,
        levels: int,
        rows: int,
        columns: int,
    ) -> None:
        super().__init__(hidden_size, placeholder)
        sizes = (patch_size, channels, rows, columns)
        if min(sizes) < 1 or levels < 2:
            raise ValueError(
                "patches need at least 2 levels and at least 1 of patch_size, channels, rows and columns; "
                f"got levels {levels} and {sizes}"
            )
        self.channels, self.levels = channels, levels
        mixtures, inner_size = self.mixtures, self.inner_size
        self.pixels = pixels = patch_size * patch_size * channels
        self.feature_size = pixels + 2
        self.pixel_proj = nn.Linear(2 * pixels, hidden_size)
        self.embed_row = nn.Embedding(rows + 1, hidden_size)
        self.embed_column = nn.Embedding(columns + 1, hidden_size)
        self.head = nn.Linear(hidden_size, inner_size + 2 * pixels)
        # Three axes, so that optimisers for matrices leave them alone: no layer multiplies them.
        self.before = nn.Parameter(torch.zeros(1, pixels, pixels))
        self.errors = nn.Parameter(torch.zeros(pixels, 1, inner_size))
        self.state_bias = nn.Parameter(torch.zeros(pixels, 1, inner_size))
        self.mixture = nn.Parameter(torch.zeros(pixels, inner_size, 3 * mixtures))
        self.mixture_bias = nn.Parameter(torch.zeros(pixels, 1, 3 * mixtures))
        self.macs = hidden_size * (inner_size + 4 * pixels) + pixels * (pixels + inner_size * (1 + 3 * mixtures))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Pixels that do not follow one another, and components from dark to light about their mean."""
        self.before.zero_()
        nn.init.normal_(self.errors, std=0.1)
        nn.init.normal_(self.state_bias, std=0.1)
        self.mixture.zero_()
        self.mixture_bias.zero_()
        spread = torch.linspace(-1, 1, self.mixtures, device=self.mixture_bias.device)
        self.mixture_bias[..., self.mixtures : 2 * self.mixtures] = spread

    def encode(self, features: Tensor) -> Tensor:
        levels, places = features[:, : self.pixels].float(), features[:, self.pixels :].long()
        contrast = levels.unflatten(1, (-1, self.channels))
        contrast = torch.asinh((contrast - contrast.mean(dim=1, keepdim=True)) / 2).flatten(1)
        seen = torch.cat((self._scaled(levels), contrast), dim=1)
        encoded: Tensor = self.pixel_proj(seen.to(self.pixel_proj.weight.dtype))
        return encoded + self.embed_row(places[:, 0]) + self.embed_column(places[:, 1])

    def nats(self, hidden: Tensor, features: Tensor) -> Tensor:
        with without_autocast(hidden):
            values = self._begin(hidden)
            size = max(1, _NUMBERS_AT_ONCE // (self.pixels * self.inner_size))
            pixels = self._scaled(features[:, : self.pixels].float())
            # What is worked on at once stays near the processor.
            return torch.cat([self._nats(*part) for part in zip(values.split(size), pixels.split(size), strict=True)])

    def _begin(self, hidden: Tensor) -> Tensor:
        """What the hidden state says before a pixel is known: the state, and a mean and log scale for each pixel.

        bfloat16 would be as coarse as the levels are.
        """
        begun: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return begun.float()

    def _scaled(self, levels: Tensor) -> Tensor:
        """Pixels between -1 and 1."""
        return levels * (2 / (self.levels - 1)) - 1

    def _errors(self, pixels: Tensor, means: Tensor) -> Tensor:
        """How far pixels lie from their means, in levels, compressed."""
        return torch.asinh((pixels - means) * ((self.levels - 1) / 2))

    def _nats(self, begun: Tensor, pixels: Tensor) -> Tensor:
        """Of some patches, (elements,); inside, the pixels of a patch come first: (pixels, elements, ...)."""
        state, means, log_scales = begun.split((self.inner_size, self.pixels, self.pixels), dim=-1)
        pixels, log_scales = pixels.T, log_scales.T
        means = means.T + self.before[0].float().tril(-1) @ pixels
        errors = self._errors(pixels, means)[..., None] * self.errors.float()
        states = state + _sums_before(errors) + self.state_bias.float()
        mixed = torch.baddbmm(self.mixture_bias.float(), F.silu(states), self.mixture.float())
        weights, centres, scales = self._components(mixed, means, log_scales)
        chances = _log_chance(pixels[..., None], centres, scales, self.levels)
        return -torch.logsumexp(weights + chances, dim=-1).sum(dim=0)

    def _components(self, mixed: Tensor, means: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, centres and log scales of the components, (..., mixtures), about means (...)."""
        weights, shifts, relative = mixed.unflatten(-1, (3, self.mixtures)).unbind(dim=-2)
        centres = means[..., None] + _bounded(log_scales).exp()[..., None] * shifts
        return weights.log_softmax(-1), centres, _bounded(log_scales[..., None] + relative)

    @torch.no_grad()
    def sample(self, hidden: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Draws the levels of patches, (elements, pixels), for ``hidden`` (elements, hidden).

        Args:
            hidden: Of the tokens before them.
            generator: Of the draws; on the CPU.
            temperature: Multiplies the scales and sharpens the choice of components; 0 gives means of the likeliest.
        """
        with without_autocast(hidden):
            begun = self._begin(hidden).cpu()
        state, means, log_scales = begun.split((self.inner_size, self.pixels, self.pixels), dim=-1)
        before, follows = self.before[0].float().cpu().tril(-1), self.errors[:, 0].float().cpu()
        biases, mixture = self.state_bias[:, 0].float().cpu(), self.mixture.float().cpu()
        mixture_bias = self.mixture_bias[:, 0].float().cpu()
        pixels = torch.zeros_like(means)
        for place in range(self.pixels):
            mean = means[:, place] + pixels @ before[place]
            mixed = F.silu(state + biases[place]) @ mixture[place] + mixture_bias[place]
            weights, centres, scales = self._components(mixed, mean, log_scales[:, place])
            drawn = _draw(weights, centres, scales.exp(), generator, temperature)
            levels = ((drawn + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1)
            pixels[:, place] = self._scaled(levels)
            state = state + self._errors(pixels[:, place], mean)[:, None] * follows[place]
        return ((pixels + 1) * ((self.levels - 1) / 2)).round().to(hidden.device)


def _sums_before(values: Tensor) -> Tensor:
    """For each place of the first axis the sum of those before it."""
    if len(values) > _FEW_PIXELS:
        return values.cumsum(dim=0) - values
    # As a product, which a processor does faster than running sums and their gradient.
    earlier = torch.ones(len(values), len(values), dtype=values.dtype, device=values.device).tril(-1)
    return (earlier @ values.flatten(1)).view_as(values)


def _bounded(log_scales: Tensor) -> Tensor:
    """Log scales at which the numbers of a density are sound; smoothly, so that none is stuck at a bound."""
    return _MIDDLE_LOG_SCALE + _LOG_SCALE_REACH * torch.tanh(log_scales / _LOG_SCALE_REACH)


def _log_chance(pixels: Tensor, centres: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """Log probability of each level under a logistic distribution; the outermost levels take what lies beyond them."""
    half = 1 / (levels - 1)
    inverse = (-log_scales).exp()
    upper, lower = (pixels - centres + half) * inverse, (pixels - centres - half) * inverse
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    # sigmoid(upper) - sigmoid(lower), without the loss of digits where both are near 0 or 1.
    between = below + above + torch.log(-torch.expm1(-2 * half * inverse))
    return torch.where(pixels < -1 + half, below, torch.where(pixels > 1 - half, above, between))


def _draw(weights: Tensor, centres: Tensor, scales: Tensor, generator: torch.Generator, temperature: float) -> Tensor:
    """A number for each row of components (rows, mixtures); returns (rows,)."""
    if temperature == 0:
        return centres.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(-1)
    chosen = torch.multinomial((weights / temperature).softmax(-1), 1, generator=generator)
    # In float32 a uniform number can be 0, and the tails would end early.
    uniform = torch.rand(chosen.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    noise = (uniform.log() - (-uniform).log1p()) * temperature
    drawn: Tensor = centres.gather(-1, chosen) + scales.gather(-1, chosen) * noise.to(scales.dtype)
    return drawn.squeeze(-1)


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """Bits a pixel and channel, of the nats of an image."""
    return nats / math.log(2) / max(1, dimensions)
