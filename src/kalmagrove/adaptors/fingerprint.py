"""Which base model an adaptor was made for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of a model's parameters, the values as float32.

    The same for a copy, on another device or in a wider number type; another one after any training step.

    Args:
        model: Without merged adaptors.
    """
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(f"{name} {tuple(parameter.shape)} ".encode())
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        total.update(values.flatten().numpy().data)
    return total.hexdigest()
