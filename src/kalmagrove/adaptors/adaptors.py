"""Named task cores over a frozen model: added, chosen, mixed, merged into the weights and taken out again.

Every adapted layer computes W x + U R V^T x: U and V are frozen bases (:mod:`kalmagrove.adaptors.bases`), R is the
adaptor's core, dense or diagonal, zero at the start: equation 1's W = U Sigma V^T with a change of Sigma for each task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.adaptors.bases import Bases, singular_bases
from kalmagrove.adaptors.layers import adaptable_layers, with_change
from kalmagrove.adaptors.naming import check_name
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.models.merging import dense_weight

Cores = dict[str, nn.Parameter]
CoreForm = Literal["dense", "diagonal"]


@dataclass(frozen=True)
class _Adaptor:
    """The cores of an adaptor by layer, and its own bases; None stands for the weights'."""

    cores: Cores
    bases: dict[str, Bases] | None


class Adaptors:
    """The adaptors of one model. Its weights stay as they are: hooks add each layer's change.

    Args:
        model: Ours, or any causal language model of transformers; its parameters are frozen.

    Attributes:
        model: As given.
        layers: The layers that are adapted, by name.
        active: The adaptor that is on; None is the base model, bit for bit.
        merged: The adaptor that stands in the weights, or None.

    Raises:
        KalmaGroveError: The model has no layers to adapt.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = adaptable_layers(model)
        self.model = model.requires_grad_(False)
        self.active: str | None = None
        self.merged: str | None = None
        self._adaptors: dict[str, _Adaptor] = {}
        self._weight_bases: dict[str, Bases] = {}
        self._rows: list[str | None] | None = None
        self._handles = [
            layer.register_forward_hook(partial(self._with_change, name)) for name, layer in self.layers.items()
        ]

    def detach(self) -> None:
        """Takes the hooks away: the model is the base again, still frozen."""
        self.unmerge()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def names(self) -> list[str]:
        """Of the adaptors that are there."""
        return sorted(self._adaptors)

    def cores(self, name: str) -> Cores:
        """The cores of an adaptor by the names of their layers, (rank, rank) or (rank,) each: what is trained.

        Raises:
            UsageError: There is no adaptor of that name.
        """
        self._check_known(name)
        return self._adaptors[name].cores

    def own_bases(self, name: str) -> dict[str, Bases] | None:
        """The bases of an adaptor by layer, where they are its own; None where they are the weights'.

        Raises:
            UsageError: There is no adaptor of that name.
        """
        self._check_known(name)
        return self._adaptors[name].bases

    def add_adaptor(
        self, name: str, rank: int | None = None, *, core: CoreForm = "dense", bases: Mapping[str, Bases] | None = None
    ) -> Cores:
        """Adds an adaptor whose cores are zero, so that it changes nothing until it is trained.

        Args:
            name: Letters, digits, dots, dashes and underscores.
            rank: Most directions of a layer; fewer for a layer that has fewer.
            core: "dense" learns rank x rank numbers a layer, "diagonal" a number for each direction.
            bases: U and V^T of every layer, as from `text_bases`, where a rank is not needed; None takes the singular
                directions of the weights.

        Returns:
            Its cores by the names of their layers.

        Raises:
            UsageError: The name is taken or cannot be used, or the rank is below 1.
            KalmaGroveError: The bases are of other layers or sizes.
        """
        self._check_new(name)
        if bases is not None:
            self._check_bases(bases)
            rank = max(len(right) for _, right in bases.values()) if rank is None else rank
        if rank is None or rank < 1:
            raise UsageError(f"the rank of an adaptor must be at least 1, got {rank}")
        if bases is None:
            self._make_weight_bases(rank)
        cores: Cores = {}
        own: dict[str, Bases] = {}
        for layer, (left, right) in (self._weight_bases if bases is None else bases).items():
            side = min(rank, left.shape[1])
            cores[layer] = nn.Parameter(left.new_zeros((side, side) if core == "dense" else (side,)))
            own[layer] = left[:, :side].contiguous(), right[:side]
        self._adaptors[name] = _Adaptor(cores, None if bases is None else own)
        return cores

    def extend_adaptor(self, name: str, bases: Mapping[str, Bases]) -> Cores:
        """Gives an adaptor with diagonal cores more directions, whose numbers are zero: it stays the same function.

        Args:
            name: Of the adaptor.
            bases: U and V^T of the new directions of every layer, as from `text_bases` at the adapted model.

        Returns:
            Its cores, new parameters: the old numbers, and the zeros behind them.

        Raises:
            UsageError: There is no adaptor of that name, it has no bases of its own or dense cores, or one is merged.
            KalmaGroveError: The bases are of other layers or sizes.
        """
        self._check_not_merged()
        own, cores = self.own_bases(name), self.cores(name)
        if own is None or any(core.ndim > 1 for core in cores.values()):
            raise UsageError(f"adaptor {name!r} cannot be extended: it needs diagonal cores between bases of its own")
        self._check_bases(bases)
        longer = {
            layer: nn.Parameter(torch.cat((core.detach(), core.new_zeros(len(bases[layer][1])))))
            for layer, core in cores.items()
        }
        joined = {
            layer: (torch.cat((left, bases[layer][0]), dim=1), torch.cat((right, bases[layer][1])))
            for layer, (left, right) in own.items()
        }
        self._adaptors[name] = _Adaptor(longer, joined)
        return longer

    def add_weighted_adaptor(self, name: str, weights: Mapping[str, float]) -> Cores:
        """Adds an adaptor that is a weighted sum of others, of any ranks and forms.

        Between the weights' bases the cores are added up; bases of their own are put side by side.

        Args:
            name: As for :meth:`add_adaptor`.
            weights: Of each adaptor in the sum.

        Raises:
            UsageError: A name is unknown, taken or cannot be used, or there is nothing to add up.
        """
        self._check_new(name)
        if not weights:
            raise UsageError("a weighted sum needs at least one adaptor")
        is_shared = all(self.own_bases(part) is None for part in weights)
        cores: Cores = {}
        bases: dict[str, Bases] = {}
        for layer in self.layers:
            factors = [self._factors(part, layer) for part in weights]
            parts = [
                _dense(core.detach()) * weight for (_, core, _), weight in zip(factors, weights.values(), strict=True)
            ]
            cores[layer] = nn.Parameter(_added_up(parts) if is_shared else torch.block_diag(*parts))
            bases[layer] = (torch.cat([f[0] for f in factors], dim=1), torch.cat([f[2] for f in factors], dim=0))
        self._adaptors[name] = _Adaptor(cores, None if is_shared else bases)
        return cores

    def remove_adaptor(self, name: str) -> None:
        """Forgets an adaptor; if it is on, the base is next.

        Raises:
            UsageError: There is no adaptor of that name, or it is merged.
        """
        self._check_known(name)
        self._check_not_merged()
        self.active = None if self.active == name else self.active
        del self._adaptors[name]

    def set_adaptor(self, name: str | None) -> None:
        """Chooses the adaptor that is on; None is the base model. Nothing is computed or copied.

        Raises:
            UsageError: There is no adaptor of that name, or one is merged.
        """
        self._check_not_merged()
        if name is not None:
            self._check_known(name)
        self.active = name

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model as long as the context is open.

        Raises:
            UsageError: An adaptor is merged.
        """
        before = self.active, self._rows
        self.set_adaptor(None)
        self._rows = None
        try:
            yield
        finally:
            self.active, self._rows = before

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Each row of a batch with an adaptor of its own, in one forward, as long as the context is open.

        Args:
            names: An adaptor for each row, or None for the base.

        Raises:
            UsageError: A name is unknown, or an adaptor is merged.
            KalmaGroveError: In the forward: the batch has another number of rows.
        """
        self._check_not_merged()
        for name in names:
            if name is not None:
                self._check_known(name)
        before, self._rows = self._rows, list(names)
        try:
            yield
        finally:
            self._rows = before

    def change(self, name: str, layer: str) -> Tensor:
        """What an adaptor adds to a layer's matrix, U R V^T, (outputs, inputs), float32.

        Raises:
            UsageError: There is no adaptor of that name.
        """
        left, core, right = self._factors(name, layer)
        return (left * core if core.ndim == 1 else left @ core) @ right

    @torch.no_grad()
    def merge(self) -> None:
        """Puts the active adaptor into the weights, so that it costs nothing; Grove's layers become dense meanwhile.

        The layers themselves are kept aside, and :meth:`unmerge` puts them back with all their bits.

        Raises:
            UsageError: No adaptor is on, or one is merged already.
        """
        self._check_not_merged()
        if self.active is None:
            raise UsageError("no adaptor is on; choose one with set_adaptor before it is merged")
        changed = {name: with_change(layer, self.change(self.active, name)) for name, layer in self.layers.items()}
        for name, layer in changed.items():
            self.model.set_submodule(name, layer)
        self.merged = self.active

    def unmerge(self) -> None:
        """Puts the base's own layers back; does nothing where none is merged."""
        if self.merged is not None:
            for name, layer in self.layers.items():
                self.model.set_submodule(name, layer)
            self.merged = None

    def _factors(self, name: str, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        self._check_known(name)
        adaptor = self._adaptors[name]
        core = adaptor.cores[layer]
        left, right = (self._weight_bases if adaptor.bases is None else adaptor.bases)[layer]
        return left[:, : len(core)], core, right[: len(core)]

    def _make_weight_bases(self, rank: int) -> None:
        """The leading directions of a larger rank begin with those of a smaller one."""
        for name, layer in self.layers.items():
            have = self._weight_bases.get(name)
            if have is None or have[0].shape[1] < min(rank, *dense_weight(layer).shape):
                self._weight_bases[name] = singular_bases(dense_weight(layer), rank)

    def _check_bases(self, bases: Mapping[str, Bases]) -> None:
        for name, layer in self.layers.items():
            outputs, inputs = dense_weight(layer).shape
            left, right = bases.get(name, (torch.empty(0, 0), torch.empty(1, 1)))
            if (len(left), right.shape[-1]) != (outputs, inputs) or left.shape[-1] != len(right):
                raise KalmaGroveError(f"there are no bases of {outputs} outputs and {inputs} inputs for layer {name}")

    def _with_change(self, layer: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A layer's output with its change; None leaves the base's output as it is."""
        if self._rows is None:
            return None if self.active is None else output + self._change_of(self.active, layer, inputs[0], output)
        x = inputs[0]
        if len(x) != len(self._rows):
            raise KalmaGroveError(f"{len(self._rows)} rows have an adaptor, and layer {layer} was given {len(x)}")
        for name in set(self._rows) - {None}:
            assert name is not None
            chosen = torch.tensor([row == name for row in self._rows], device=x.device)
            change = self._change_of(name, layer, x[chosen], output)
            output = output.index_put((chosen,), output[chosen] + change)
        return output

    def _change_of(self, name: str, layer: str, x: Tensor, output: Tensor) -> Tensor:
        if self._factors(name, layer)[0].device != x.device:
            self._move(x.device)
        left, core, right = (factor.to(x.dtype) for factor in self._factors(name, layer))
        inner = F.linear(x, right)
        return F.linear(inner * core if core.ndim == 1 else F.linear(inner, core), left).to(output.dtype)

    def _move(self, device: torch.device) -> None:
        """Follows the model to another device; cores stay the same parameters."""
        for bases in (self._weight_bases, *(adaptor.bases or {} for adaptor in self._adaptors.values())):
            for name, (left, right) in bases.items():
                bases[name] = left.to(device), right.to(device)
        for adaptor in self._adaptors.values():
            for core in adaptor.cores.values():
                core.data = core.data.to(device)

    def _check_known(self, name: str) -> None:
        if name not in self._adaptors:
            raise UsageError(f"no adaptor {name!r}; there are: {', '.join(self.names) or 'none'}")

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name in self._adaptors:
            raise UsageError(f"adaptor {name!r} exists already; choose another name")

    def _check_not_merged(self) -> None:
        if self.merged is not None:
            raise UsageError(f"adaptor {self.merged!r} is merged into the weights; unmerge it first")


def _dense(core: Tensor) -> Tensor:
    return torch.diag(core) if core.ndim == 1 else core


def _added_up(cores: Sequence[Tensor]) -> Tensor:
    """The sum of square matrices of different sides, their first rows and columns on one another."""
    total = torch.zeros_like(max(cores, key=len))
    for core in cores:
        total[: len(core), : len(core)] += core
    return total
