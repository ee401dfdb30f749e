"""Other ways to make a dense model smaller, written from their papers, and our own with a part left out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.build import compressed_model
from kalmagrove.compression.calibration import CalibrationText, loss_of
from kalmagrove.compression.compress import fit_layers
from kalmagrove.compression.direct import fit_directly, put_in, refitted_writer
from kalmagrove.compression.layerwise import Factors, LayerwiseFit
from kalmagrove.compression.moment_store import MomentStore
from kalmagrove.compression.options import CompressOptions
from kalmagrove.compression.plan import Choice, Group, choose_ranks, merge_groups
from kalmagrove.compression.planning import make_plan
from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.statistics import Moments
from kalmagrove.compression.whitening import cholesky_root
from kalmagrove.compression.work import WorkFolder
from kalmagrove.models.compressed import has_bias
from kalmagrove.models.merging import dense_weight

SHARED_KINDS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
LAYERS_A_BASIS = 2


@dataclass(frozen=True)
class Task:
    """A model that is to be made smaller.

    Attributes:
        dense: The model, which is not changed.
        matrices: All of its decoder's.
        store: Their moments.
        text: That the moments are of, and what is held out of it.
        keep: The part of all parameters that is to stay.
        precision: Of the model's products.
        work: A folder for what a method keeps on the disk.
    """

    dense: PreTrainedModel
    matrices: list[Matrix]
    store: MomentStore
    text: CalibrationText
    keep: float
    precision: str
    work: Path

    @property
    def budget(self) -> int:
        """Parameters of all matrices together."""
        total = sum(parameter.numel() for parameter in self.dense.parameters())
        return int(self.keep * total) - total + self.body

    @property
    def body(self) -> int:
        """Parameters of all matrices of the dense model."""
        return sum(matrix.in_features * matrix.out_features for matrix in self.matrices)

    @property
    def share(self) -> float:
        """The part of the matrices' parameters that is to stay."""
        return self.budget / self.body

    def inputs_of(self, matrix: Matrix) -> Tensor:
        """E[x x^T] of what a matrix reads, in float64."""
        return self.store.of_layers([matrix.layer], torch.device("cpu")).inputs[matrix.site].double()


Split = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a matrix (out, in) and A to the full left and right factors, best directions first."""


def plain_split(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """U Sigma and V^T of the matrix itself."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u * s, v


