"""The training of an adaptor: the house's run and session over a frozen base; a checkpoint holds the cores alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.adaptation.config import AdaptConfig
from kalmagrove.adaptors.adaptors import Adaptors
from kalmagrove.adaptors.bases import Bases
from kalmagrove.adaptors.fingerprint import model_fingerprint
from kalmagrove.adaptors.gradients import text_bases
from kalmagrove.adaptors.options import DEFAULT_RATES, AdaptorOptions
from kalmagrove.adaptors.storage import ADAPTOR_FOLDER, save_adaptor
from kalmagrove.data.packing import PackedText
from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.models.convert import load_model
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.optim.build import keep_state, remember_peak_rates
from kalmagrove.optim.kalma import Kalma
from kalmagrove.training.checkpoint import Checkpoint, latest_checkpoint, naming_checkpoint
from kalmagrove.training.config import TrainConfig
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.session import TrainingSession
from kalmagrove.world import ALONE, World


def token_loss_sum(model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Sum of the nats of ``targets`` given ``input_ids``, both (batch, sequence), for ours and any of transformers."""
    if isinstance(model, KalmaGroveForCausalLM):
        return model.token_loss_sum(input_ids, targets)
    logits = model(input_ids=input_ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _loss_sum(model: nn.Module, tokens: Tensor) -> Tensor:
    return token_loss_sum(model, tokens[:, :-1], tokens[:, 1:])


class AdaptedModel(nn.Module):
    """A frozen base and the cores of its active adaptor as one module to train and to score."""

    def __init__(self, adaptors: Adaptors, name: str) -> None:
        super().__init__()
        self.base = adaptors.model
        self.layers = list(adaptors.cores(name))
        self.cores = nn.ParameterList(adaptors.cores(name).values())
        self.bases = adaptors.own_bases(name) or {}
        adaptors.set_adaptor(name)

    def train(self, mode: bool = True) -> Self:
        """The base stays in evaluation mode: its dropout would draw random numbers that a resumed run cannot repeat."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, input_ids: Tensor) -> Any:
        """What the base gives for ``input_ids`` (batch, sequence), ``logits`` among it."""
        return self.base(input_ids=input_ids)

    def token_loss_sum(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Sum of the nats of ``targets`` given ``input_ids``, both (batch, sequence)."""
        return token_loss_sum(self.base, input_ids, targets)

    def core_state(self) -> dict[str, Tensor]:
        """The cores by the names of their layers, and the bases that are the adaptor's own."""
        state: dict[str, Tensor] = {f"{layer}.core": core for layer, core in zip(self.layers, self.cores, strict=True)}
        for layer, (left, right) in self.bases.items():
            state |= {f"{layer}.left": left, f"{layer}.right": right}
        return state

    def load_core_state(self, state: dict[str, Tensor]) -> None:
        """Takes cores and bases as :meth:`core_state` gives them.

        Raises:
            ValueError: They are of other layers or shapes.
        """
        own = self.core_state()
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in state.items()}:
            raise ValueError("the cores are of other layers or another rank")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


