"""Task cores as a method of the ``peft`` library: ``get_peft_model(model, TaskCoreConfig())``.

Importing this module registers the method, so that ``PeftModel.from_pretrained`` and ``load_adapter`` know it. The same
cores in the same bases as :class:`~kalmagrove.adaptors.adaptors.Adaptors`, under peft's names and files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from torch import Tensor, nn

from kalmagrove.adaptors.bases import singular_bases
from kalmagrove.adaptors.layers import adaptable_layers, is_adaptable, with_change
from kalmagrove.adaptors.options import AdaptorOptions
from kalmagrove.models.merging import dense_weight
from kalmagrove.nn.grove import GroveBank

METHOD = "kalmagrove"
PREFIX = "kalmagrove_"


def _new_type(name: str) -> PeftType:
    """The library keeps its methods in an enumeration, which has no public way to grow."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return member


TASK_CORE = _new_type(METHOD.upper())


@dataclass
class TaskCoreConfig(PeftConfig):
    """Options of the method.

    Args:
        r: Side of each core.
        target_modules: Ends of layers' names, or a regular expression; None is every linear layer but embeddings and
            heads, Grove's among them.
    """

    r: int = field(default=AdaptorOptions.rank, metadata={"help": "side of the core of each layer"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "the layers; None is all"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TASK_CORE
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")


class TaskCoreLayer(nn.Module, BaseTunerLayer):
    """A linear layer with named task cores.

    Args:
        base_layer: Dense, or Grove's; it stays as it is.
        adapter_name: The first adapter.
        r: Side of its core.
    """

    adapter_layer_names = ("kalmagrove_core",)
    left: Tensor
    right: Tensor
    # Of the library's class, which publishes no types.
    active_adapters: list[str]
    set_adapter: Callable[[list[str]], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kalmagrove_core = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged_layer: nn.Module | None = None
        weight = dense_weight(base_layer)
        for name, basis in zip(("left", "right"), singular_bases(weight, r), strict=True):
            self.register_buffer(name, basis, persistent=False)
        self.update_layer(adapter_name, r)

    def update_layer(self, adapter_name: str, r: int) -> None:
        """Adds an adapter whose core is zero."""
        weight = dense_weight(self.base_layer if self._unmerged_layer is None else self._unmerged_layer)
        if self.left.shape[1] < min(r, *weight.shape):
            self.left, self.right = singular_bases(weight, r)
        side = min(r, self.left.shape[1])
        self.kalmagrove_core[adapter_name] = nn.Parameter(self.left.new_zeros(side, side))
        self.set_adapter(self.active_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the layer's matrix, (outputs, inputs)."""
        core = self.kalmagrove_core[adapter]
        return self.left[:, : core.shape[0]] @ core @ self.right[: core.shape[1]]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts adapters into a dense layer in the place of the base's, which is kept aside.

        Raises:
            ValueError: ``safe_merge`` is on, and a weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.kalmagrove_core]
        if not names:
            return
        with torch.no_grad():
            change = torch.stack([self.get_delta_weight(name) for name in names]).sum(dim=0)
        if safe_merge and not bool(change.isfinite().all()):
            raise ValueError(f"adapter {names[0]!r} has numbers that are not finite; train it again")
        if self._unmerged_layer is None:
            self._unmerged_layer = self.base_layer
        self.base_layer = with_change(self.base_layer, change)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the base's own layer back, with all its bits."""
        if self._unmerged_layer is not None:
            self.base_layer, self._unmerged_layer = self._unmerged_layer, None
            self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the changes of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.kalmagrove_core:
                core = self.kalmagrove_core[name].to(x.dtype)
                inner = F.linear(F.linear(x, self.right[: core.shape[1]].to(x.dtype)), core)
                result = result + F.linear(inner, self.left[:, : core.shape[0]].to(x.dtype)).to(result.dtype)
        return result


class TaskCoreModel(BaseTuner):
    """A model whose linear layers have task cores; made by ``get_peft_model``."""

    prefix = PREFIX
    tuner_layer_cls = TaskCoreLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as peft declares it

    def _prepare_adapter_config(self, peft_config: TaskCoreConfig, model_config: dict[str, Any]) -> TaskCoreConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = [name.removesuffix(".base_layer") for name in adaptable_layers(self.model)]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: TaskCoreConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, TaskCoreLayer):
            target.update_layer(adapter_name, peft_config.r)
            return
        if isinstance(target, GroveBank):
            # The bases that a projection's layers share have its name too.
            return
        if not is_adaptable(target):
            raise ValueError(f"{current_key} is a {type(target).__name__}; task cores need linear layers")
        layer = TaskCoreLayer(target, adapter_name, peft_config.r)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Grove's layers have no ``weight`` that could be handed on, and ours need none."""
        setattr(parent, child_name, new_module)


register_peft_method(name=METHOD, config_cls=TaskCoreConfig, model_cls=TaskCoreModel, prefix=PREFIX)
