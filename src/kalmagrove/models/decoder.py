"""KalmaGroveForCausalLM: one decoder for every family, the whole forward from top to bottom.

tokens -> embedding -> [norm -> attention -> + ; norm -> feed-forward -> +] x layers -> norm -> logits
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from kalmagrove.modalities.modality import Modality
from kalmagrove.modalities.patch import PatchModality
from kalmagrove.modalities.registry import make_modality
from kalmagrove.modalities.sequences import Sequences
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.projections import WRITES, GroveBases, projection_factory
from kalmagrove.nn.arnold import MultiResolutionAttention
from kalmagrove.nn.decoding import DecodingCache, Placement, document_starts, placement
from kalmagrove.nn.elementwise import weighted_sum
from kalmagrove.nn.grove import Basis, GroveLinear, composed_weights
from kalmagrove.nn.layers import FeedForward, RMSNorm, ShortConvolution, make_norm
from kalmagrove.nn.loss import linear_cross_entropy
from kalmagrove.nn.pooling import BlockPooling
from kalmagrove.precision import without_autocast

# transformers renamed its cache argument; generate() reorders beams under the name that it knows.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual connection."""

    # Under the names that transformers' own switch for this looks for and sets.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., tuple[Tensor, Tensor]] = staticmethod(
        partial(checkpoint, use_reentrant=False)
    )

    def __init__(self, config: KalmaGroveConfig, layer: int, bases: GroveBases | None) -> None:
        super().__init__()
        make_projection = projection_factory(config, bases, layer)
        self.input_layernorm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.self_attn = MultiResolutionAttention(
            config.hidden_size,
            config.head_groups(),
            make_projection,
            rotary_theta=config.rope_theta if config.positions == "rotary" else None,
            qk_norm=config.qk_norm,
            short_conv=config.short_conv,
            value_residual=config.value_residual and layer > 0,
        )
        self.post_attention_layernorm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.feed_forward, make_projection)
        self.embedding_residual = config.embedding_residual and layer > 0
        if self.embedding_residual:
            self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.1]))

    def forward(
        self,
        x: Tensor,
        embedded: Tensor,
        first_values: Tensor | None,
        where: Placement,
        state: dict[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """One layer over ``x`` (batch, sequence, hidden); returns the new ``x`` and this layer's values."""
        if self.gradient_checkpointing and self.training:
            # Inside this forward, so that hooks of the layer, as those of a sharded model, run once.
            return self._gradient_checkpointing_func(self._forward, x, embedded, first_values, where, state)
        return self._forward(x, embedded, first_values, where, state)

    def _forward(
        self,
        x: Tensor,
        embedded: Tensor,
        first_values: Tensor | None,
        where: Placement,
        state: dict[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        if self.embedding_residual:
            x = weighted_sum(x, embedded, self.residual_mix)
        attended, values = self.self_attn(self.input_layernorm(x), first_values, where, state)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), values


class KalmaGrovePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of these models."""

    config_class = KalmaGroveConfig
    base_model_prefix = "model"
    # The loss is a mean over the batch that is given: Trainer divides by accumulation steps itself.
    accepts_loss_kwargs = False
    _no_split_modules = ("DecoderLayer",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Basis):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GroveLinear | ShortConvolution | BlockPooling | PatchModality):
            module.reset_parameters()
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, MultiResolutionAttention):
            if module.qk_norm:
                nn.init.ones_(module.query_gain)
            if module.value_residual:
                nn.init.constant_(module.value_mix, 0.5)
        elif isinstance(module, DecoderLayer) and module.embedding_residual:
            module.residual_mix.copy_(torch.tensor([1.0, 0.1]))


class KalmaGroveModel(KalmaGrovePreTrainedModel):
    """The decoder without its output head."""

    def __init__(self, config: KalmaGroveConfig) -> None:
        super().__init__(config)
        rank = config.embedding_rank
        self.embed_tokens = nn.Embedding(config.vocab_size, rank or config.hidden_size)
        if rank is not None:
            self.embed_proj = nn.Linear(rank, config.hidden_size, bias=False)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.modalities = nn.ModuleDict(
            {name: make_modality(name, config.hidden_size, options) for name, options in config.modalities.items()}
        )
        self.bases = GroveBases(config) if config.projections == "grove" else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, self.bases) for layer in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: DecodingCache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        features: dict[str, Tensor] | None = None,
        axes: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Hidden states (batch, sequence, hidden) of ``input_ids`` (batch, sequence).

        With ``output_hidden_states`` also the embedding's and each layer's output, the last one normed. ``features``
        and ``axes`` are those of :class:`~kalmagrove.modalities.sequences.Sequences`.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_rank is not None:
            # The residual stream is as precise as without a factor, under autocast too.
            x = self.embed_proj(x).to(x.dtype)
        x = self._with_elements(x, input_ids, features)
        where = self._placement(x, input_ids, cache, axes)
        if self.config.positions == "learned":
            x = x + self.embed_positions(where.positions.clamp(min=0))
        embedded, first_values = x, None
        states = [x] if output_hidden_states else []
        for index, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[index]
            x, values = layer(x, embedded, first_values, where, state)
            first_values = values if first_values is None else first_values
            if output_hidden_states:
                states.append(x)
        if cache is not None:
            cache.length += x.shape[1]
        normed = self.norm(x)
        hidden_states = (*states[:-1], normed) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=normed, hidden_states=hidden_states)

    def _with_elements(self, x: Tensor, input_ids: Tensor | None, features: dict[str, Tensor] | None) -> Tensor:
        """``x`` (batch, sequence, hidden) with each modality's elements in the place of their placeholders."""
        for name, modality in self.modalities.items():
            assert isinstance(modality, Modality)
            if features is None or name not in features or input_ids is None:
                continue
            chosen = input_ids == modality.placeholder
            # Kalma's statistics of no element would have no meaning.
            if bool(chosen.any()):
                x = x.index_put((chosen,), modality.encode(features[name][chosen]).to(x.dtype))
        return x

    def _placement(
        self, x: Tensor, input_ids: Tensor | None, cache: DecodingCache | None, axes: Tensor | None
    ) -> Placement:
        """Where the tokens of ``x`` (batch, sequence, hidden) stand, in their texts and in their documents."""
        config, length = self.config, x.shape[1]
        seen, padding = (0, None) if cache is None else (cache.length, cache.padding)
        if seen + length > config.max_position_embeddings:
            raise ValueError(
                f"the text is {seen + length} tokens long, the model's context is {config.max_position_embeddings}; "
                "shorten it or build the model with a larger max_position_embeddings"
            )
        if axes is None and cache is not None:
            axes = cache.following_axes(length)
        if axes is not None:
            if padding is not None:
                raise ValueError("axes are for texts that begin together; leave out padding before them")
            axes = axes if cache is None else cache.add_axes(axes)
        where = placement(length, x.device, seen=seen, padding=padding, axes=axes)
        if not config.document_mask:
            return where
        end = getattr(config, "eos_token_id", None)
        if end is None or input_ids is None:
            raise ValueError("document_mask needs eos_token_id in the configuration, and input_ids to look for it")
        before = None if cache is None else cache.document_start
        is_end = torch.isin(input_ids, torch.tensor(end, device=input_ids.device))
        starts, following = document_starts(is_end, where.positions, before)
        if cache is not None:
            cache.document_start = following
        return placement(length, x.device, seen=seen, padding=padding, document_starts=starts, axes=axes)


class KalmaGroveForCausalLM(KalmaGrovePreTrainedModel, GenerationMixin):
    """The decoder with its output head: a causal language model in the style of transformers."""

    def __init__(self, config: KalmaGroveConfig) -> None:
        super().__init__(config)
        self.model = KalmaGroveModel(config)
        # With tied embeddings the head is the embedding itself, not a second name for it.
        rank = config.embedding_rank
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(rank or config.hidden_size, config.vocab_size, bias=False)
        )
        if rank is not None:
            self.lm_head_proj = nn.Linear(config.hidden_size, rank, bias=False)
        self.post_init()
        self._scale_outputs()
        self._scale_embedding_factors()
        for name in config.adaptors:
            self._add_adaptor(name)

    @torch.no_grad()
    def _scale_outputs(self) -> None:
        """Divides what writes to the residual stream by sqrt(2 layers), as GPT-2 does."""
        scale = (2 * self.config.num_hidden_layers) ** -0.5
        for parameter in write_parameters(self):
            parameter.mul_(scale)

    @torch.no_grad()
    def _scale_embedding_factors(self) -> None:
        """The product with the table gets the entries' size that one full table has."""
        rank = self.config.embedding_rank
        if rank is not None:
            for factor in (self.model.embed_proj, self.lm_head_proj):
                factor.weight.mul_(rank**-0.5 / self.config.initializer_range)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def before_head(self, hidden: Tensor) -> Tensor:
        """What the output weight multiplies: the hidden states, or with a factorised embedding their projection."""
        return hidden if self.config.embedding_rank is None else self.lm_head_proj(hidden)

    def output_weight(self) -> Tensor:
        """The matrix that makes logits, (vocabulary, hidden or embedding_rank)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def precise_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., hidden), in the weights' precision whatever autocast says.

        In bfloat16 likely tokens would all be equally likely.
        """
        with without_autocast(hidden):
            weight = self.output_weight()
            return F.linear(self.before_head(hidden.to(weight.dtype)), weight).float()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DecodingCache | None = None,
        past_key_values: DecodingCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        features: dict[str, Tensor] | None = None,
        axes: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits (batch, sequence, vocabulary), and the mean loss in nats where ``labels`` are given.

        Args:
            input_ids: (batch, sequence).
            attention_mask: (batch, sequence), 0 for padding before or after a row's text. What is computed at padding
                has no meaning. With a cache, padding before the texts, given with the first tokens.
            cache: What was seen before, from :meth:`new_cache`; it is brought up to date.
            past_key_values: The older name of ``cache``.
            inputs_embeds: What the embedding table would give for ``input_ids``, (batch, sequence, hidden), or with a
                factorised embedding (batch, sequence, embedding_rank).
            labels: (batch, sequence) as in transformers: the loss compares position t with label t + 1; -100 is
                left out.
            logits_to_keep: Only the last so many positions get logits; 0, and with ``labels``, is all.
            output_hidden_states: Whether to give the hidden states of every layer too.
            return_dict: False gives a tuple in the place of named outputs.
            features: For each modality (batch, sequence, size), what its placeholders stand for.
            axes: Row and column of each token, (batch, sequence, 2); None is one line.
            position_ids: (batch, sequence), as frameworks count them; nothing else is possible here.

        Raises:
            ValueError: The mask has holes, positions are not counted one by one from a row's first token, the cache
                is another model's, or the text is longer than the context.
        """
        cache = cache if cache is not None else past_key_values
        given = inputs_embeds if input_ids is None else input_ids
        if cache is not None and not isinstance(cache, DecodingCache):
            raise ValueError(f"a cache of this model is made by its new_cache(); got a {type(cache).__name__}")
        if position_ids is not None and given is not None:
            _require_usual_positions(position_ids, attention_mask, cache)
        padding = None
        if attention_mask is not None or cache is not None:
            padding = _new_padding(attention_mask, given, cache)
        if padding is not None and (features or axes is not None) and bool(padding.any()):
            raise ValueError("features and axes are for texts without padding before them; put it behind the texts")
        if cache is None and padding is not None:
            # Without a cache the texts are moved to the front: what follows them cannot be seen.
            input_ids, inputs_embeds = (None if t is None else _moved(t, padding) for t in (input_ids, inputs_embeds))
        outputs = self.model(
            input_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            features=features,
            axes=axes,
        )
        if cache is None and padding is not None:
            outputs = _moved_back(outputs, padding)
        hidden = outputs.last_hidden_state
        kept = hidden if labels is not None else hidden[:, -logits_to_keep:]
        logits = F.linear(self.before_head(kept), self.output_weight())
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        result = CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        # Frameworks that wrap a model say None where their user said nothing.
        return result.to_tuple() if return_dict is False else result

    def token_loss_sum(self, input_ids: Tensor | Sequences, targets: Tensor | Sequences) -> Tensor:
        """Sum of the nats of ``targets`` (batch, sequence) given ``input_ids`` (batch, sequence).

        The logits are made and reduced in slices, so that they never lie in memory as a whole.
        """
        if isinstance(input_ids, Sequences):
            assert isinstance(targets, Sequences)
            return torch.stack([nats.sum() for nats in self.nats_by_kind(input_ids, targets).values()]).sum()
        assert isinstance(targets, Tensor)
        hidden = self.model(input_ids).last_hidden_state
        return linear_cross_entropy(self.before_head(hidden).flatten(0, 1), self.output_weight(), targets.flatten())

    def nats_by_kind(self, inputs: Sequences, targets: Sequences) -> dict[str, Tensor]:
        """What the weighted tokens of ``targets`` cost: the sum for ``token``, each element for each modality.

        An element costs its placeholder, which is a token, and what the modality's head says about its features.

        Args:
            inputs: (batch, sequence).
            targets: What follows each of them, (batch, sequence).
        """
        hidden = self.model(inputs.tokens, features=inputs.features, axes=inputs.axes).last_hidden_state
        counted = targets.weights > 0
        hidden, tokens = hidden[counted], targets.tokens[counted]
        nats = {"token": linear_cross_entropy(self.before_head(hidden), self.output_weight(), tokens)}
        for name, modality in self.model.modalities.items():
            assert isinstance(modality, Modality)
            chosen = tokens == modality.placeholder
            if name in targets.features and bool(chosen.any()):
                nats[name] = modality.nats(hidden[chosen], targets.features[name][counted][chosen])
        return nats

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with Grove's weights made once.

        Raises:
            ValueError: Tokens are to be guessed and taken back, which this model's cache cannot do.
        """
        own = kwargs.get("generation_config") or self.generation_config
        asked = {name: kwargs.get(name, getattr(own, name, None)) for name in (*_GUESSING, "guidance_scale")}
        guess = next((name for name in _GUESSING if asked[name]), None)
        if guess is not None:
            raise ValueError(f"{guess} is not possible with this model: its cache cannot take tokens back")
        if asked["guidance_scale"] not in (None, 1, 1.0):
            # The second text of guidance would be read by its last token alone.
            kwargs["use_cache"] = False
        with composed_weights(self):
            return super().generate(*args, **kwargs)

    def new_cache(self) -> DecodingCache:
        """An empty cache for decoding."""
        return DecodingCache(self.config.num_hidden_layers)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        cache = kwargs.get(CACHE_NAME)
        seen = 0 if cache is None else cache.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "cache": cache,
            "attention_mask": kwargs.get("attention_mask"),
            "logits_to_keep": 1,
            **({name: kwargs.get(name) for name in ("features", "axes")} if seen == 0 else {}),
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = self.new_cache()

    def make_activations_again(self) -> None:
        """From now on every layer's activations are computed again in the backward: less memory for more time."""
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.gradient_checkpointing = True

    def add_adaptor(self, name: str) -> None:
        """Adds a task core of a name to every Grove layer; it is saved and loaded with the model."""
        self._add_adaptor(name)
        self.config.adaptors = [*self.config.adaptors, name]

    def _add_adaptor(self, name: str) -> None:
        for layer in self._grove_layers():
            layer.add_adaptor(name)

    def set_adaptor(self, name: str | None) -> None:
        """Switches every Grove layer to a task core; None is the base model."""
        for layer in self._grove_layers():
            layer.set_adaptor(name)

    def _grove_layers(self) -> list[GroveLinear]:
        layers = [module for module in self.modules() if isinstance(module, GroveLinear)]
        if not layers:
            raise ValueError("adaptors need projections = grove; this model's projections are dense")
        return layers


_GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
"""What generate knows and a cache that forgets cannot do."""


@torch.compiler.disable
def _require_usual_positions(position_ids: Tensor, attention_mask: Tensor | None, cache: DecodingCache | None) -> None:
    """Refuses positions that begin anew in a row: the texts behind them would see those before.

    Raises:
        ValueError: They are not counted one by one from the row's first token.
    """
    steps = position_ids.diff(dim=-1)
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        steps = steps[(attention_mask[..., 1:] * attention_mask[..., :-1]).bool().expand_as(steps)]
        first = position_ids[attention_mask.bool() & (attention_mask.cumsum(-1) == 1)]
    else:
        first = position_ids[..., 0]
    begins = (cache is not None and cache.length > 0) or not bool(first.any())
    if not begins or not bool((steps == 1).all()):
        raise ValueError(
            "position_ids must count each row's tokens one by one from 0; several texts in a row need the "
            "configuration's document_mask and an end-of-text token between them"
        )


# A compiler cannot look into a mask: it stops here, and goes on behind it.
@torch.compiler.disable
def _new_padding(attention_mask: Tensor | None, tokens: Tensor | None, cache: DecodingCache | None) -> Tensor | None:
    """Padding before the texts that begin in this forward, (batch,), which a cache remembers; None is none."""
    if cache is not None and cache.length > 0:
        return None
    padding = None
    if attention_mask is not None and not bool(attention_mask.all()):
        shape = attention_mask.shape
        if tokens is None or shape != tokens.shape[:2]:
            raise ValueError(f"attention_mask must be (batch, sequence), as the tokens; got {tuple(shape)}")
        padding = padding_before(attention_mask, with_cache=cache is not None)
    if cache is not None:
        cache.padding = padding
    return padding


def padding_before(attention_mask: Tensor, *, with_cache: bool) -> Tensor:
    """Padding tokens before each row's text, (batch,).

    Args:
        attention_mask: (batch, sequence), not all ones.
        with_cache: Whether more tokens will follow, so that there must be no padding behind a text.

    Raises:
        ValueError: A row has no token, a hole, or padding on the wrong side.
    """
    mask = attention_mask.bool()
    length = mask.shape[1]
    first, count = mask.int().argmax(dim=1), mask.sum(dim=1)
    last = length - mask.flip(1).int().argmax(dim=1)
    if not bool(count.all()) or not bool((last - first == count).all()):
        raise ValueError("attention_mask must be one run of ones in each row: padding before or after the text only")
    if with_cache and not bool((last == length).all()):
        raise ValueError("with a cache, padding must come before the texts: set padding_side = 'left'")
    return first


def _moved(tensor: Tensor, padding: Tensor) -> Tensor:
    """Rows turned by their padding, so that their texts begin at 0; what came before follows behind."""
    places = (torch.arange(tensor.shape[1], device=tensor.device) + padding[:, None]) % tensor.shape[1]
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], places]


def _moved_back(outputs: BaseModelOutput, padding: Tensor) -> BaseModelOutput:
    states = outputs.hidden_states
    return BaseModelOutput(
        last_hidden_state=_moved(outputs.last_hidden_state, -padding),
        hidden_states=None if states is None else tuple(_moved(state, -padding) for state in states),
    )


def write_parameters(model: KalmaGroveForCausalLM) -> list[nn.Parameter]:
    """The parameters whose scale is that of a layer's output: one factor of each o_proj and down_proj."""
    found: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] not in WRITES:
            continue
        if isinstance(module, nn.Linear):
            found.update((id(p), p) for p in module.parameters() if p.ndim == 2)
        elif isinstance(module, GroveLinear):
            found.update((id(parameter), parameter) for parameter in module.output_parameters())
    return list(found.values())
