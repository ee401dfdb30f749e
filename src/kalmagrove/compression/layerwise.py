"""Factors of a model's layers, one layer after the other, each fitted to what the layers before it now give.

When layer l is reached, x* is what it reads in the dense model and x what it reads behind the compressed layers. The
factors of W are fitted so that they give from x what W gave from x*: W is first replaced by W T with the regression
T = E[x* x^T] E[x x^T]^-1, pulled towards the identity by a ridge, and W T is then factorised in the moments of x.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.factorise import Compact, best_reader, compact_basis, spectrum_of
from kalmagrove.compression.plan import Choice
from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.statistics import Moments
from kalmagrove.compression.stream import LayerStream
from kalmagrove.models.merging import dense_weight
from kalmagrove.precision import Precision

RIDGE = 0.03
"""Of the regression on the compressed layers' outputs, relative to the mean power of the input."""


@dataclass(frozen=True)
class Cut:
    """Rows or columns of a matrix that stay; the others are zero.

    Attributes:
        kept: Their numbers.
        size: Of them all.
        axis: 0 for rows, which are outputs, 1 for columns.
    """

    kept: Tensor
    size: int
    axis: int


@dataclass(frozen=True)
class Factors:
    """What a matrix becomes: U V^T, or another dense matrix, perhaps of fewer rows or columns.

    Attributes:
        basis: V^T, or None.
        reader: U, (out_features, rank), or the matrix, (out_features, in_features) without what is cut.
        cut: Which of its rows or columns the matrix has; None is all.
    """

    basis: Compact | None
    reader: Tensor
    cut: Cut | None = None

    def product(self) -> Tensor:
        """The matrix, (out_features, in_features)."""
        if self.basis is not None:
            return self.reader @ self.basis.matrix()
        if self.cut is None:
            return self.reader
        shape = list(self.reader.shape)
        shape[self.cut.axis] = self.cut.size
        return self.reader.new_zeros(shape).index_copy_(self.cut.axis, self.cut.kept.long(), self.reader)


def cut_matrix(weight: Tensor, choice: Choice, number: int) -> Factors:
    """A matrix of a feed-forward without the units that go: rows of one that reads, columns of the one that writes."""
    axis = 1 if number == choice.group.members[-1] else 0
    kept = choice.kept_units.to(weight.device)
    return Factors(None, weight.index_select(axis, kept).float(), Cut(kept.int(), weight.shape[axis], axis))


