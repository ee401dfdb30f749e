"""To and from stock GPT-2 and Llama folders; exact, because the options match one to one."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from kalmagrove.auto_classes import register_when_imported
from kalmagrove.errors import KalmaGroveError, first_line
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.merging import merge
from kalmagrove.tensor_files import disk_errors

Stock = Literal["gpt2", "llama"]

_MOST_PACKED = 64

_PLAIN = {
    "attention": "full",
    "projections": "dense",
    "qk_norm": False,
    "short_conv": 0,
    "value_residual": False,
    "embedding_residual": False,
    "embedding_rank": None,
    "document_mask": False,
    "modalities": {},
}
_FAMILY: dict[Stock, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "feed_forward": "gelu", "positions": "learned", "bias": True},
    "llama": {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rotary", "bias": False},
}


def obstacles(config: KalmaGroveConfig, family: Stock) -> list[str]:
    """The options in which a configuration differs from a stock architecture."""
    return [name for name, value in (_PLAIN | _FAMILY[family]).items() if getattr(config, name) != value]


def stock_family(config: KalmaGroveConfig) -> Stock | None:
    """The stock architecture that a configuration is, or None."""
    for family in _FAMILY:
        if not obstacles(config, family):
            square = config.attention_width == config.hidden_size
            if family == "llama" or (square and config.tie_word_embeddings):
                return family
    return None


def to_stock(model: KalmaGroveForCausalLM) -> PreTrainedModel:
    """The same function as a stock model of transformers; Grove's projections are merged.

    Raises:
        ValueError: The configuration is neither GPT-2's nor Llama's.
    """
    if model.config.projections == "grove":
        model = merge(model)
    family = stock_family(model.config)
    if family is None:
        found = ", ".join(obstacles(model.config, "llama"))
        raise ValueError(f"this model is no Llama, and cannot be written as one: it differs in {found}")
    config, weights = model.config, dict(model.state_dict())
    with torch.random.fork_rng():
        stock: PreTrainedModel = (
            GPT2LMHeadModel(_gpt2_config(config)) if family == "gpt2" else LlamaForCausalLM(_llama_config(config))
        )
    renamed = _to_gpt2_names(config, weights) if family == "gpt2" else weights
    if config.tie_word_embeddings:
        renamed["lm_head.weight"] = weights["model.embed_tokens.weight"]
    stock.load_state_dict(renamed, strict=True)
    stock.generation_config = copy.deepcopy(model.generation_config)
    reference = next(model.parameters())
    return stock.to(device=reference.device, dtype=reference.dtype).train(model.training)


def from_stock(stock: PreTrainedModel) -> KalmaGroveForCausalLM:
    """A stock GPT-2 or Llama model as our decoder, dense and with full attention.

    Raises:
        KalmaGroveError: Another architecture, or an option of it that our decoder does not have.
    """
    config, weights = _config_from_stock(stock.config), dict(stock.state_dict())
    if stock.config.model_type == "gpt2":
        weights = _from_gpt2_names(config, weights)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    with torch.random.fork_rng():
        model = KalmaGroveForCausalLM(config)
    model.load_state_dict(weights, strict=True)
    model.generation_config = copy.deepcopy(stock.generation_config)
    reference = next(stock.parameters())
    return model.to(device=reference.device, dtype=reference.dtype).train(stock.training)


def save_model(model: KalmaGroveForCausalLM, folder: Path) -> None:
    """Writes a Hugging Face folder: a stock one where the configuration is GPT-2's or Llama's.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    with _quiet_transformers():
        target: PreTrainedModel = model if stock_family(model.config) is None else to_stock(model)
    write_folder(target, folder)