class AdaptorRun(TrainingRun):
    """An adaptor in training: the base is loaded, frozen, and never saved again.

    Args:
        config: The run.
        data: The domain's text in the base's tokens.
        world: The processes that train together.
        begun: A checkpoint of the same run, whose bases are taken; None looks for them in the text.

    Raises:
        UsageError: An option is for the training of a whole model, or the base does not fit the text or the context.
        KalmaGroveError: The base cannot be read, or is not the one that the configuration names.
    """

    config: AdaptConfig
    data: PackedText
    adaptors: Adaptors

    def __init__(
        self, config: AdaptConfig, data: PackedText, world: World = ALONE, *, begun: Checkpoint | None = None
    ) -> None:
        self._begun = begun
        super().__init__(config, data, world)

    def _make_model(self) -> None:
        config, loop = self.config, self.config.loop
        for name in ("grow_rank", "activation_checkpointing", "gradient_metrics", "compile"):
            if getattr(loop, name):
                raise UsageError(f"loop.{name} is for the training of a whole model; leave it out")
        base = load_model(config.model.source)
        if model_fingerprint(base) != config.model.fingerprint:
            raise KalmaGroveError(f"{config.model.source} has changed since the adaptor's run began; begin a new one")
        self.model_config = base.config
        _check_fit(base.config, self.data, loop.context_length)
        self.adaptors = Adaptors(base.to(self.device))
        self._add_adaptor(config.adaptor)
        self.model = AdaptedModel(self.adaptors, config.adaptor.name).train()

    def _add_adaptor(self, options: AdaptorOptions) -> None:
        if options.bases == "weights":
            self.adaptors.add_adaptor(options.name, options.rank, core=options.core)
        elif self._begun is not None:
            # Looked for again on another machine, a layer might have other directions, and more or fewer of them.
            with naming_checkpoint(self._begun.path):
                self.adaptors.add_adaptor(
                    options.name, core=options.core, bases=_bases_in(self._begun.model, self.adaptors.layers)
                )
        else:
            self.adaptors.add_adaptor(options.name, core=options.core, bases=self._gradient_bases(0))

    def _gradient_bases(self, number: int) -> dict[str, Bases]:
        """The directions of a round, of which the first has the number 0."""
        options, model, loop = self.config.adaptor, self.adaptors.model, self.config.loop
        count = -(-options.gradient_tokens // loop.tokens_per_step)
        # The run's own batches, counted from its end, so that they are none of its first.
        first = loop.total_steps + number * count
        rows = loop.micro_batch_size or loop.batch_size
        batches = (batch for step in range(first, first + count) if isinstance(batch := self.batch(step), Tensor))
        parts = (part.to(self.device) for batch in batches for part in batch.split(rows))
        return text_bases(model, self.adaptors.layers, parts, partial(_loss_sum, model), options.rank)

    def _check_growth(self) -> None:
        """A base does not grow."""

    def _grow_where_planned(self) -> None:
        """A new round's directions; what was learned, and what the optimiser remembers of it, stays."""
        options, former = self.config.adaptor, self.optimizers
        rounds = options.number_of_rounds
        number = next((n for n in range(1, rounds) if self.step == n * self.total_steps // rounds), None)
        if number is None or self.step == 0:
            return
        self.adaptors.extend_adaptor(options.name, self._gradient_bases(number))
        self.model = AdaptedModel(self.adaptors, options.name).train()
        self._prepare_for_training()
        for old, new in zip(former, self.optimizers, strict=True):
            keep_state(old, new, extends=True)

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        optim, cores = self.config.optim, list(self._adapted.cores)
        betas = (optim.beta1, optim.beta2)
        optimizer: torch.optim.Optimizer
        if optim.name == "kalma":
            # No layer shows the inputs of a core, so that P is the identity; diagonal cores are vectors to it.
            decay, momentum = optim.weight_decay, optim.momentum
            optimizer = Kalma(cores, lr=self.peak_rate, weight_decay=decay, momentum=momentum, betas=betas)
        elif optim.name == "adamw":
            optimizer = torch.optim.AdamW(cores, lr=self.peak_rate, weight_decay=optim.weight_decay, betas=betas)
        else:
            raise UsageError(f"optim.name must be kalma or adamw for an adaptor, got {optim.name!r}")
        remember_peak_rates([optimizer])
        return [optimizer]

    @property
    def peak_rate(self) -> float:
        """The learning rate of the cores: as given, or the usual one between such bases."""
        optim = self.config.optim
        rate = DEFAULT_RATES[self.config.adaptor.bases] if optim.lr is None else optim.lr
        return rate * optim.lr_scale

    @property
    def _adapted(self) -> AdaptedModel:
        model: Any = self.model
        assert isinstance(model, AdaptedModel)
        return model

    def state(self) -> dict[str, Any]:
        """As a run's, with the cores in the place of the model."""
        return super().state() | {"model": self._adapted.core_state()}

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.progress["data_fingerprint"] != self.data.fingerprint:
            raise KalmaGroveError(
                f"{checkpoint.path} was trained on other data; give the same data, or start a new run folder"
            )
        self._adapted.load_core_state(checkpoint.model)
        self.optimizers[0].load_state_dict(checkpoint.optimizer["optimizers"][0])
        self.step = int(checkpoint.progress["step"])


class AdaptorSession(TrainingSession):
    """The training of an adaptor in its folder; what it exports is the adaptor."""

    run: AdaptorRun

    def _make_run(self, config: TrainConfig, data: TrainingData, folder: Path, world: World) -> AdaptorRun:
        assert isinstance(config, AdaptConfig) and isinstance(data, PackedText)
        return AdaptorRun(config, data, world, begun=latest_checkpoint(RunFolder(folder).checkpoints_path)[0])

    def export(self, scores: Mapping[str, Any] | None = None) -> Path:
        """Writes the adaptor."""
        run, config = self.run, self.run.config
        facts = {
            "base": config.model.source,
            "steps": run.step,
            "tokens": run.step * config.loop.tokens_per_step,
            "seed": config.loop.seed,
            "optimizer": config.optim.name,
            "lr": run.peak_rate,
            "gradient_tokens": config.adaptor.gradient_tokens if config.adaptor.bases == "gradient" else 0,
            "data": run.data.source,
            "data_fingerprint": run.data.fingerprint,
            "valid_loss": self.evaluations.get(run.step),
        }
        folder = self.folder.path / ADAPTOR_FOLDER
        save_adaptor(run.adaptors, config.adaptor.name, folder, facts=facts)
        return folder


def _bases_in(state: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Bases]:
    """The bases among what :meth:`AdaptedModel.core_state` gave, in the order of the layers."""
    return {layer: (state[f"{layer}.left"], state[f"{layer}.right"]) for layer in layers}


def _check_fit(base: Any, data: PackedText, context_length: int) -> None:
    """The base reads the text's tokens, and so many of them at a time."""
    limit = getattr(base, "max_position_embeddings", None)
    if isinstance(limit, int) and context_length > limit:
        raise UsageError(f"--loop.context_length {context_length} is longer than the base's context, {limit} tokens")
    if data.vocab_size > base.vocab_size:
        raise UsageError(
            f"the text has {data.vocab_size} different tokens and the base knows {base.vocab_size}; prepare the text "
            "with the base's tokeniser"
        )
