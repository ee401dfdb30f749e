"""What every model shares: norms, rotary positions, short convolution and feed-forward.

Shapes: ``x`` is (batch, sequence, channels); heads are (batch, heads, sequence, head_dim).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.nn.choices import check_choice
from kalmagrove.nn.elementwise import depthwise_convolution, made_again, rms_norm, rotate_halves, squared_relu

FeedForwardKind = Literal["gelu", "swiglu", "relu2"]
NormKind = Literal["rmsnorm", "layernorm"]
MakeProjection = Callable[[str, int, int], nn.Module]
"""Builds the projection of a name, e.g. ``("q_proj", in_features, out_features)``."""


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain for each channel (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(kind: NormKind, hidden_size: int, eps: float) -> nn.Module:
    """The norm of a configuration."""
    check_choice("kind", kind, NormKind)
    if kind == "rmsnorm":
        return RMSNorm(hidden_size, eps)
    return nn.LayerNorm(hidden_size, eps=eps)


class RotaryEmbedding(nn.Module):
    """Rotary positions in the half-split layout of Llama (Su et al., arXiv:2104.09864).

    Positions are absolute token positions, so a pooled key may be placed at the end of its block. In two dimensions the
    planes turn by row and column in turns (arXiv:2409.12191); what has the same of both turns as in one.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates ``x`` (batch, heads, sequence, head_dim) to ``positions``.

        They are (sequence,), (batch, sequence), or rows and columns (batch, sequence, 2).
        """
        planes = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device)
        turned_by = positions.to(torch.float32)
        if positions.ndim == 3:
            turned_by = turned_by[..., torch.arange(self.head_dim // 2, device=x.device) % 2]
        else:
            turned_by = turned_by[..., None]
        angles = turned_by * (1.0 / self.theta ** (planes / self.head_dim))
        if angles.ndim == 3:
            angles = angles[:, None]
        return rotate_halves(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over a few tokens; starts as the identity.

    It is Arnold's finest resolution: each channel sees its last ``kernel_size`` values
    (Canon layers, arXiv:2512.17351).
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        # The shape of a depthwise nn.Conv1d; optimisers for matrices rightly leave it alone.
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity: only the present token counts."""
        self.weight.zero_()
        self.weight[:, 0, -1] = 1.0

    def forward(self, x: Tensor, history: Tensor | None = None, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves ``x`` (batch, sequence, channels).

        Args:
            x: New values.
            history: The last ``kernel_size - 1`` values before ``x``, or None at the start of a text.
            visible: How many tokens back each token may look, (batch, sequence); None is all.

        Returns:
            The convolved values, shape of ``x``, and the history for the next call.
        """
        reach = self.kernel_size - 1
        padded = F.pad(x, (0, 0, reach, 0)) if history is None else torch.cat((history, x), dim=1)
        taps = self.weight.squeeze(1).T.to(x.dtype).contiguous()
        return depthwise_convolution(padded, taps, visible), padded[:, x.shape[1] :]


class FeedForward(nn.Module):
    """Two or three matrices and a non-linearity.

    ``gelu``: GPT-2's. ``swiglu``: Llama's gated form (arXiv:2002.05202). ``relu2``: squared ReLU
    (Primer, arXiv:2109.08668), two matrices and the cheapest on a CPU.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        kind: FeedForwardKind,
        make_projection: MakeProjection,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, FeedForwardKind)
        self.kind = kind
        if kind == "swiglu":
            self.gate_proj = make_projection("gate_proj", hidden_size, intermediate_size)
        self.up_proj = make_projection("up_proj", hidden_size, intermediate_size)
        self.down_proj = make_projection("down_proj", intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden, again = self._activated(x)
        with made_again(hidden, again):
            result: Tensor = self.down_proj(hidden)
        return result

    def _activated(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """The hidden units, and how to make them again from what is kept for the backward."""
        up = self.up_proj(x)
        if self.kind == "swiglu":
            gate = F.silu(self.gate_proj(x))
            return gate * up, lambda: gate.detach() * up.detach()
        if self.kind == "gelu":
            return F.gelu(up, approximate="tanh"), lambda: F.gelu(up.detach(), approximate="tanh")
        return squared_relu(up)
