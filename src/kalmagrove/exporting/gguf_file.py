"""A stock Llama or GPT-2 as a GGUF file, which llama.cpp and what is built on it run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kalmagrove.data.tokenizer import end_of_text_id, load_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import read_json_object, whole_file

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}
TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS = {"gpt-2": [_BYTE_LEVEL], "smollm": [_DIGITS, _BYTE_LEVEL]}
"""How text is cut into words, by llama.cpp's names: as GPT-2 does, and that with each digit alone, as ours."""


def write_gguf(model: PreTrainedModel, tokenizer_folder: Path, path: Path, *, name: str) -> None:
    """Writes a model and its tokeniser in one file, in the number type that the model has.

    Args:
        model: A Llama or GPT-2 of transformers.
        tokenizer_folder: Holds its tokenizer.json, and perhaps a chat template.
        path: The file; what has the name is replaced once the new one is whole.
        name: Of the model, in the file.

    Raises:
        UsageError: llama.cpp has no such model or tokeniser.
        KalmaGroveError: The tokeniser does not belong to the model.
        OSError: The file cannot be written.
    """
    wrong = differences(model.config)
    if wrong:
        raise UsageError(f"this model cannot be written as gguf: {', '.join(wrong)}")
    tokenizer = _read_tokenizer(tokenizer_folder)
    kind, file_type = TYPES.get(model.dtype, TYPES[torch.float32])
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
        try:
            writer.add_name(name)
            writer.add_file_type(file_type)
            _add_sizes(writer, model.config)
            _add_tokenizer(writer, tokenizer, tokenizer_folder, model.config)
            _add_weights(writer, model, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def differences(config: Any) -> list[str]:
    """What a configuration of transformers has that llama.cpp's Llama and GPT-2 have not."""
    if config.model_type not in ARCHITECTURES:
        return [f"it is a {config.model_type}, and only Llama and GPT-2 are written"]
    plain: dict[str, Any] = {"activation_function": "gelu_new", "scale_attn_weights": True}
    plain |= {"scale_attn_by_inverse_layer_idx": False}
    if config.model_type == "llama":
        plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    found = [
        f"it has {name} = {getattr(config, name)}" for name, value in plain.items() if getattr(config, name) != value
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        found.append(f"it has {rope['rope_type']} rotary positions")
    return found


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)


def _add_weights(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    # A tied head is the embedding, and named once.
    for theirs, parameter in model.named_parameters():
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise KalmaGroveError(f"the model's weight {theirs} has no place in a {config.model_type} of llama.cpp")
        weight = _in_order_of_llama_cpp(theirs, parameter.detach().cpu().float(), config)
        # Vectors, and positions that are added to vectors, stay exact.
        if kind == gguf.GGMLQuantizationType.F32 or weight.ndim == 1 or ours.startswith("position_embd"):
            writer.add_tensor(ours, weight.contiguous().numpy())
        else:
            writer.add_tensor(ours, gguf.quantize(weight.contiguous().numpy(), kind), raw_dtype=kind)


def _in_order_of_llama_cpp(name: str, weight: Tensor, config: Any) -> Tensor:
    """GPT-2's matrices are stored transposed; a Llama's rotary pairs stand side by side, not half a head apart."""
    if config.model_type == "gpt2":
        return weight.T if weight.ndim == 2 and ".h." in name else weight
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    """The content of tokenizer.json, of a kind that llama.cpp knows, with its name for it as "pre".

    Raises:
        UsageError: It is of another kind.
        KalmaGroveError: It cannot be read.
    """
    load_tokenizer(str(folder))
    found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, words, after = (found.get(name) or {} for name in ("model", "pre_tokenizer", "post_processor"))
    steps = words.get("pretokenizers", []) if words.get("type") == "Sequence" else [words]
    pre = [name for name, plain in _PRE_TOKENIZERS.items() if _are_like(steps, plain)]
    plain_model = {"byte_fallback": (False,), "ignore_merges": (False,), "continuing_subword_prefix": (None, "")}
    plain_model |= {"end_of_word_suffix": (None, ""), "unk_token": (None,)}
    wrong = []
    if model.get("type") != "BPE" or any(model.get(key, plain[0]) not in plain for key, plain in plain_model.items()):
        wrong.append("its tokens are not those of a plain byte-level BPE")
    if not pre:
        wrong.append("it cuts text into words in another way than GPT-2's and ours")
    if found.get("normalizer") is not None:
        wrong.append("it changes the text before it is cut")
    if after.get("special_tokens"):
        wrong.append("it adds tokens to each text")
    if wrong:
        raise UsageError(f"the tokeniser of {folder} cannot be written as gguf: {', '.join(wrong)}")
    return found | {"pre": pre[0]}


def _are_like(steps: list[Any], plain: list[dict[str, Any]]) -> bool:
    return len(steps) == len(plain) and all(
        all(step.get(name) == value for name, value in wanted.items())
        for step, wanted in zip(steps, plain, strict=True)
    )


def _add_tokenizer(writer: gguf.GGUFWriter, found: dict[str, Any], folder: Path, config: Any) -> None:
    added = {token["id"]: token for token in found.get("added_tokens", [])}
    ids = {place: text for text, place in found["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if max(ids) >= config.vocab_size:
        raise KalmaGroveError(f"the tokeniser of {folder} has tokens that its model does not know")
    kinds = [_kind_of(added[i]) if i in added else gguf.TokenType.NORMAL for i in range(config.vocab_size)]
    # The model may have rows for tokens that no text has.
    for place in set(range(config.vocab_size)) - set(ids):
        ids[place], kinds[place] = f"[PAD{place}]", gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list([ids[place] for place in range(config.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]])
    end = end_of_text_id(load_tokenizer(str(folder)))
    for add, own in ((writer.add_bos_token_id, config.bos_token_id), (writer.add_eos_token_id, config.eos_token_id)):
        add(own if isinstance(own, int) else end)
    writer.add_add_bos_token(False)
    template = _chat_template(folder)
    if template is not None:
        writer.add_chat_template(template)


def _chat_template(folder: Path) -> str | None:
    """Of a file of its own, or as older folders have it among the tokeniser's options; None where there is none."""
    own, options = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    found = read_json_object(options, "put back the model's own").get("chat_template") if options.is_file() else None
    return found if isinstance(found, str) else None


def _kind_of(token: dict[str, Any]) -> gguf.TokenType:
    return gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