def write_folder(model: PreTrainedModel, folder: Path) -> None:
    """Writes the Hugging Face folder of a model of any architecture as it is.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    with _quiet_transformers(), disk_errors(folder):
        model.save_pretrained(folder)


def load_model(folder: str | Path) -> PreTrainedModel:
    """Opens any causal language model folder (ours, stock, or a Hub name); no code from it is executed.

    Raises:
        KalmaGroveError: It is not a model folder or cannot be read.
    """
    folder = model_folder(folder)
    register_when_imported()
    with _quiet_transformers():
        try:
            _check_sizes(Path(folder))
            model, found = AutoModelForCausalLM.from_pretrained(
                str(folder), trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:
            raise KalmaGroveError(f"cannot load a model from {folder}: {first_line(error)}") from error
    # What is missing would be random numbers, new ones each time.
    missing = sorted(found["missing_keys"])
    if missing:
        raise KalmaGroveError(
            f"cannot load a model from {folder}: its weights have no {missing[0]}; give a whole folder"
        )
    loaded: PreTrainedModel = model
    return loaded.eval()


_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def context_of(config: Any) -> int:
    """The most tokens that a model of any architecture sees.

    Raises:
        KalmaGroveError: Its configuration does not say.
    """
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise KalmaGroveError(
        f"the configuration of this {getattr(config, 'model_type', 'model')} does not say how long its context is; "
        "write max_position_embeddings into its config.json"
    )


def _check_sizes(folder: Path) -> None:
    """A model as large as its configuration says is only made where the weights are about as large.

    Raises:
        KalmaGroveError: A size is far from what the weights have.
    """
    shapes = [shape for file in folder.glob("*.safetensors") for shape in _shapes(file)]
    if not shapes:
        return
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    # Packed formats hold several numbers in one.
    longest = _MOST_PACKED * max((side for shape in shapes for side in shape), default=1)
    limits = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rank"), longest)
    for name, limit in (limits | {"num_hidden_layers": len(shapes), "num_attention_heads": longest}).items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > limit:
            raise KalmaGroveError(f"config.json says {name} {value}, which its weights are too few for")


def _shapes(file: Path) -> list[list[int]]:
    with safe_open(file, framework="pt") as weights:
        return [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - it is no dictionary


def model_folder(folder: str | Path) -> str:
    """The Hugging Face folder that a run folder holds, or the folder (or Hub name) itself.

    Raises:
        KalmaGroveError: It exists and holds no model, or is neither a folder nor a Hub name.
    """
    path = Path(folder)
    if path.exists() and not (path / "config.json").is_file():
        if not (path / "model" / "config.json").is_file():
            raise KalmaGroveError(f"{folder} holds no config.json; give a model folder or a run folder that is done")
        return str(path / "model")
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)):
        raise KalmaGroveError(f"{folder} does not exist; give a model folder, a run folder or a Hub name (owner/name)")
    return str(folder)


def load_config(folder: str | Path) -> KalmaGroveConfig:
    """The configuration of a folder of ours, or of a stock GPT-2 or Llama one.

    Raises:
        KalmaGroveError: It cannot be read or converted.
    """
    config = any_config(folder)
    return config if isinstance(config, KalmaGroveConfig) else _config_from_stock(config)


def any_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of a model folder of any architecture.

    Raises:
        KalmaGroveError: It cannot be read.
    """
    register_when_imported()
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model_folder(folder), trust_remote_code=False)
    except KalmaGroveError:
        raise
    # What is wrong with the file reaches the library's own code, which has no common error for it.
    except Exception as error:
        raise KalmaGroveError(f"cannot read a model configuration from {folder}: {first_line(error)}") from error
    return config


def as_decoder(model: PreTrainedModel) -> KalmaGroveForCausalLM:
    """Our decoder as it is, also within a compressed model; a stock model converted.

    Raises:
        KalmaGroveError: It is neither, or a stock model whose matrices are factors.
    """
    is_compressed = model.config.model_type == "kalmagrove_compressed"
    inner = model.decoder if is_compressed else model
    if isinstance(inner, KalmaGroveForCausalLM):
        return inner
    if is_compressed:
        raise KalmaGroveError(f"a compressed {inner.config.model_type} stays one; export it to convert it")
    return from_stock(inner)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides the progress bars of transformers while a folder is written or read."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _special_tokens(config: KalmaGroveConfig) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _llama_config(config: KalmaGroveConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        **_special_tokens(config),
    )


