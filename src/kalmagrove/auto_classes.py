"""Lets transformers' Auto classes open our folders after ``import kalmagrove``, whichever is imported first."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_when_imported() -> None:
    """Registers now where transformers' Auto classes are loaded, else right after somebody loads them."""
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register()
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, register))


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from kalmagrove.models.compressed_config import CompressedConfig
    from kalmagrove.models.config import KalmaGroveConfig

    AutoConfig.register("kalmagrove", KalmaGroveConfig, exist_ok=True)
    AutoConfig.register("kalmagrove_compressed", CompressedConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM

    from kalmagrove.models.compressed import CompressedForCausalLM
    from kalmagrove.models.compressed_config import CompressedConfig
    from kalmagrove.models.config import KalmaGroveConfig
    from kalmagrove.models.decoder import KalmaGroveForCausalLM

    AutoModelForCausalLM.register(KalmaGroveConfig, KalmaGroveForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(CompressedConfig, CompressedForCausalLM, exist_ok=True)
    # Its trainer shifts the labels of the classes that are named here, where it reckons a loss of its own.
    for config, model in ((KalmaGroveConfig, KalmaGroveForCausalLM), (CompressedConfig, CompressedForCausalLM)):
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__


_REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _AfterImport(MetaPathFinder):
    """Finds one module as usual and runs a function at the end of its first import."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self.then()

        # The spec is this import's own, so nobody else sees its loader changed.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # On purpose.
        return spec
