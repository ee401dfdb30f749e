"""Kalma: the Kalman filter's update for weight matrices, as a ``torch.optim.Optimizer`` (equation 3).

For a layer y = W h the filter's gain is K = P H^T (H P H^T + R)^-1, with H the layer's input. Over a batch this is
the gradient multiplied by P on the input side, and by the inverse of the innovation's covariance on the other:

    M   = moving average of the gradient G, with look-ahead     (the innovation z - H theta, filtered)
    C   = moving average of h h^T                               (the information H^T H that a step brings)
    P   = (C + damping * mean(diag C) I)^-1                     (covariance of the estimate)
    U   = orthogonal polar factor of M P                        (the innovation whitened by its own covariance)
    W  <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(rows, columns)) U

With P = I this is Muon (Jordan, 2024) with the RMS-matched scale of arXiv:2502.16982; P is what the activations
add. Vectors, embeddings and output heads are trained by AdamW in the same optimiser.

A group with ``method="exact"`` (and ``lr=1``) is the filter to the letter for a layer whose loss is half the sum of
squared errors: ``noise`` is R = r I, ``prior`` the variance of each weight before the first step, ``forgetting`` as in
:func:`kalmagrove.optim.kalman.predict`. It keeps and inverts P^-1 every step and is meant for small layers.

Where not to use it: for embeddings or heads (their inputs are one-hot; :func:`kalma_groups` leaves them to
AdamW), for convolutions before reshaping, and with sparse or complex parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from kalmagrove.optim.curvature import ActivationStatistics, damped_inverse, inverse_square_root, newton_schulz
from kalmagrove.precision import has_fast_bfloat16

METHODS = ("kalma", "adamw", "exact")


class Kalma(torch.optim.Optimizer):
    """Kalman-filter steps for matrices, AdamW for the rest.

    Args:
        params: Parameters or groups. A group's ``method`` is "kalma" or "exact" (2-D parameters) or "adamw"; without it
            a parameter's number of axes decides. Use :func:`kalma_groups` for a model: it knows embeddings.
        lr: Step of the matrices; 0.02 suits most small language models. Groups may have their own.
        weight_decay: Decoupled decay.
        momentum: Memory of the gradient's moving average.
        damping: Of P, relative to the mean input power.
        curvature_decay: Memory of C at each refresh.
        refresh_every: Steps between refreshes of C and P.
        betas: AdamW's, for the groups with ``method="adamw"``.
        eps: AdamW's.

    Raises:
        ValueError: A number is out of its range, a method is unknown, or a parameter does not fit its method.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        damping: float = 0.1,
        curvature_decay: float = 0.95,
        refresh_every: int = 10,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        _check_range("momentum", momentum, 0.0, 1.0)
        if not 0 < damping < float("inf"):
            raise ValueError(f"damping must be positive, got {damping}")
        _check_range("curvature_decay", curvature_decay, 0.0, 1.0)
        for beta in betas:
            _check_range("betas", beta, 0.0, 1.0)
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {refresh_every}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "damping": damping,
            "curvature_decay": curvature_decay,
            "refresh_every": refresh_every,
            "betas": betas,
            "eps": eps,
            "method": None,
            "step": 0,
            "noise": 1.0,
            "forgetting": 1.0,
            "prior": 1e3,
        }
        super().__init__(_split_by_method(params), defaults)
        self._statistics: ActivationStatistics | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters must fit its method."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_range("lr", group["lr"], 0.0, float("inf"))
        _check_range("weight_decay", group["weight_decay"], 0.0, float("inf"))
        if group["method"] is None:
            matrices = {p.ndim == 2 for p in group["params"]}
            if len(matrices) > 1:
                raise ValueError(
                    "a group of matrices and vectors needs to be divided: use kalma_groups(model), or give each "
                    "group a method"
                )
            group["method"] = "kalma" if matrices != {False} else "adamw"
        if group["method"] not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {group['method']!r}")
        for parameter in group["params"]:
            if parameter.is_complex() or parameter.is_sparse:
                raise ValueError("Kalma needs dense real parameters; give complex or sparse ones to another optimiser")
            if group["method"] != "adamw" and parameter.ndim != 2:
                raise ValueError(
                    f"method {group['method']} needs 2-D parameters, got shape {tuple(parameter.shape)}; use adamw"
                )

    def attach(self, model: nn.Module) -> int:
        """Watches the model's layers, so that P comes from their inputs instead of from gradients.

        Returns:
            The number of matrices that are watched.
        """
        if self._statistics is not None:
            self._statistics.detach()
        matrices = [p for group in self.param_groups if group["method"] != "adamw" for p in group["params"]]
        exact = any(group["method"] == "exact" for group in self.param_groups)
        self._statistics = ActivationStatistics(matrices, **({"most_rows": None} if exact else {}))
        # P is refreshed with the first step, and then with every refresh_every-th.
        self._statistics.active = self._refreshes_next()
        return self._statistics.attach(model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy watches no model until it is attached."""
        super().__setstate__(state)
        # load_state_dict comes through here too, and must not end the watch.
        self.__dict__.setdefault("_statistics", None)

    def detach(self) -> None:
        """Stops watching; P then comes from gradients."""
        if self._statistics is not None:
            self._statistics.detach()
            self._statistics = None

    def _refreshes_next(self) -> bool:
        return any(
            group["method"] == "exact" or (group["method"] == "kalma" and group["step"] % group["refresh_every"] == 0)
            for group in self.param_groups
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; parameters with a gradient that is not finite are left alone, with a warning."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seen = self._statistics.take() if self._statistics is not None else {}
        for group in self.param_groups:
            parameters = _with_finite_gradient(group["params"])
            if group["method"] == "adamw":
                self._adamw_step(group, parameters)
            elif group["method"] == "exact":
                self._exact_step(group, parameters, seen)
            else:
                self._kalma_step(group, parameters, {key: total / count for key, (total, count) in seen.items()})
            group["step"] += 1
        if self._statistics is not None:
            self._statistics.active = self._refreshes_next()
        return loss

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.tensor(0.0), exp_avg=_float_zeros(parameter), exp_avg_sq=_float_zeros(parameter)
                )
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad.to(p.dtype) for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _exact_step(self, group: dict[str, Any], parameters: list[Tensor], seen: dict[int, tuple[Tensor, int]]) -> None:
        """The Kalman filter itself, in information form: P^-1 <- f P^-1 + H^T H / r, W <- W - (lr / r) G P."""
        for parameter in parameters:
            if id(parameter) not in seen:
                raise RuntimeError("method exact needs the inputs of its layers: call attach(model) before the forward")
            state, (total, _) = self.state[parameter], seen[id(parameter)]
            if not state:
                state["information"] = torch.eye(parameter.shape[1]).to(total) / group["prior"]
            information = state["information"].mul_(group["forgetting"]).add_(total / group["noise"])
            covariance = torch.cholesky_inverse(torch.linalg.cholesky(information))
            assert parameter.grad is not None
            parameter.sub_(
                (parameter.grad.to(covariance) @ covariance).to(parameter), alpha=group["lr"] / group["noise"]
            )

    def _kalma_step(self, group: dict[str, Any], parameters: list[Tensor], seen: dict[int, Tensor]) -> None:
        refresh = group["step"] % group["refresh_every"] == 0
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            if not state:
                state["momentum"] = _float_zeros(parameter)
            if refresh or "precision" not in state:
                self._refresh(group, state, gradient, seen.get(id(parameter)))
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            lookahead = gradient.lerp(momentum, group["momentum"])
            by_shape.setdefault(tuple(parameter.shape), []).append((parameter, lookahead @ state["precision"]))
        for shape, pairs in by_shape.items():
            dtype = torch.bfloat16 if has_fast_bfloat16(pairs[0][0].device) else torch.float32
            updates = newton_schulz(torch.stack([update for _, update in pairs]), dtype=dtype)
            scale = group["lr"] * 0.2 * max(shape) ** 0.5
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-scale)

    def _refresh(
        self, group: dict[str, Any], state: dict[str, Any], gradient: Tensor, activation: Tensor | None
    ) -> None:
        """Brings C and P up to date; without activations C is the gradient's own second moment."""
        observed = gradient.T @ gradient if activation is None else activation
        if "covariance" not in state:
            state["covariance"] = observed.clone()
        else:
            state["covariance"].lerp_(observed, 1 - group["curvature_decay"])
        # G^T G holds the output side's scale too: its square root is the whitening of one side (Shampoo).
        inverse = inverse_square_root if activation is None else damped_inverse
        state["precision"] = inverse(state["covariance"], group["damping"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; the statistics stay float32 whatever the type of the parameters."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, saved_ids, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[parameter][name] = value.to(parameter.device).clone()
        if self._statistics is not None:
            self._statistics.active = self._refreshes_next()


def kalma_groups(
    model: nn.Module,
    *,
    lr: float = 0.02,
    weight_decay: float = 0.1,
    auxiliary_lr: float = 3e-3,
    auxiliary_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Divides a model's parameters: hidden matrices to Kalma; embeddings, heads and all else to AdamW.

    Embeddings and the head are known by their modules and by identity, so a tied head is never taken for a matrix.

    Args:
        model: Any module; ``get_output_embeddings()`` is asked for the head where it exists, else a linear layer
            named ``lm_head`` or ``head`` is it.
        lr: Of the matrices.
        weight_decay: Of the matrices.
        auxiliary_lr: Of the rest.
        auxiliary_weight_decay: Of the rest.

    Returns:
        Two groups for :class:`Kalma`, each with its parameters' names in ``names``.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    tables |= {id(p) for p in head.parameters()} if head is not None else set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ("lm_head", "head"):
            tables.add(id(module.weight))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim == 2 and min(p.shape) > 1 and id(p) not in tables]
    chosen = {id(p) for _, p in matrices}
    rest = [(name, p) for name, p in named if id(p) not in chosen]
    groups = (
        ("kalma", matrices, lr, weight_decay),
        ("adamw", rest, auxiliary_lr, auxiliary_weight_decay),
    )
    return [
        {
            "method": method,
            "params": [p for _, p in members],
            "names": [name for name, _ in members],
            "lr": rate,
            "weight_decay": decay,
        }
        for method, members, rate, decay in groups
        if members
    ]


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """Who gets what: a line a group with its method, lr, and how many tensors and parameters."""
    lines = []
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        names = sorted({_role(name) for name in group["names"]})
        lines.append(
            f"{group['method']}: {len(group['params'])} tensors, {count:,} parameters, lr {group['lr']:g}, "
            f"weight decay {group['weight_decay']:g} ({', '.join(names)})"
        )
    return "\n".join(lines)


def _role(name: str) -> str:
    """The part of a parameter's name that says what it is: ``q_proj`` of ``layers.3.q_proj.weight``."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("weight", "bias", "bases")]
    return parts[-1] if parts else name


def _split_by_method(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups stay as they are; bare parameters become a group of matrices and a group of the rest."""
    items = list(params)
    if items and isinstance(items[0], dict):
        return items
    values = [item[1] if isinstance(item, tuple) else item for item in items]
    split: tuple[tuple[Literal["kalma", "adamw"], list[Tensor]], ...] = (
        ("kalma", [p for p in values if p.ndim == 2]),
        ("adamw", [p for p in values if p.ndim != 2]),
    )
    groups = [{"method": method, "params": members} for method, members in split if members]
    return groups or [{"params": []}]


def _with_finite_gradient(parameters: list[Tensor]) -> list[Tensor]:
    present = [p for p in parameters if p.grad is not None]
    if not present:
        return []
    norms = torch.stack([p.grad.norm() for p in present if p.grad is not None])
    finite = torch.isfinite(norms).tolist()
    if not all(finite):
        warnings.warn(
            f"{finite.count(False)} of {len(finite)} gradients are not finite; those parameters keep their values",
            RuntimeWarning,
            stacklevel=3,
        )
    return [p for p, good in zip(present, finite, strict=True) if good]


def _float_zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")
