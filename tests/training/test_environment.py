"""The description of the machine is complete and private, and memory peaks are the process's own."""

import getpass
import json
import mmap
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kalmagrove
from kalmagrove.training import environment
from kalmagrove.training.environment import (
    describe_environment,
    peak_memory_bytes,
    reset_peak_memory,
    source_digest,
)

MEBIBYTE = 2**20


def test_the_description_has_the_facts_of_this_machine() -> None:
    described = describe_environment()
    assert described["python"] == platform.python_version()
    assert described["packages"]["kalmagrove"] == kalmagrove.__version__
    assert described["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert described["packages"]["numpy"] == np.__version__
    assert set(described["packages"]) >= {"kalmagrove", "torch", "transformers", "tokenizers", "numpy", "safetensors"}
    assert 1 <= described["usable_cores"] <= (os.cpu_count() or 1)
    assert described["torch_threads"] == torch.get_num_threads()
    assert described["memory_bytes"] is None or described["memory_bytes"] > 64 * MEBIBYTE
    assert described["cpu"] and described["source"] == source_digest()
    assert len(described["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps(described)) == described


def test_a_changed_line_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = source_digest.__wrapped__
    package = tmp_path / "kalmagrove"
    shutil.copytree(Path(environment.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment, "__file__", str(package / "training" / "environment.py"))
    assert digest() == source_digest()
    with (package / "nn" / "grove.py").open("a") as file:
        file.write("# another line\n")
    assert digest() != source_digest()


def test_the_description_names_no_host_user_or_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "private-host")
    monkeypatch.setattr(platform, "node", lambda: "private-host")
    monkeypatch.setenv("LOGNAME", "private-user")
    assert getpass.getuser() == "private-user"
    text = json.dumps(describe_environment())
    assert "private" not in text
    assert not [folder for folder in (Path.home(), Path.cwd(), Path(sys.prefix)) if str(folder) in text]


def test_the_cpu_model_comes_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Tiny CPU @ 1 GHz\n\nprocessor\t: 1\nmodel name\t: Other\n")
    monkeypatch.setattr(environment, "_CPU_INFORMATION", listing)
    assert describe_environment()["cpu"] == "Tiny CPU @ 1 GHz"
    monkeypatch.setattr(environment, "_CPU_INFORMATION", tmp_path / "missing")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert describe_environment()["cpu"] == "riscv64"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("numpy", "surely-not-installed"))
    assert describe_environment()["packages"] == {"numpy": np.__version__, "surely-not-installed": None}


def test_the_peak_rises_with_memory_in_use() -> None:
    reset_peak_memory("cpu")
    before = peak_memory_bytes("cpu")
    # Pages of its own: an array may get memory that an earlier one left to the process.
    with mmap.mmap(-1, 300 * MEBIBYTE) as block:
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        with_block = peak_memory_bytes(torch.device("cpu"))
    assert with_block > before + 290 * MEBIBYTE


def test_a_reset_forgets_an_earlier_peak() -> None:
    reset_peak_memory("cpu")
    block = np.ones(300 * MEBIBYTE, dtype=np.uint8)
    with_block = peak_memory_bytes("cpu")
    del block
    # The system counts pages in batches, so that two readings can differ by a few.
    assert peak_memory_bytes("cpu") > with_block - MEBIBYTE
    reset_peak_memory("cpu")
    after = peak_memory_bytes("cpu")
    if after > with_block - MEBIBYTE:
        pytest.skip("this system cannot reset the peak of a process")
    assert after < with_block - 200 * MEBIBYTE


def test_without_process_files_the_peak_comes_from_the_usage_and_a_reset_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(environment, "_PROCESS_STATUS", tmp_path / "missing")
    monkeypatch.setattr(environment, "_PROCESS_MARKS", tmp_path / "missing" / "marks")
    reset_peak_memory("cpu")
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(environment.sys, "platform", "linux")
    assert peak_memory_bytes("cpu") >= kilobytes * 1024
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    assert kilobytes <= peak_memory_bytes("cpu") < kilobytes * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_gpu_is_what_was_allocated_since_the_reset() -> None:
    base = torch.cuda.memory_allocated()
    block = torch.ones(64 * MEBIBYTE, dtype=torch.uint8, device="cuda")
    assert peak_memory_bytes("cuda") >= base + block.numel()
    del block
    reset_peak_memory("cuda")
    assert peak_memory_bytes("cuda") < base + 64 * MEBIBYTE


RESIDENT_AFTER_A_LARGE_TENSOR = """
import gc, re, sys, torch
from kalmagrove.training.environment import keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(1)
before = resident()
tensor = torch.ones(1 << 25)
del tensor
gc.collect()
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_where_it_is_asked_for() -> None:
    mebibytes = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", RESIDENT_AFTER_A_LARGE_TENSOR, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ("keep", "give back")
    }
    assert mebibytes["keep"] > 100 > 60 > mebibytes["give back"]


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert environment.keep_freed_memory() is False