def scaled_split(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """ASVD: of the matrix with its columns scaled by the size of their inputs to the power of a half."""
    scale = inputs.diagonal().clamp_min(1e-12).sqrt().sqrt()
    left, right = plain_split(weight * scale, inputs)
    return left, right / scale


def whitened_split(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """SVD-LLM: of W S with S S^T = A."""
    root, inverse = cholesky_root(inputs)
    left, right = plain_split(weight @ root, inputs)
    return left, right @ inverse


class TwoFactors(nn.Module):
    """y = U V^T x + bias; several may hold the same V^T."""

    def __init__(self, right: nn.Linear, left: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.right = right
        self.left = linear_of(left)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(self.right(x))
        return y if self.bias is None else y + self.bias


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer of a matrix (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().float().contiguous().clone())
    return layer


def put_factors(model: PreTrainedModel, matrix: Matrix, right: nn.Linear, left: Tensor) -> None:
    """Replaces a linear layer."""
    dense = model.get_submodule(matrix.name)
    model.set_submodule(matrix.name, TwoFactors(right, left, dense.bias if has_bias(dense) else None))


def plain_rank(matrix: Matrix, share: float) -> int:
    """The rank whose two whole factors hold a part of a matrix's parameters."""
    return max(1, int(share * matrix.in_features * matrix.out_features / (matrix.in_features + matrix.out_features)))


def compact_rank(matrix: Matrix, share: float) -> int:
    """The same with r (out + in - r) numbers a matrix."""
    both, budget = matrix.in_features + matrix.out_features, share * matrix.in_features * matrix.out_features
    return max(1, int((both - math.sqrt(both**2 - 4 * budget)) / 2))


def low_rank(task: Task, split: Split) -> PreTrainedModel:
    """Every matrix by itself, the same part of its parameters kept."""
    model = copy.deepcopy(task.dense)
    for matrix in task.matrices:
        left, right = split(dense_weight(model.get_submodule(matrix.name)).double(), task.inputs_of(matrix))
        rank = plain_rank(matrix, task.share)
        put_factors(model, matrix, linear_of(right[:rank]), left[:, :rank])
    return model


def followed_low_rank(task: Task) -> PreTrainedModel:
    """SVD-LLM, each layer fitted to what the compressed layers before it now give, as ours is."""
    model = copy.deepcopy(task.dense)
    choices = _one_each(task, plain_rank)
    fit = LayerwiseFit(model, task.matrices, choices, task.text.train[:, :-1], precision=task.precision)
    sensitivities = {
        number: torch.mm(weight.T, weight).detach()
        for number, matrix in enumerate(task.matrices)
        for weight in [dense_weight(task.dense.get_submodule(matrix.name)).detach()]
    }
    found: dict[int, Factors] = {}
    for layer in task.store.layers:
        found |= fit.fit(layer, Moments({}, sensitivities))
    for number, factors in found.items():
        assert factors.basis is not None
        put_factors(model, task.matrices[number], linear_of(factors.basis.matrix()), factors.reader)
    return model


def _one_each(task: Task, rank_of: Callable[[Matrix, float], int]) -> list[Choice]:
    """A basis for every matrix, the same part of its parameters kept."""
    return [
        Choice(Group((number,), matrix.in_features, matrix.out_features, torch.zeros(0)), rank_of(matrix, task.share))
        for number, matrix in enumerate(task.matrices)
    ]


def compact_low_rank(task: Task) -> PreTrainedModel:
    """SVD-LLM with r (out + in - r) numbers a matrix; they are counted so, and multiplied out here."""
    model = copy.deepcopy(task.dense)
    for matrix in task.matrices:
        weight, rank = dense_weight(model.get_submodule(matrix.name)), compact_rank(matrix, task.share)
        left, right = whitened_split(weight.double(), task.inputs_of(matrix))
        with torch.no_grad():
            weight.copy_(left[:, :rank] @ right[:rank])
    return model


def basis_sharing(task: Task) -> PreTrainedModel:
    """Neighbouring layers' matrices of one kind over one basis; those that write are split by themselves."""
    model = copy.deepcopy(task.dense)
    groups: dict[tuple[str, int], list[Matrix]] = {}
    for number, matrix in enumerate(task.matrices):
        alone = matrix.kind not in SHARED_KINDS
        groups.setdefault((matrix.kind, -number if alone else matrix.layer // LAYERS_A_BASIS), []).append(matrix)
    for members in groups.values():
        inputs = torch.stack([task.inputs_of(matrix) for matrix in members]).mean(dim=0)
        weights = [dense_weight(model.get_submodule(matrix.name)).double() for matrix in members]
        stacked = torch.cat(weights)
        left, right = whitened_split(stacked, inputs)
        rank = max(1, int(task.share * stacked.numel() / sum(stacked.shape)))
        shared = linear_of(right[:rank])
        for matrix, own in zip(members, left[:, :rank].split([len(weight) for weight in weights]), strict=True):
            put_factors(model, matrix, shared, own)
    return model


def cut_units(task: Task) -> PreTrainedModel:
    """Units of the feed-forward with the least power sent on, all other matrices staying."""
    model = copy.deepcopy(task.dense)
    inner = [matrix for matrix in task.matrices if matrix.kind in ("gate_proj", "up_proj", "down_proj")]
    size = sum(matrix.in_features * matrix.out_features for matrix in inner)
    kept_share = max(0.02, 1 - (task.body - task.budget) / size)
    for down in (matrix for matrix in inner if matrix.kind == "down_proj"):
        inputs = task.inputs_of(down)
        weight = dense_weight(model.get_submodule(down.name)).double()
        power = inputs.diagonal() * weight.square().sum(dim=0)
        kept = power.topk(int(kept_share * len(power))).indices.sort().values
        model.set_submodule(down.name, linear_of(refitted_writer(weight, inputs, kept)[:, kept]))
        for matrix in (m for m in inner if m.layer == down.layer and m is not down):
            rows = dense_weight(model.get_submodule(matrix.name))[kept]
            model.set_submodule(matrix.name, linear_of(rows))
    return model


def ours(task: Task) -> PreTrainedModel:
    """As the command does it."""
    options = CompressOptions(source="", out=Path("unused"), keep=task.keep)
    store = _own_store(task, "whole")
    choices = make_plan(options, task.dense, store, task.text, task.precision, lambda stage, done: None)
    return _fitted(task, store, choices)


def ours_of_ranks_alone(task: Task) -> PreTrainedModel:
    """All units stay."""
    store = _own_store(task, "ranks")
    singles = [store.group((number,), torch.device("cpu")) for number in range(len(task.matrices))]
    price = choose_ranks(singles, task.budget)[1]
    groups = merge_groups(
        singles, task.matrices, price, lambda members: store.group(members, torch.device("cpu")).losses
    )
    return _fitted(task, store, choose_ranks(groups, task.budget)[0])


def ours_of_equal_ranks(task: Task) -> PreTrainedModel:
    """All units stay, nothing is shared, and the same part of every matrix is kept."""
    return _fitted(task, _own_store(task, "equal"), _one_each(task, compact_rank))


def _own_store(task: Task, name: str) -> MomentStore:
    """The same moments, with a work folder of its own for ranks and factors."""
    identity = {"method": name, "keep": task.keep}
    own = MomentStore(WorkFolder(task.work / f"{name}-{task.keep:g}", identity), task.matrices)
    for layer in task.store.layers:
        link = own.work.path / f"moments-{layer}.safetensors"
        if not link.exists():
            link.symlink_to((task.store.work.path / link.name).resolve())
    return own


def _fitted(task: Task, store: MomentStore, choices: list[Choice]) -> PreTrainedModel:
    """The better on the held-out windows of the fit to the dense inputs and of the one that follows."""
    model = copy.deepcopy(task.dense)
    direct = fit_directly(model, task.matrices, choices, lambda layers: store.of_layers(layers, torch.device("cpu")))
    following = fit_layers(
        model, task.matrices, choices, store, task.text.train, task.precision, lambda stage, done: None
    )
    followed = loss_of(model, task.text.valid, task.precision)
    put_in(model, task.matrices, direct)
    better = direct if loss_of(model, task.text.valid, task.precision) <= followed else following
    store.work.close()
    return compressed_model(model, task.matrices, choices, better)


OURS = "kalmagrove"
METHODS: dict[str, Callable[[Task], PreTrainedModel]] = {
    "svd": lambda task: low_rank(task, plain_split),
    "asvd": lambda task: low_rank(task, scaled_split),
    "svd-llm": lambda task: low_rank(task, whitened_split),
    "svd-llm followed": followed_low_rank,
    "svd-llm compact": compact_low_rank,
    "basis sharing": basis_sharing,
    "cut units": cut_units,
    "kalmagrove equal ranks": ours_of_equal_ranks,
    "kalmagrove ranks alone": ours_of_ranks_alone,
    OURS: ours,
}
RIVALS = ("svd", "asvd", "svd-llm", "svd-llm followed", "basis sharing", "cut units")
"""What others do; the rest is ours with parts left out."""
NO_REFIT = ("svd-llm compact",)
"""Only multiplied out here: a refit would train more numbers than are counted."""
