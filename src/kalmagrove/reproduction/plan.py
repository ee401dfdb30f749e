"""Which comparisons and which ladder answer the paper's claims, at three scales or as a file of one's own has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kalmagrove.comparison.config import CompareConfig
from kalmagrove.errors import UsageError
from kalmagrove.scaling.ladder import SweepConfig
from kalmagrove.training.config import config_of

SCALES = ("smoke", "laptop", "paper")
LADDER = "ladder"
LONG_CONTEXT = "long_context"
STUDIES = {
    "base": "Table 1, the smaller pair, with the controls llama-plus and slim and each part alone",
    "large": "Table 1, the larger pair, with the controls llama-plus and slim",
    "optimizers": "AdamW, Muon, SOAP and Kalma on both architectures, with more learning rates",
    LONG_CONTEXT: "the smaller pair and Arnold alone at a longer context",
    "hierarchy": "the synthetic language with a hierarchy",
    "recall": "synthetic recall at a distance",
    LADDER: "the scaling ladder",
}
"""What each study is for, in the order in which they are done."""

Config = TypeVar("Config")


@dataclass(frozen=True)
class Plan:
    """Studies by name; each lives in a folder of its name.

    Attributes:
        scale: smoke, laptop or paper, or the name of the file.
        comparisons: By name.
        ladder: Of the scaling laws; None is none.
        other_text: A second text, on which the finished models of Table 1 are scored too.
    """

    scale: str
    comparisons: Mapping[str, CompareConfig]
    ladder: SweepConfig | None
    other_text: str | None

    @property
    def names(self) -> list[str]:
        """The studies that there are, in their order."""
        return [name for name in STUDIES if name in self.comparisons or (name == LADDER and self.ladder is not None)]

    def only(self, names: list[str]) -> Plan:
        """The plan with some of its studies.

        Raises:
            UsageError: One of them is not in the plan.
        """
        for name in names:
            if name not in self.names:
                raise UsageError(f"there is no study {name!r}; the scale {self.scale} has {', '.join(self.names)}")
        comparisons = {name: config for name, config in self.comparisons.items() if name in names}
        return Plan(self.scale, comparisons, self.ladder if LADDER in names else None, self.other_text)


def load_plan(
    scale: str | Path, *, source: str | None = None, other_text: str | None = None, folder: str | None = None
) -> Plan:
    """Reads a plan.

    Args:
        scale: smoke, laptop or paper, or a YAML file.
        source: The text of every study that names none of its own; None is the plan's.
        other_text: The second text; None is the plan's.
        folder: Where packed text is kept; None is the usual place.

    Raises:
        UsageError: The file is missing or wrong.
    """
    path = Path(__file__).parent / "scales" / f"{scale}.yaml" if scale in SCALES else Path(scale)
    try:
        options = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the plan {path} cannot be read: {error}; use {', '.join(SCALES)} or a YAML file") from error
    known = {"data", "other_text", "comparisons", LADDER}
    if not isinstance(options, dict) or not isinstance(options.get("comparisons"), dict) or set(options) - known:
        raise UsageError(f"{path}: a plan has comparisons and may have data, other_text and ladder, and nothing else")
    unknown = set(options["comparisons"]) - set(STUDIES) | ({LADDER} & set(options["comparisons"]))
    if unknown:
        raise UsageError(f"{path}: unknown study {min(unknown)!r}; studies: {', '.join(STUDIES)}")
    data = dict(options.get("data") or {})
    data |= {} if source is None else {"source": source}
    own = {} if folder is None else {"folder": folder}

    def of_study(kind: type[Config], name: str, given: Any) -> Config:
        if not isinstance(given, dict):
            raise UsageError(f"{path}: {name} must be a mapping")
        of_its_own = given.get("data") or {}
        if not isinstance(of_its_own, dict):
            raise UsageError(f"{path}: data of {name} must be a mapping")
        # What a synthetic task is does not depend on the text of the others.
        shared = {} if of_its_own.get("source") else data
        return _build(kind, given | {"data": shared | of_its_own | own}, f"{path}: {name}")

    comparisons = {name: of_study(CompareConfig, name, given) for name, given in options["comparisons"].items()}
    ladder = of_study(SweepConfig, LADDER, options[LADDER]) if options.get(LADDER) else None
    scale_name = str(scale) if scale in SCALES else path.stem
    return Plan(scale_name, comparisons, ladder, other_text or options.get("other_text"))


def _build(kind: type[Config], options: Mapping[str, Any], where: str) -> Config:
    """A dataclass from nested mappings.

    Raises:
        UsageError: An option is unknown or its value wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        built = parser.instantiate(parser.parse_object(dict(options)))
    except (ArgumentError, UsageError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    return config_of(kind, built)
