"""The choice of device and number type."""

import pytest
import torch

from kalmagrove.errors import UsageError
from kalmagrove.precision import autocast, choose_device, choose_precision, has_fast_bfloat16


def test_auto_precision_follows_the_hardware() -> None:
    device = torch.device("cpu")
    assert choose_precision("auto", device) == ("bf16" if has_fast_bfloat16(device) else "fp32")


@pytest.mark.parametrize(("bf16", "amx", "expected"), [(True, False, True), (False, True, True), (False, False, False)])
def test_a_cpu_is_fast_with_either_instruction_set(
    bf16: bool, amx: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_fast_bfloat16(torch.device("cpu")) is expected


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_device_prefers_cuda_then_mps(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == expected


def test_a_device_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device 'cuda' is not on this machine"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="unknown device 'tpuu'"):
        choose_device("tpuu")


def test_mps_trains_in_fp32() -> None:
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_autocast_runs_products_in_bfloat16_and_keeps_parameters() -> None:
    layer = torch.nn.Linear(3, 4)
    with autocast("bf16", torch.device("cpu")):
        assert layer(torch.ones(2, 3)).dtype == torch.bfloat16
    with autocast("fp32", torch.device("cpu")):
        assert layer(torch.ones(2, 3)).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(UsageError, match="got 'fp8'"):
        choose_precision("fp8", torch.device("cpu"))
