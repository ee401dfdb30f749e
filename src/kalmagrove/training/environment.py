"""Say on what machine and with what packages a run was made, and how much memory it took."""

import ctypes
import hashlib
import os
import platform
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "kalmagrove",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "peft",
    "pytorch-optimizer",
)
_CPU_INFORMATION = Path("/proc/cpuinfo")
_PROCESS_STATUS = Path("/proc/self/status")
_PROCESS_MARKS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
# The numbers of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_GROWTH_BYTES = 1 << 26


def describe_environment() -> dict[str, Any]:
    """Describe what a run's speed and results depend on, without names of hosts, users or folders.

    Returns:
        JSON values: `python`, `platform`, `packages` (version by name, None when not installed), `source` (of this
        package's own files, see `source_digest`), `cpu`, `usable_cores`, `torch_threads`, `memory_bytes` (None when
        unknown), `cuda` (the CUDA version that torch was built for, or None) and `gpus` (their names).
    """
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "source": source_digest(),
        "cpu": _cpu_model(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": _physical_memory_bytes(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }


def keep_freed_memory() -> bool:
    """Lets the C library keep the memory of tensors that are gone, for the next ones of their size.

    A training step on a CPU makes and drops the same tensors again and again; giving each back to the system and
    asking for it anew costs time ("Memory that is kept" in docs/results/speed.md). For the whole process; on Linux with
    glibc, elsewhere nothing happens.

    Returns:
        Whether the library took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _GROWTH_BYTES), (_MMAP_MAX, 0))
    taken = [bool(mallopt(name, value)) for name, value in settings]
    return all(taken)


def peak_memory_bytes(device: "torch.device | str") -> int:
    """Return the most memory used since the start or the last reset.

    Args:
        device: A CUDA device, for the most that torch allocated on it; any other, for the process's resident peak.

    Returns:
        Bytes; 0 where the system does not tell.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _resident_peak_from_status()
    return peak if peak is not None else _resident_peak_from_usage()


def reset_peak_memory(device: "torch.device | str") -> None:
    """Let the peak begin anew from the present use; on the CPU only Linux can, elsewhere nothing happens.

    Args:
        device: The device as given to `peak_memory_bytes`.
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _PROCESS_MARKS.write_text(_RESET_PEAK)
    except OSError:
        return


@cache
def source_digest() -> str:
    """The first digits of the SHA-256 of this package's Python files: a version number tells no two commits apart."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFORMATION.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        model = None
    return model[1].strip() if model else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _physical_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _resident_peak_from_status() -> int | None:
    try:
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", _PROCESS_STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(peak[1]) * 1024 if peak else None


def _resident_peak_from_usage() -> int:
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
