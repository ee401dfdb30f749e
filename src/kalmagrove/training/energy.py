"""The electricity of a run, by codecarbon: read from counters where the machine has them, else estimated."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypedDict

from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.extras import require_extra

Source = Literal["measured", "estimated"]


class Part(TypedDict):
    """Energy of one part of the machine, and how it is known."""

    kwh: float
    source: Source
    method: str


_SECONDS_BETWEEN_READINGS = 15.0
# How codecarbon calls its ways to know a processor's energy; the others are a nominal power times a load.
_COUNTERS = {
    "intel_rapl": "RAPL counters",
    "windows_emi": "the Energy Meter Interface",
    "intel_power_gadget": "Intel Power Gadget",
}


def check_energy(wanted: bool) -> None:
    """Whether energy can be read, before anything is written.

    Raises:
        UsageError: codecarbon is missing.
    """
    if wanted:
        require_extra("codecarbon", extra="energy", option="energy")


class EnergyMeter:
    """Counts kilowatt-hours from its start on, without any call over the network.

    Args:
        folder: The run folder, the only place where anything may be written.
        earlier: What earlier processes of the run had used, as `used` gives it.
        whole_machine: Count all of the machine's processes, as several that train together need; alone, an estimate
            takes this process's part of the processor and of the memory.

    Raises:
        KalmaGroveError: codecarbon cannot read or estimate anything here.
    """

    def __init__(self, folder: Path, *, earlier: Mapping[str, Part] | None = None, whole_machine: bool = False) -> None:
        self._earlier = dict(earlier or {})
        self._readings = _Readings()
        self._tracker = self._start(folder, "machine" if whole_machine else "process")
        self._methods = _methods(self._tracker)
        if not self._methods:
            raise KalmaGroveError("energy: codecarbon finds nothing to measure on this machine; leave energy out")

    def _start(self, folder: Path, mode: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from codecarbon import OfflineEmissionsTracker

            # It logs before it has read the level below.
            logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
            # Given here, each of these wins over the user's configuration files of codecarbon, which may send or save.
            tracker = OfflineEmissionsTracker(
                output_methods=[],
                output_handlers=[self._readings],
                output_dir=str(folder),
                emissions_endpoint=None,
                # Only energy is wanted; a given intensity asks no service about the country's grid.
                force_carbon_intensity_g_co2e_kwh=0.0,
                allow_multiple_runs=True,  # Otherwise it locks a file outside the run folder.
                tracking_mode=mode,
                measure_power_secs=_SECONDS_BETWEEN_READINGS,
                api_call_interval=1,
                log_level="critical",
            )
            tracker.start()
        return tracker

    def used(self) -> dict[str, Part]:
        """What cpu, gpu and ram have used up to now, in this process and in earlier ones of the run."""
        if self._tracker is not None:
            self._tracker.flush()
        now = {
            part: Part(kwh=self._readings.kwh.get(part, 0.0), source=source, method=method)
            for part, (source, method) in self._methods.items()
        }
        return {part: _sum(self._earlier.get(part), now.get(part)) for part in sorted({*self._earlier, *now})}

    def result(self) -> dict[str, Any]:
        """What ``result.json`` says: the sum, and for each part how it is known.

        A sum is called measured only where every part of it is.
        """
        parts = self.used()
        estimated = any(part["source"] == "estimated" for part in parts.values())
        return {
            "energy_kwh": sum(part["kwh"] for part in parts.values()),
            "energy": {
                "source": "estimated" if estimated else "measured",
                "method": f"codecarbon {metadata.version('codecarbon')}",
                "parts": parts,
            },
        }

    def close(self) -> None:
        """Ends the readings; doing so twice is harmless."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.stop()


class _Readings:
    """Where codecarbon leaves its totals: one of its output methods."""

    def __init__(self) -> None:
        self.kwh: dict[str, float] = {}

    def out(self, total: Any, delta: Any) -> None:
        """Takes the totals since the start."""
        self.kwh = {"cpu": total.cpu_energy, "gpu": total.gpu_energy, "ram": total.ram_energy}

    live_out = out

    def task_out(self, data: Any, experiment_name: str) -> None:
        """Tasks are not used."""

    def exit(self) -> None:
        """Nothing is open."""


def _sum(earlier: Part | None, now: Part | None) -> Part:
    """Both together; the weaker source names the sum."""
    given = [part for part in (earlier, now) if part is not None]
    return Part(
        kwh=sum(part["kwh"] for part in given),
        source="estimated" if any(part["source"] == "estimated" for part in given) else "measured",
        method="; ".join(dict.fromkeys(part["method"] for part in given)),
    )


def _methods(tracker: Any) -> dict[str, tuple[Source, str]]:
    """By part, whether codecarbon measures or estimates it, and how."""
    methods: dict[str, tuple[Source, str]] = {}
    for hardware in tracker._hardware:
        kind, mode = type(hardware).__name__, getattr(hardware, "_mode", None)
        if kind == "GPU":
            methods["gpu"] = ("measured", "the GPUs' own sensors")
        elif kind in ("AppleSiliconChip", "Raspberry"):
            methods[hardware.chip_part.lower()] = ("measured", f"the sensors of the {kind} chip")
        elif kind == "RAM":
            methods["ram"] = ("estimated", "a nominal power of memory modules")
        elif mode in _COUNTERS:
            methods["cpu"] = ("measured", _COUNTERS[mode])
        else:
            share = "times its load" if mode == "cpu_load" else "times one half"
            methods["cpu"] = ("estimated", f"a nominal power of {hardware._tdp:g} W {share}")
    return dict(sorted(methods.items()))
