"""What each weight matrix multiplies, watched while a model is trained.

For a layer y = W h the measurement matrix of the Kalman filter is the layer's input, so the information that a
batch brings about W is H^T H = sum of h h^T. Its running mean is the covariance C of Kalma; its damped inverse
is the filter's P, up to a scale that the optimiser's step does not depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kalmagrove.optim.curvature import block_count, block_gram

SAMPLED_TOKENS = 2048


@runtime_checkable
class TellsWeightInputs(Protocol):
    """A module of several matrices that can say which input each of them multiplies."""

    def multiplied_matrices(self) -> Iterable[Tensor]:
        """The matrices."""
        ...

    def weight_inputs(self, x: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """(matrix, what it multiplies) for an input ``x`` of the module."""
        ...


class ActivationStatistics:
    """Collects ``sum of h h^T`` for the weight matrices of a model while it is trained.

    Linear layers and the Conv1D of transformers are known; any other module may be a :class:`TellsWeightInputs`, as
    Grove's layers are. A matrix that several layers use gets the sum of all. Nothing is collected unless
    :attr:`active`, gradients are on and the module is in training mode; a forward that is repeated for its activations
    in the backward (checkpointing) counts once.

    Args:
        block_sizes: The matrices that are asked for, by ``id``, and the largest block of C for each.
        most_rows: Rows of an input that are looked at, at even distance; None is all.

    Attributes:
        active: Whether forwards are watched.
        token_mask: True where a token counts, with the leading shape of the layers' inputs; None is everywhere.
        block_sizes: As above.
    """

    def __init__(self, block_sizes: dict[int, int], *, most_rows: int | None = SAMPLED_TOKENS) -> None:
        self.active = False
        self.token_mask: Tensor | None = None
        self.most_rows = most_rows
        self.watched: set[int] = set()
        self.block_sizes = block_sizes
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._seen_in_forward: set[int] = set()
        # Query, key and value projections read the same tensor: it is sampled and squared once.
        self._source: Tensor | None = None
        self._source_version = 0
        self._source_rows: Tensor | None = None
        self._gram_rows: Tensor | None = None
        self._grams: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._observers: list[tuple[nn.Module, Callable[..., None]]] = []
        self._places: list[tuple[nn.Module, str, int]] = []
        self._keys_in_forward: dict[int, int | None] = {}

    def __reduce__(self) -> tuple[type[ActivationStatistics], tuple[dict[int, int]]]:
        """A copy of a watched model takes its hooks along, and is not watched."""
        return ActivationStatistics, ({},)

    def attach(self, model: nn.Module) -> None:
        """Watches a model's layers."""
        # A sharded parameter is swapped for another tensor in the forward, at the same place of its module.
        self._places = [
            (module, name, id(parameter))
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in self.block_sizes
        ]
        for module in model.modules():
            matrices = list(_multiplied(module))
            if not self.block_sizes.keys() & {id(p) for p in matrices}:
                continue
            self.watched |= {id(p) for p in matrices} & self.block_sizes.keys()
            single = None if isinstance(module, TellsWeightInputs) else id(matrices[0])
            self._observers.append((module, partial(self._observe, single)))
        self.set_hooks(True)

    def set_hooks(self, on: bool) -> None:
        """Takes the hooks away from the layers for a while, or puts them back: they interrupt compiled code."""
        for handle in self._handles:
            handle.remove()
        self._handles = [
            module.register_forward_pre_hook(observe, with_kwargs=True) for module, observe in self._observers if on
        ]

    def detach(self) -> None:
        """Stops watching."""
        self.set_hooks(False)
        self._observers, self._places, self._keys_in_forward = [], [], {}

    @torch.compiler.disable
    def _observe(self, single: int | None, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self.active or not torch.is_grad_enabled() or not module.training or self._is_repeated(module):
            return
        x = args[0] if args else next(iter(named.values()))
        if _is_batched(x):
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows = self._sampled(x)
            if single is not None:
                self._add(single, rows)
                return
            assert isinstance(module, TellsWeightInputs)
            for parameter, seen in module.weight_inputs(_as_narrow(rows, module.multiplied_matrices())):
                key = self._key(parameter)
                if key is not None and not _is_batched(seen):
                    self._add(key, seen.to(rows.dtype))

    def _key(self, parameter: Tensor) -> int | None:
        """The ``id`` that a parameter had when the watch began; None where nobody asked for its inputs."""
        key = id(parameter)
        if key not in self.block_sizes and key not in self._keys_in_forward:
            self._keys_in_forward[key] = None
            self._keys_in_forward |= {id(module._parameters[name]): before for module, name, before in self._places}
        return key if key in self.block_sizes else self._keys_in_forward[key]

    def _is_repeated(self, module: nn.Module) -> bool:
        """Whether this forward runs inside a backward, and was counted before it."""
        if torch._C._current_graph_task_id() == -1:
            self._seen_in_forward.add(id(module))
            return False
        return id(module) in self._seen_in_forward

    def _sampled(self, x: Tensor) -> Tensor:
        # A buffer that is filled anew is the same tensor in another version.
        if self._source is not x or self._source_version != x._version or self._source_rows is None:
            self._source, self._source_version = x, x._version
            self._source_rows = _sample_rows(x, self.token_mask, self.most_rows)
        return self._source_rows

    def _add(self, key: int, rows: Tensor) -> None:
        blocks = block_count(rows.shape[-1], self.block_sizes[key])
        if self._gram_rows is not rows:
            self._gram_rows, self._grams = rows, {}
        if blocks not in self._grams:
            self._grams[blocks] = block_gram(rows, blocks)
        gram = self._grams[blocks]
        self._sums[key] = self._sums[key] + gram if key in self._sums else gram
        self._counts[key] = self._counts.get(key, 0) + rows.shape[0]

    def unseen(self) -> set[int]:
        """The watched matrices of which no forward came by, by ``id``."""
        return self.watched - self._sums.keys()

    def take(self) -> dict[int, tuple[Tensor, int]]:
        """The sum of ``h h^T`` in blocks, (blocks, size, size), and the number of ``h``, by ``id``; starts anew."""
        seen = {key: (total, self._counts[key]) for key, total in self._sums.items() if self._counts[key]}
        self._sums, self._counts, self._grams = {}, {}, {}
        self._seen_in_forward.clear()
        self._source = self._source_rows = self._gram_rows = None
        return seen


def _as_narrow(rows: Tensor, matrices: Iterable[Tensor]) -> Tensor:
    """Rows in the type of 16-bit matrices, with which they are to be multiplied."""
    narrow = next((matrix.dtype for matrix in matrices if matrix.dtype.itemsize < 4), rows.dtype)
    return rows.to(narrow)


def _is_batched(x: Tensor) -> bool:
    """Whether ``torch.func.vmap`` is at work: its tensors must not outlive it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers: a linear layer whose weight is (inputs, outputs)."""
    # Known by its name: this package of optimisers needs torch alone.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def _multiplied(module: nn.Module) -> Iterable[Tensor]:
    if isinstance(module, TellsWeightInputs):
        return module.multiplied_matrices()
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return [weight]
    return []


def _sample_rows(x: Tensor, mask: Tensor | None, most_rows: int | None) -> Tensor:
    """At most ``most_rows`` rows of ``x`` (..., features) at even distance, in float32 or better."""
    rows = x.detach()
    if mask is not None and mask.shape == x.shape[:-1]:
        rows = rows[mask.to(rows.device)]
    rows = rows.reshape(-1, x.shape[-1])
    step = 1 if most_rows is None else max(1, -(-rows.shape[0] // most_rows))
    return rows[::step].to(torch.promote_types(rows.dtype, torch.float32))
