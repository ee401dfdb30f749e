"""The dense model's moments, a file a layer, so that they need not lie in memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kalmagrove.compression.factorise import losses_of_ranks
from kalmagrove.compression.layerwise import sum_of
from kalmagrove.compression.plan import Group
from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.statistics import Moments, gather_moments
from kalmagrove.compression.units import order_units
from kalmagrove.compression.whitening import cholesky_root
from kalmagrove.compression.work import WorkFolder
from kalmagrove.precision import Precision


class MomentStore:
    """Moments on the disk, by layer.

    Args:
        work: Where they are kept.
        matrices: All of them.
    """

    def __init__(self, work: WorkFolder, matrices: Sequence[Matrix]) -> None:
        self.work, self.matrices = work, matrices
        self.layers = sorted({matrix.layer for matrix in matrices})
        self._last: tuple[tuple[int, ...], Moments] | None = None

    def blocks(self, model: PreTrainedModel) -> list[list[int]]:
        """Layers whose moments are gathered together: as many as need no more memory than two of the model."""
        most = 2 * sum(parameter.numel() for parameter in model.parameters())
        blocks: list[list[int]] = []
        used = 0
        for layer in self.layers:
            own = [matrix for matrix in self.matrices if matrix.layer == layer]
            sites = {matrix.site: matrix.in_features**2 for matrix in own}
            size = sum(matrix.in_features**2 for matrix in own) + sum(sites.values())
            if not blocks or used + size > most:
                blocks.append([])
                used = 0
            blocks[-1].append(layer)
            used += size
        return blocks

    def gather(
        self, model: PreTrainedModel, windows: Tensor, *, seed: int, precision: Precision, progress: Callable[[], None]
    ) -> None:
        """Fills the folder with what is not there yet.

        Args:
            model: Dense.
            windows: (windows, context + 1).
            seed: Of the draws from the model's predictions.
            precision: "bf16" or "fp32".
            progress: Called after each window of each block.
        """
        for block in self.blocks(model):
            if all((self.work.path / f"moments-{layer}.safetensors").is_file() for layer in block):
                for _ in windows:
                    progress()
                continue
            own = {number: matrix for number, matrix in enumerate(self.matrices) if matrix.layer in block}
            moments = gather_moments(model, own, windows, seed=seed, precision=precision, progress=progress)
            for layer in block:
                numbers = [number for number, matrix in own.items() if matrix.layer == layer]
                sites = {own[number].site for number in numbers}
                tensors = {f"inputs.{site}": moments.inputs[site] for site in sites}
                tensors |= {f"sensitivities.{number}": moments.sensitivities[number] for number in numbers}
                self.work.write_tensors(f"moments-{layer}", tensors)

    def of_layers(self, layers: Sequence[int], device: torch.device) -> Moments:
        """Moments of some layers' matrices."""
        key = tuple(sorted(set(layers)))
        if self._last is None or self._last[0] != key:
            moments = Moments({}, {})
            for layer in key:
                for name, tensor in (self.work.read_tensors(f"moments-{layer}") or {}).items():
                    kind, _, number = name.partition(".")
                    getattr(moments, kind)[int(number)] = tensor.to(device)
            self._last = key, moments
        return self._last[1]

    def group(self, members: tuple[int, ...], device: torch.device) -> Group:
        """Matrices that share a basis, with what each rank of it costs."""
        own = [self.matrices[number] for number in members]
        moments = self.of_layers([matrix.layer for matrix in own], device)
        sites = sorted({matrix.site for matrix in own})
        root, _ = cholesky_root(sum_of(moments.inputs, sites) / len(sites))
        losses = losses_of_ranks(root, sum_of(moments.sensitivities, members)).cpu()
        return Group(members, own[0].in_features, sum(matrix.out_features for matrix in own), losses)

    def unit_group(self, members: tuple[int, ...], device: torch.device) -> Group:
        """A feed-forward with what each number of its units costs; it is computed once and kept.

        Args:
            members: The matrices that read, and at last the one that writes.
            device: To compute on.
        """
        writer = self.matrices[members[-1]]
        kept = self.work.read_tensors(f"units-{writer.layer}")
        if kept is None:
            moments = self.of_layers([writer.layer], device)
            found = order_units(moments.inputs[writer.site], moments.sensitivities[members[-1]])
            kept = {"order": found.order.cpu(), "losses": found.losses.cpu()}
            self.work.write_tensors(f"units-{writer.layer}", kept)
        width = writer.out_features + sum(self.matrices[number].in_features for number in members[:-1])
        return Group(members, writer.in_features, width, kept["losses"], kept["order"])
