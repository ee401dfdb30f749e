"""Which device and number type a machine trains with: one function each, to be tested and printed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from kalmagrove.errors import UsageError

Precision = Literal["bf16", "fp32"]
"""Of the matrix products; what is kept stays float32."""

AUTOCAST_KINDS = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(kind)
)
"""Devices whose products can have a shorter type; asked for once, because older compilers cannot trace the question."""


def choose_device(name: str = "auto", *, local_rank: int | None = None) -> torch.device:
    """The device of a name, or the best one: CUDA, then Apple's MPS, then the CPU.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.
        local_rank: Which of a machine's GPUs is meant by auto and cuda, where several processes share the machine.

    Raises:
        UsageError: The named device is not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _cuda(local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} is not on this machine; use device auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {name!r} is not on this machine; use device auto or cpu")
    if device.type == "cuda" and device.index is None:
        return _cuda(local_rank)
    return device


def _cuda(index: int | None) -> torch.device:
    return torch.device("cuda") if index is None else torch.device("cuda", index)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 natively, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision of the forward and backward pass; "auto" is bf16 where it is native.

    Raises:
        UsageError: The name is unknown.
    """
    if name == "auto":
        return "bf16" if has_fast_bfloat16(device) else "fp32"
    known: dict[str, Precision] = {"bf16": "bf16", "fp32": "fp32"}
    if name not in known:
        raise UsageError(f"precision must be auto, bf16 or fp32, got {name!r}")
    return known[name]


def autocast_type(tensor: torch.Tensor) -> torch.dtype:
    """The type that products with ``tensor`` have: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    if kind in AUTOCAST_KINDS and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which operations keep the types that they are given."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCAST_KINDS else nullcontext()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which matrix products run in the given precision; parameters stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
