"""Weights of few bits, to be measured on top of a compression: rounded in groups, each with a scale of its own.

Round to nearest on a grid between the smallest and the largest weight of a group, the range shrunk as far as that makes
the squared error smaller. No calibration text is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kalmagrove.nn.compact import CompactBasis, CompactLinear

GROUP = 64
"""Neighbouring weights of a row that share a scale and an offset, 16 bits each."""
TABLE_BITS = 8
"""Bits of embeddings and heads, whatever the matrices have."""
FACTOR_BITS = 8
"""Least bits of compact factors: an error in one is multiplied by the other, and at four bits nothing is left."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SMALLEST_MATRIX = 4096
"""Weights below which a tensor keeps 16 bits."""


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The nearest weights (rows, columns) that can be stored in ``bits`` each."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % GROUP)).reshape(-1, GROUP)
    low, high = padded.amin(dim=1, keepdim=True), padded.amax(dim=1, keepdim=True)
    best = torch.zeros_like(padded)
    least = torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        scale = ((high - low) * shrink / (2**bits - 1)).clamp_min(1e-12).half().float().clamp_min(1e-7)
        offset = (low * shrink).half().float()
        values = ((padded - offset) / scale).round().clamp(0, 2**bits - 1) * scale + offset
        error = (values - padded).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least, values, best)
        least = torch.minimum(error, least)
    return best.reshape(rows, -1)[:, :columns].to(weight.dtype)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> int:
    """Rounds all matrices of a model in place; returns the bytes that its weights then take, shared ones once."""
    least_bits = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            least_bits[id(module.weight)] = TABLE_BITS
        elif isinstance(module, CompactBasis | CompactLinear):
            least_bits |= {id(parameter): FACTOR_BITS for parameter in module.parameters()}
    size = 0.0
    for parameter in model.parameters():
        if parameter.ndim != 2 or parameter.numel() < SMALLEST_MATRIX:
            size += 2 * parameter.numel()
            continue
        own_bits = max(bits, least_bits.get(id(parameter), bits))
        parameter.copy_(rounded(parameter, own_bits))
        groups = parameter.shape[0] * -(-parameter.shape[1] // GROUP)
        size += parameter.numel() * own_bits / 8 + 4 * groups
    return round(size)
