"""Divides a model's parameters between Kalma, its tables and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kalmagrove.optim.parameters import name_of
from kalmagrove.optim.statistics import is_transposed_linear

FUSED_PROJECTIONS = {"c_attn": 3, "qkv": 3, "qkv_proj": 3, "in_proj_weight": 3}
"""Names of layers or parameters that hold several matrices, and how many."""


def kalma_groups(
    model: nn.Module,
    *,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    auxiliary_lr: float = 2e-2,
    core_lr: float = 2e-3,
    auxiliary_weight_decay: float = 0.0,
    fused: Mapping[str, int] = FUSED_PROJECTIONS,
) -> list[dict[str, Any]]:
    """Divides a model's parameters: hidden matrices to Kalma, embeddings and heads to its tables, all else to AdamW.

    Embeddings and the head are known by their modules and by identity, so a tied head is never taken for a matrix.
    Convolutions over all channels are matrices; depth-wise ones are vectors. A 3-D parameter with "experts" in its name
    is a matrix for each expert.

    Args:
        model: Any module; ``get_output_embeddings()`` is asked for the head where it exists, else a linear layer
            named ``lm_head`` or ``head`` is it.
        lr: Of the hidden matrices.
        weight_decay: Of the hidden matrices.
        auxiliary_lr: Of embeddings, heads and vectors.
        core_lr: Of vectors and blocks between the factors of a matrix: parameters named ``core``, and their
            ``adaptors``. They multiply whole rows, and at the rate of other vectors they cost more than they bring.
        auxiliary_weight_decay: Of embeddings, heads, vectors and cores.
        fused: Parts of names of parameters that fuse matrices, with their number. Applied where the outputs can be
            divided by it; for unequal parts make a group of your own with ``split_sizes``.

    Returns:
        Groups for :class:`~kalmagrove.optim.kalma.Kalma`, each with its parameters' names in ``names``.
    """
    tables = {id(p) for p in embeddings_of(model)}
    transposed = {id(m.weight) for m in model.modules() if is_transposed_linear(m)}
    dense_convolutions = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) and m.groups == 1
    }
    matrices: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    vocabularies: list[tuple[str, Tensor]] = []
    cores: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        stacked = parameter.ndim == 3 and "experts" in name
        is_matrix = (parameter.ndim == 2 or stacked) and min(parameter.shape[-2:]) > 1
        if (is_matrix and id(parameter) not in tables) or id(parameter) in dense_convolutions:
            is_transposed = id(parameter) in transposed
            outputs = parameter.shape[-1 if is_transposed else 0]
            split = None if stacked else _split_sizes(name, outputs, fused)
            matrices.setdefault((is_transposed, split, stacked), []).append((name, parameter))
        elif parameter.ndim == 2 and id(parameter) in tables:
            vocabularies.append((name, parameter))
        elif "core" in name.split(".") or "adaptors" in name.split("."):
            cores.append((name, parameter))
        else:
            rest.append((name, parameter))
    groups = [
        _group("kalma", members, lr, weight_decay) | {"transposed": key[0], "split_sizes": key[1], "stacked": key[2]}
        for key, members in matrices.items()
    ]
    others = (("table", vocabularies, auxiliary_lr), ("adamw", rest, auxiliary_lr), ("adamw", cores, core_lr))
    return groups + [
        _group(method, members, rate, auxiliary_weight_decay) for method, members, rate in others if members
    ]


def embeddings_of(model: nn.Module) -> Iterator[Tensor]:
    """The tables of a model: embeddings, and the output head."""
    for name, module in model.named_modules():
        is_head = isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ("lm_head", "head")
        if is_head or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield module.weight
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    if head is not None:
        yield from head.parameters()


def describe_groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """Who gets what: a line a group with its method, lr, and how many tensors and parameters."""
    lines = []
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        names = sorted({_role(name_of(group, index)) for index in range(len(group["params"]))})
        lines.append(
            f"{group['method']}: {len(group['params'])} tensors, {count:,} parameters, lr {group['lr']:g}, "
            f"weight decay {group['weight_decay']:g} ({', '.join(names)})"
        )
    return "\n".join(lines)


def _group(method: str, members: list[tuple[str, Tensor]], lr: float, weight_decay: float) -> dict[str, Any]:
    return {
        "method": method,
        "params": [parameter for _, parameter in members],
        "names": [name for name, _ in members],
        "lr": lr,
        "weight_decay": weight_decay,
    }


def _split_sizes(name: str, outputs: int, fused: Mapping[str, int]) -> tuple[int, ...] | None:
    for part in name.split("."):
        count = fused.get(part)
        if count is not None and outputs % count == 0:
            return (outputs // count,) * count
    return None


def _role(name: str) -> str:
    """The part of a parameter's name that says what it is: ``q_proj`` of ``layers.3.q_proj.weight``."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("weight", "bias", "bases")]
    return parts[-1] if parts else name