def _config_from_stock(source: Any) -> KalmaGroveConfig:
    if source.model_type == "llama":
        return _from_llama(source)
    if source.model_type == "gpt2":
        return _from_gpt2(source)
    raise KalmaGroveError(f"model type {source.model_type!r} cannot be converted; gpt2 and llama can")


def _from_llama(source: Any) -> KalmaGroveConfig:
    rope = source.rope_parameters or {}
    for name, plain in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("num_key_value_heads", source.num_attention_heads),
    ):
        if getattr(source, name) != plain:
            raise KalmaGroveError(f"this Llama has {name} = {getattr(source, name)}; only {plain} can be converted")
    if rope.get("rope_type", "default") != "default":
        raise KalmaGroveError(f"this Llama has {rope['rope_type']} rotary positions; only default can be converted")
    return KalmaGroveConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        head_dim=source.head_dim,
        max_position_embeddings=source.max_position_embeddings,
        norm_eps=source.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        tie_word_embeddings=source.tie_word_embeddings,
        **_special_tokens(source),
        **_FAMILY["llama"],
    )


def _gpt2_config(config: KalmaGroveConfig) -> GPT2Config:
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        layer_norm_epsilon=config.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=config.initializer_range,
        **_special_tokens(config),
    )


def _from_gpt2(source: Any) -> KalmaGroveConfig:
    for name, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if getattr(source, name) is not plain:
            raise KalmaGroveError(f"this GPT-2 has {name} = {getattr(source, name)}; only {plain} can be converted")
    if source.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise KalmaGroveError(f"this GPT-2 has activation {source.activation_function}; only gelu_new can be converted")
    return KalmaGroveConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.n_embd,
        intermediate_size=source.n_inner or 4 * source.n_embd,
        num_hidden_layers=source.n_layer,
        num_attention_heads=source.n_head,
        max_position_embeddings=source.n_positions,
        norm_eps=source.layer_norm_epsilon,
        tie_word_embeddings=source.tie_word_embeddings,
        **_special_tokens(source),
        **_FAMILY["gpt2"],
    )


_GPT2_TOP = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
}
_GPT2_NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
_GPT2_MATRICES = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _to_gpt2_names(config: KalmaGroveConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 stores matrices transposed, and query, key and value as one."""
    renamed = {theirs: weights[ours] for ours, theirs in _GPT2_TOP.items()}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            for source, target in _GPT2_NORMS.items():
                renamed[f"{theirs}{target}.{kind}"] = weights[f"{ours}{source}.{kind}"]
            for source, target in _GPT2_MATRICES.items():
                renamed[f"{theirs}{target}.{kind}"] = _transposed(weights[f"{ours}{source}.{kind}"])
            renamed[f"{theirs}attn.c_attn.{kind}"] = _transposed(
                torch.cat([weights[f"{ours}{n}.{kind}"] for n in _QKV])
            )
    return renamed


def _transposed(tensor: Tensor) -> Tensor:
    """A matrix transposed, a bias as it is."""
    return tensor.T if tensor.ndim == 2 else tensor


def _from_gpt2_names(config: KalmaGroveConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {ours: weights[theirs] for ours, theirs in _GPT2_TOP.items()}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            for target, source in _GPT2_NORMS.items():
                renamed[f"{ours}{target}.{kind}"] = weights[f"{theirs}{source}.{kind}"]
            for target, source in _GPT2_MATRICES.items():
                renamed[f"{ours}{target}.{kind}"] = _transposed(weights[f"{theirs}{source}.{kind}"])
            fused = _transposed(weights[f"{theirs}attn.c_attn.{kind}"])
            for name, part in zip(_QKV, fused.chunk(3), strict=True):
                renamed[f"{ours}{name}.{kind}"] = part
    if not config.tie_word_embeddings:
        renamed["lm_head.weight"] = weights["lm_head.weight"]
    return renamed
