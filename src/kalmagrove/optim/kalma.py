"""Kalma: an optimiser of weight matrices made from the Kalman filter's gain, a ``torch.optim.Optimizer`` (equation 3).

For a layer y = W h the filter's gain is K = P H^T (H P H^T + R)^-1, with H the layer's input. Over a batch this is
the gradient multiplied by P on the input side, and by the inverse of the innovation's covariance:

    C   = moving average of h h^T                               (the information H^T H that a step brings)
    P   = (C + damping * mean(diag C) I)^-1                     (covariance of the estimate)
    M   = moving average of the gradient G, with look-ahead     (the innovation z - H theta, filtered)
    U   = M P whitened by the covariance of G P                 (see :mod:`kalmagrove.optim.whitening`)
    W  <- (1 - lr * weight_decay) W - lr U

With P = I this is SOAP (arXiv:2409.11321) with look-ahead; P is what the activations add. Embeddings and output heads
(method "table") are whitened on the side of their features alone and have no P; vectors are trained by AdamW.

A group with ``method="exact"`` (and ``lr=1``) is the filter to the letter for a layer whose loss is half the sum of
squared errors: ``noise`` is R = r I, ``prior`` the variance of each weight before the first step, ``forgetting`` as in
:func:`kalmagrove.optim.kalman.predict`. It keeps and inverts P^-1 every step and is meant for small layers.

Where not to use it: with sparse or complex parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, distributed, nn
from torch.optim.adamw import adamw

from kalmagrove.optim.curvature import BLOCK_SIZE, blocks_shape, damped_inverse, times_blocks
from kalmagrove.optim.distributed import as_shard, average_across_ranks, whole_tensor
from kalmagrove.optim.division import WorkDivision
from kalmagrove.optim.group_options import block_size_of, check_group, layout_of, split_by_method
from kalmagrove.optim.groups import embeddings_of
from kalmagrove.optim.layout import Layout
from kalmagrove.optim.parameters import by_placement, listed, master_type, name_of, uphill, warn, with_finite_gradient
from kalmagrove.optim.statistics import ActivationStatistics, is_transposed_linear
from kalmagrove.optim.whitening import PartState, Whitening, in_one, row_major, write_back

Seen = dict[int, tuple[Tensor, int]]
WATCHED_METHODS = ("kalma", "exact")
"""Of the groups whose matrices have a P."""


class _Part(NamedTuple):
    """One of the matrices of the parameter with this number."""

    parameter: int
    state: PartState
    innovation: Tensor
    gradient: Tensor


class Kalma(torch.optim.Optimizer):
    """Kalman-filter steps for matrices, AdamW for the rest.

    Args:
        params: Parameters or groups. A group's ``method`` is "kalma" (parameters of two axes or more), "table"
            (embeddings and heads), "exact" (two axes) or "adamw"; without it a parameter's number of axes decides. A
            group may have the options of a :class:`~kalmagrove.optim.layout.Layout`: ``transposed``, ``split_sizes``,
            ``stacked``. For a whole model use :func:`~kalmagrove.optim.groups.kalma_groups`: it knows all of these.
        lr: Step of the matrices, of a size as AdamW's. Groups may have their own.
        weight_decay: Decoupled decay.
        momentum: Memory of the gradient's moving average.
        variance_decay: Memory of the innovation's variance in its eigenbases.
        covariance_decay: Memory of the covariances: the inputs' at each refresh, the innovation's at each step.
        damping: Of P, relative to the mean input power.
        refresh_every: Steps between looks at the inputs, which renew C and P.
        turn_every: Steps between turns of the eigenbases.
        block_size: C, P and bases of wider sides are cut into equal diagonal blocks of at most this size.
        betas: AdamW's, for the groups with ``method="adamw"``.
        eps: AdamW's.
        maximize: Goes up instead of down.

    Raises:
        ValueError: A number is out of its range, a method is unknown, or a parameter does not fit its method.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.9,
        variance_decay: float = 0.99,
        covariance_decay: float = 0.95,
        damping: float = 0.1,
        refresh_every: int = 10,
        turn_every: int = 3,
        block_size: int = BLOCK_SIZE,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "variance_decay": variance_decay,
            "covariance_decay": covariance_decay,
            "damping": damping,
            "refresh_every": refresh_every,
            "turn_every": turn_every,
            "block_size": block_size,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "method": None,
            "transposed": False,
            "split_sizes": None,
            "stacked": False,
            "step": 0,
            "noise": 1.0,
            "forgetting": 1.0,
            "prior": 1e3,
        }
        self._statistics: ActivationStatistics | None = None
        self._warned_of_unseen = False
        self._division: WorkDivision | None = None
        super().__init__(split_by_method(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its parameters must fit its method."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if getattr(self, "_statistics", None) is not None and self.param_groups[-1]["method"] in WATCHED_METHODS:
            warn("a group was added after attach(model); attach again, or there is no P for it")

    def attach(self, model: nn.Module, *, divide_work: bool = False) -> int:
        """Watches the model's layers, so that their inputs give P; without it P is the identity.

        Where ``torch.distributed`` is in use, the inputs' covariances are summed over all ranks at each refresh.

        Args:
            model: The model that is trained.
            divide_work: Whether each matrix is whitened, and its statistics kept, by one rank alone. Then
                ``state_dict`` holds this rank's part, and :meth:`gathered_state_dict` the whole. Every matrix must have
                a gradient on all ranks or on none, and nothing can be saved when a rank is gone. Once divided the
                work stays so, as nobody has the whole state. Method "exact" is
                the filter in one process only.

        Returns:
            The number of matrices that are watched. The others, if any, have no P; a warning names them.

        Raises:
            ValueError: No matrix of the model is in the groups, or an embedding is among the matrices.
        """
        self.detach()
        block_sizes, names = self._check_model(model)
        exact = any(group["method"] == "exact" for group in self.param_groups)
        statistics = ActivationStatistics(block_sizes, **({"most_rows": None} if exact else {}))
        statistics.attach(model)
        if not statistics.watched:
            statistics.detach()
            raise ValueError(
                "none of the model's layers multiplies by a matrix of this optimiser: attach the model whose "
                "parameters the optimiser was made with"
            )
        unwatched = [name for key, name in names.items() if key not in statistics.watched]
        unwatched += self._matrices_elsewhere(names)
        if unwatched:
            warn(f"no layer shows the inputs of {listed(unwatched)}; there is no P for them")
        self._statistics, self._warned_of_unseen = statistics, False
        if divide_work and distributed.is_available() and distributed.is_initialized():
            self._division = WorkDivision(self._costs())
        # P is refreshed with the first step, and then with every refresh_every-th.
        statistics.active = self._refreshes_next()
        return len(statistics.watched)

    def detach(self) -> None:
        """Stops watching; P stays as it is, and what ranks divided between them stays divided."""
        if self._statistics is not None:
            self._statistics.detach()
            self._statistics = None

    @property
    def divides_work(self) -> bool:
        """Whether other ranks hold a part of the state."""
        return self._division is not None

    @property
    def looks_next(self) -> bool:
        """Whether the forwards before the next step are looked at, for a refresh of P."""
        return self._statistics is not None and self._statistics.active

    def set_hooks(self, on: bool) -> None:
        """Puts the hooks that watch the model's layers in place, or takes them away.

        They interrupt a compiled model. Without them forwards are not looked at, so they must be there, and the model
        must not be the compiled one, in every step before which :attr:`looks_next` is true.
        """
        if self._statistics is not None:
            self._statistics.set_hooks(on)

    def count_tokens(self, mask: Tensor | None) -> None:
        """Which tokens of the forwards to come count for C; None is all.

        Args:
            mask: True where a token counts, (batch, sequence): padding is False. Inputs of another leading shape are
                taken whole.
        """
        if self._statistics is None:
            raise RuntimeError("count_tokens needs attach(model) before it")
        self._statistics.token_mask = None if mask is None else mask.bool()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; parameters with a gradient that is not finite are left alone, with a warning that names them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seen: Seen = {}
        if self._statistics is not None:
            if self._statistics.active:
                self._warn_of_unseen(self._statistics.unseen())
            seen = self._statistics.take()
            if self._statistics.active:
                seen = average_across_ranks(seen, self._shapes_of_statistics(), device=self._device)
        with torch.autocast(self._device.type, enabled=False):
            for group in self.param_groups:
                parameters = with_finite_gradient(group)
                if group["method"] == "adamw":
                    self._adamw_step(group, parameters)
                elif group["method"] == "exact":
                    self._exact_step(group, parameters, seen)
                else:
                    self._kalma_step(group, parameters, seen)
                group["step"] += 1
        if self._statistics is not None:
            self._statistics.active = self._refreshes_next()
        return loss

    @property
    def _device(self) -> torch.device:
        """Of the first parameter: groups may be empty."""
        first = next((p for group in self.param_groups for p in group["params"]), None)
        return torch.device("cpu") if first is None else first.device

    def _warn_of_unseen(self, unseen: set[int]) -> None:
        """Once: matrices that are trained without a P, since no forward of their layers came by."""
        if self._warned_of_unseen:
            return
        names = [
            name_of(group, index)
            for group in self.param_groups
            for index, p in enumerate(group["params"])
            if id(p) in unseen and p.grad is not None and "gain" not in self.state[p]
        ]
        if names:
            self._warned_of_unseen = True
            warn(
                f"the inputs of {listed(names)} were not seen before this step, so that there is no P for them: their "
                "layers were passed by, or the model is in evaluation mode, or was compiled before it was attached"
            )

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter, dtype=master_type(parameter)),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=master_type(parameter)),
                }
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        # The moments are float32 or better whatever the parameter is, and torch's kernels want one type.
        masters = [p.to(master_type(p)) for p in parameters]
        adamw(
            masters,
            [p.grad.to(m.dtype) for p, m in zip(parameters, masters, strict=True) if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def _exact_step(self, group: dict[str, Any], parameters: list[Tensor], seen: Seen) -> None:
        """The Kalman filter itself, in information form: P^-1 <- f P^-1 + H^T H / r, W <- W - (lr / r) G P."""
        for parameter in parameters:
            if id(parameter) not in seen:
                raise RuntimeError(
                    "method exact needs the inputs of its layers: call attach(model) before the forward, and again "
                    "once a group was added"
                )
            state, total = self.state[parameter], seen[id(parameter)][0][0]
            if not state:
                state["information"] = torch.eye(parameter.shape[1]).to(total) / group["prior"]
            information = state["information"].mul_(group["forgetting"]).add_(total / group["noise"])
            covariance = torch.cholesky_inverse(torch.linalg.cholesky(information))
            step = uphill(parameter, group).to(covariance) @ covariance
            parameter.sub_(step.to(parameter), alpha=float(group["lr"]) / group["noise"])

    @torch.compiler.disable
    def _kalma_step(self, group: dict[str, Any], parameters: list[Tensor], seen: Seen) -> None:
        layout, division = layout_of(group), self._division
        own = [division is None or division.is_own(p) for p in parameters]
        self._refresh(group, [p for p, is_own in zip(parameters, own, strict=True) if is_own and id(p) in seen], seen)
        parts = self._parts(group, layout, parameters, own)
        by_shape: dict[tuple[Any, ...], list[_Part]] = {}
        for part in parts:
            by_shape.setdefault((part.gradient.shape, part.gradient.dtype, part.gradient.device), []).append(part)
        whitening = Whitening(
            variance_decay=group["variance_decay"],
            covariance_decay=group["covariance_decay"],
            block_size=group["block_size"],
            features_only=group["method"] == "table",
        )
        updates: list[list[Tensor]] = [[] for _ in parameters]
        for equal in by_shape.values():
            whitened = whitening.whiten(
                torch.stack([part.innovation for part in equal]),
                torch.stack([part.gradient for part in equal]),
                [part.state for part in equal],
                turn=group["step"] % group["turn_every"] == 0,
            )
            for part, update in zip(equal, whitened, strict=True):
                updates[part.parameter].append(update)
        done = {i: layout.restore(u, parameters[i]) for i, u in enumerate(updates) if u}
        if division is not None:
            done = division.exchange(done, parameters, master_type)
        self._apply(group, parameters, [as_shard(done[i], p) for i, p in enumerate(parameters)])

    @staticmethod
    def _apply(group: dict[str, Any], parameters: list[Tensor], updates: list[Tensor]) -> None:
        """Decay and step, rounded once: a decay of 1e-4 alone would be lost in bfloat16."""
        lr = float(group["lr"])
        for indices in by_placement(parameters):
            masters = [parameters[i].to(master_type(parameters[i])) for i in indices]
            torch._foreach_mul_(masters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(masters, [updates[i] for i in indices], alpha=-lr)
            for index, master in zip(indices, masters, strict=True):
                if parameters[index] is not master:
                    parameters[index].copy_(master)

    def _parts(self, group: dict[str, Any], layout: Layout, parameters: list[Tensor], own: list[bool]) -> list[_Part]:
        """This rank's matrices of the parameters with M P and G P; P is the identity where inputs were never seen."""
        wholes = self._whole_gradients(group, layout, parameters, own)
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for index, pair in wholes.items():
            parameter = parameters[index]
            gain = self.state[parameter].get("gain")
            key = (pair[0].shape, pair[0].dtype, pair[0].device, None if gain is None else gain.shape)
            by_shape.setdefault(key, []).append(index)
        for (*_, gain_shape), indices in by_shape.items():
            if gain_shape is None:
                continue
            gains = in_one([PartState(self.state[parameters[index]]) for index in indices], "gain")
            both = torch.stack([t for index in indices for t in wholes[index]])
            rows = both.reshape(len(indices), -1, both.shape[-1])
            products = times_blocks(rows, gains.to(rows.dtype)).reshape(len(indices), 2, *both.shape[1:])
            for index, product in zip(indices, products, strict=True):
                wholes[index] = list(product)
        return [
            _Part(index, PartState(self.state[parameters[index]], place), *pair)
            for index, both in wholes.items()
            for place, pair in enumerate(zip(*(layout.parts(t) for t in both), strict=True))
        ]

    def _whole_gradients(
        self, group: dict[str, Any], layout: Layout, parameters: list[Tensor], own: list[bool]
    ) -> dict[int, list[Tensor]]:
        """Look-ahead and gradient of this rank's own parameters, by their place among all of them.

        Every rank has its part of a sharded parameter's momentum; that of any other one is its owner's alone.
        """
        held = [i for i, p in enumerate(parameters) if own[i] or hasattr(p, "full_tensor")]
        gradients, lookaheads = self._momentum(group, [parameters[i] for i in held])
        wholes: dict[int, list[Tensor]] = {}
        for i, *pair in zip(held, lookaheads, gradients, strict=True):
            # All ranks gather one after the other, and only the owner keeps what it got.
            gathered = [layout.whole(whole_tensor(t)) for t in pair]
            if own[i]:
                wholes[i] = gathered
        return wholes

    def _momentum(self, group: dict[str, Any], parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients, and their moving averages with look-ahead, (1 - m) G + m M, as the parameters are held."""
        gradients = [uphill(p, group).to(master_type(p)) for p in parameters]
        decay, states = group["momentum"], [self.state[p] for p in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if "momentum" not in state:
                state |= {"step": 0, "momentum": torch.zeros_like(gradient)}
            state["step"] += 1
        lookaheads = list(gradients)
        for indices in by_placement(parameters):
            momenta, own = [states[i]["momentum"] for i in indices], [gradients[i] for i in indices]
            torch._foreach_lerp_(momenta, own, 1 - decay)
            ahead = torch._foreach_mul(momenta, decay)
            torch._foreach_add_(ahead, own, alpha=1 - decay)
            # The look-ahead's weights sum to this while the average is young.
            torch._foreach_div_(ahead, [1 - decay ** (states[i]["step"] + 1) for i in indices])
            for index, tensor in zip(indices, ahead, strict=True):
                lookaheads[index] = tensor
        return gradients, lookaheads

    def _refresh(self, group: dict[str, Any], parameters: list[Tensor], seen: Seen) -> None:
        """Brings C and P up to date with the inputs that were seen, at the group's own refreshes."""
        is_due = group["step"] % group["refresh_every"] == 0
        changed: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in parameters:
            if is_due or "covariance" not in self.state[parameter]:
                total = seen[id(parameter)][0]
                changed.setdefault((total.shape, total.dtype, total.device), []).append(parameter)
        for equal in changed.values():
            states = [PartState(self.state[p]) for p in equal]
            observed = torch.stack([total / count for total, count in (seen[id(p)] for p in equal)])
            for state, own in zip(states, observed, strict=True):
                if "covariance" not in state:
                    state["covariance"] = own.clone()
            old = in_one(states, "covariance")
            # Inputs that overflowed are left out: C would be lost for good.
            new = torch.where(_all_finite(observed), observed, old).lerp(old, group["covariance_decay"])
            old.copy_(torch.where(_all_finite(new), new, torch.zeros_like(new)))
            write_back(states, "covariance", old)
            for state, gain in zip(states, row_major(damped_inverse(old, group["damping"])), strict=True):
                state["gain"] = gain

    def _refreshes_next(self) -> bool:
        return any(
            group["method"] == "exact" or (group["method"] == "kalma" and group["step"] % group["refresh_every"] == 0)
            for group in self.param_groups
        )

    def _check_model(self, model: nn.Module) -> tuple[dict[int, int], dict[int, str]]:
        """The matrices of the groups that are parameters of the model: their largest blocks and names, by ``id``."""
        names = {id(p): name for name, p in model.named_parameters()}
        groups = [group for group in self.param_groups if group["method"] in WATCHED_METHODS]
        matrices = {id(p): group for group in groups for p in group["params"] if id(p) in names}
        tables = [names[key] for key in {id(p) for p in embeddings_of(model)} & matrices.keys()]
        if tables:
            raise ValueError(
                f"{listed(tables)} is an embedding or a head, which has no P; make the groups with "
                "kalma_groups(model), or give it method table"
            )
        for module in model.modules():
            stored_transposed = is_transposed_linear(module)
            if not (stored_transposed or isinstance(module, nn.Linear)) or id(module.weight) not in matrices:
                continue
            if matrices[id(module.weight)]["transposed"] != stored_transposed:
                order = "(inputs, outputs)" if stored_transposed else "(outputs, inputs)"
                raise ValueError(
                    f"{names[id(module.weight)]} is stored as {order}; make the groups with kalma_groups(model), or "
                    f"give its group transposed={stored_transposed}"
                )
        sizes = {key: block_size_of(group) for key, group in matrices.items()}
        return sizes, {key: names[key] for key in matrices}

    def _matrices_elsewhere(self, names: dict[int, str]) -> list[str]:
        """Names of the groups' matrices that are not among those of the model."""
        return [
            name_of(group, index)
            for group in self.param_groups
            if group["method"] in WATCHED_METHODS
            for index, p in enumerate(group["params"])
            if id(p) not in names
        ]

    def _costs(self) -> dict[int, int]:
        """About the multiplications that whitening each matrix takes, by ``id``."""
        return {
            id(p): p.numel() * (p.shape[0] + p.numel() // p.shape[0])
            for group in self.param_groups
            if group["method"] in ("kalma", "table")
            for p in group["params"]
        }

    def gathered_state_dict(self) -> dict[str, Any]:
        """The state of all ranks with ``divide_work``, whole on the first; else as ``state_dict``.

        All ranks must call this together.
        """
        return self.state_dict() if self._division is None else self._division.gathered_state(self)

    def _shapes_of_statistics(self) -> dict[int, tuple[int, int, int]]:
        """The shape of C for each watched matrix, in the order of the groups."""
        assert self._statistics is not None
        return {
            id(parameter): blocks_shape(layout_of(group).inputs(parameter.shape), block_size_of(group))
            for group in self.param_groups
            for parameter in group["params"]
            if id(parameter) in self._statistics.watched
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy watches no model until it is attached; options that an older version did not know get defaults."""
        super().__setstate__(state)
        # load_state_dict comes through here too, and must not end the watch.
        self.__dict__.setdefault("_statistics", None)
        self.__dict__.setdefault("_warned_of_unseen", False)
        self.__dict__.setdefault("_division", None)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; the statistics are float32 or better whatever the type of the parameters.

        Raises:
            ValueError: The state is of other parameters; nothing is changed.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        states = [state_dict["state"].get(index, {}) for index in saved_ids]
        for parameter, state in zip(parameters, states, strict=False):
            for name in ("momentum", "exp_avg"):
                if name in state and state[name].shape != parameter.shape:
                    raise ValueError(
                        f"the state is of a parameter of shape {tuple(state[name].shape)}, but this optimiser has "
                        f"{tuple(parameter.shape)} in its place; load the state into an optimiser of the same model"
                    )
        super().load_state_dict(state_dict)
        if self._statistics is not None:
            # The saved groups may have blocks of another size.
            watched = self._statistics.block_sizes
            self._statistics.block_sizes = {
                id(p): block_size_of(group) for group in self.param_groups for p in group["params"] if id(p) in watched
            }
        for parameter, state in zip(parameters, states, strict=True):
            for name, value in state.items():
                if isinstance(value, Tensor) and name != "step":
                    kind = master_type(parameter) if value.is_floating_point() else value.dtype
                    self.state[parameter][name] = value.to(parameter.device, kind).clone()
        if self._division is not None:
            self._division.forget_others(self)
        if self._statistics is not None:
            self._statistics.active = self._refreshes_next()


def _all_finite(matrices: Tensor) -> Tensor:
    """Whether each of the matrices (matrices, blocks, size, size) is finite, with axes of one in the others' places."""
    return torch.isfinite(matrices).flatten(1).all(1).view(-1, 1, 1, 1)