class LayerwiseFit:
    """Goes through a model's layers and replaces each one's matrices by what their factors multiply out to.

    Args:
        model: Dense; its layers are changed, so that each one sees what the layers before it now give.
        matrices: All of them.
        choices: Of all groups.
        windows: Tokens, (windows, context).
        precision: "bf16" or "fp32", of the model's products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        matrices: Sequence[Matrix],
        choices: Sequence[Choice],
        windows: Tensor,
        *,
        precision: Precision,
    ) -> None:
        self.model, self.matrices = model, matrices
        self.choices = {number: choice for choice in choices for number in choice.group.members}
        self._dense = LayerStream(model, windows, precision=precision)
        self._changed = LayerStream(model, windows, precision=precision)
        self._bases: dict[tuple[int, ...], Compact] = {}

    def layers_of(self, layer: int) -> list[int]:
        """The layers whose moments :meth:`fit` needs: the layer, and those that share a basis with it."""
        own = [number for number, matrix in enumerate(self.matrices) if matrix.layer == layer]
        return sorted({self.matrices[m].layer for number in own for m in self.choices[number].group.members})

    @torch.no_grad()
    def fit(self, layer: int, moments: Moments) -> dict[int, Factors]:
        """Factors of the next layer's matrices, by number; the layer is replaced and the text passes it.

        Args:
            layer: From 0 on, in turn.
            moments: Of the dense model, for this layer's matrices and for those that share a basis with them.
        """
        original = copy.deepcopy(self._dense.layers[layer])
        own = {number: matrix for number, matrix in enumerate(self.matrices) if matrix.layer == layer}
        factors: dict[int, Factors] = {}
        for site in dict.fromkeys(matrix.site for matrix in own.values()):
            numbers = [number for number, matrix in own.items() if matrix.site == site]
            inputs, cross = self._moments_of(layer, original, self.matrices[numbers[0]])
            change = regression(inputs, cross)
            for number in numbers:
                factors[number] = self._fit(number, inputs, change, moments)
            self._replace({number: factors[number] for number in numbers})
        self._pass(layer, original)
        return factors

    @torch.no_grad()
    def skip(self, layer: int, factors: dict[int, Factors]) -> None:
        """Takes factors that were fitted before."""
        original = copy.deepcopy(self._dense.layers[layer])
        for number, own in factors.items():
            if own.basis is not None:
                self._bases[self.choices[number].group.members] = own.basis
        self._replace(factors)
        self._pass(layer, original)

    def _fit(self, number: int, inputs: Tensor, change: Tensor, moments: Moments) -> Factors:
        choice = self.choices[number]
        weight = dense_weight(self.model.get_submodule(self.matrices[number].name)).double() @ change
        if choice.is_dense:
            return Factors(None, weight.float())
        if choice.group.is_units:
            # Units that went are zero here, so the regression has put into the others what they said of them.
            return cut_matrix(weight, choice, number)
        members = choice.group.members
        if members not in self._bases:
            self._bases[members] = self._basis(choice, inputs, change, moments)
        basis = self._bases[members]
        return Factors(basis, best_reader(weight, basis, inputs).float())

    def _basis(self, choice: Choice, inputs: Tensor, change: Tensor, moments: Moments) -> Compact:
        """Of one site: fitted to what it reads now. Of several layers: to what they read in the dense model."""
        members = choice.group.members
        sensitivity = sum_of(moments.sensitivities, members)
        sites = sorted({self.matrices[number].site for number in members})
        if len(sites) == 1:
            spectrum = spectrum_of(inputs, change.T @ sensitivity.double() @ change)
        else:
            spectrum = spectrum_of(sum_of(moments.inputs, sites) / len(sites), sensitivity)
        basis = compact_basis(spectrum.directions[: choice.rank])
        return Compact(basis.order, basis.rest.float())

    def _replace(self, factors: dict[int, Factors]) -> None:
        for number, own in factors.items():
            layer = self.model.get_submodule(self.matrices[number].name)
            dense_weight(layer).copy_(own.product())
            if own.cut is not None and own.cut.axis == 0 and isinstance(layer.bias, Tensor):
                # What went gives nothing, not its bias either.
                gone = torch.ones(own.cut.size, dtype=torch.bool, device=layer.bias.device)
                gone[own.cut.kept.long()] = False
                layer.bias[gone] = 0

    def _pass(self, layer: int, original: nn.Module) -> None:
        self._dense.advance(layer, original)
        self._changed.advance(layer, self._changed.layers[layer])

    def _moments_of(self, layer: int, original: nn.Module, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """E[x x^T] and E[x* x^T] of what a matrix reads in the changed and in the original layer."""
        name = matrix.name.split(f".{layer}.", 1)[1]
        inputs = torch.zeros(matrix.in_features, matrix.in_features, device=self._dense.device)
        cross = torch.zeros_like(inputs)
        changed_layer = self._changed.layers[layer]
        dense = self._dense.inputs_of(layer, original, original.get_submodule(name))
        changed = self._changed.inputs_of(layer, changed_layer, changed_layer.get_submodule(name))
        tokens = 0
        for wanted, seen in zip(dense, changed, strict=True):
            inputs.addmm_(seen.T, seen)
            cross.addmm_(wanted.T, seen)
            tokens += len(seen)
        return inputs / tokens, cross / tokens


def regression(inputs: Tensor, cross: Tensor) -> Tensor:
    """T that makes T x closest to x* in the mean square, pulled to the identity, (in_features, in_features) float64.

    Args:
        inputs: E[x x^T].
        cross: E[x* x^T].
    """
    seen = inputs.double()
    identity = torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
    if torch.equal(inputs, cross):
        # Nothing has changed before this layer: it stays as it is to the bit.
        return identity
    pull = RIDGE * seen.diagonal().mean() * identity
    solved: Tensor = torch.linalg.solve(seen + pull, (cross.double() + pull).T).T
    return solved


def sum_of(moments: dict[int, Tensor], numbers: Sequence[int]) -> Tensor:
    """The sum of second moments."""
    return torch.stack([moments[number] for number in numbers]).sum(dim=0)
