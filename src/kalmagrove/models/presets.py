"""Named families and sizes; a preset is a complete configuration, and every option may be overridden.

Families:
    gpt2: LayerNorm, GELU, learned positions; what the paper calls a Transformer.
    llama: RMSNorm, rotary positions, SwiGLU; what one would choose today.
    llama-plus: llama with the cheap tricks that kalmagrove uses (short convolution, value residual, embedding
        residual, QK-norm).
    slim: dense, full attention, the same tricks, half the attention width and a squared-ReLU feed-forward, sized to
        kalmagrove's number of parameters: the control for Grove and Arnold.
    kalmagrove: Arnold attention whose projections are Grove's, each basis used by two layers; a dense feed-forward as
        slim's, and the full width.

A part may be put into another family alone: llama+grove, gpt2-small+arnold, llama+grove+arnold.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from kalmagrove.errors import UsageError

FAMILIES = ("gpt2", "llama", "llama-plus", "slim", "kalmagrove")
PARTS = ("grove", "arnold")
DEFAULT_SIZE = "mini"


@dataclass(frozen=True)
class Size:
    """A family-independent size.

    Attributes:
        hidden_size: Width of the dense families and of kalmagrove.
        num_hidden_layers: Layers.
        head_dim: Size of a full head.
        slim_width: Width at which the slim control has as many parameters as kalmagrove.
        vocab_size: Vocabulary when no data set says otherwise.
        context_length: Context when nothing else says otherwise, in tokens.
    """

    hidden_size: int
    num_hidden_layers: int
    head_dim: int
    slim_width: int
    vocab_size: int = 4096
    context_length: int = 512


SIZES = {
    "pico": Size(64, 4, 16, slim_width=60, vocab_size=512, context_length=256),
    "nano": Size(96, 4, 16, slim_width=90, vocab_size=1024, context_length=256),
    "tiny": Size(128, 4, 32, slim_width=120),
    "mini": Size(128, 6, 32, slim_width=120),
    "small": Size(256, 8, 64, slim_width=236),
    "medium": Size(512, 8, 64, slim_width=472),
    "base": Size(768, 12, 64, slim_width=724, vocab_size=50257, context_length=1024),
    "large": Size(1024, 24, 64, slim_width=952, vocab_size=50257, context_length=1024),
}
GROVE: dict[str, Any] = {"projections": "grove", "grove_parts": "attention", "sharing": "cycle", "group_size": 2}
TRICKS: dict[str, Any] = {"qk_norm": True, "short_conv": 4, "value_residual": True, "embedding_residual": True}
LONGEST_REACH, COARSE_STRIDE = 256, 16
"""kalmagrove sees a quarter of its context, at most so many tokens, one by one, and before them blocks of so many."""


def preset_names() -> list[str]:
    """Every preset: a family alone (its default size) and family-size."""
    return [*FAMILIES, *(f"{family}-{size}" for family in FAMILIES for size in SIZES)]


def split_parts(name: str) -> tuple[str, tuple[str, ...]]:
    """A preset's name and the parts that are put into it, those behind its plus signs.

    Raises:
        UsageError: There is no such part, or it comes twice.
    """
    name, *parts = name.split("+")
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"unknown part {part!r} of {name}; parts: {', '.join(PARTS)}")
    if len(set(parts)) < len(parts):
        raise UsageError(f"{name} names a part twice: {', '.join(parts)}")
    return name, tuple(parts)


def split_preset(name: str) -> tuple[str, str]:
    """Family and size of a preset's name, without the parts behind it.

    Raises:
        UsageError: Unknown; the nearest name is offered.
    """
    name, _ = split_parts(name)
    if name in FAMILIES:
        return name, DEFAULT_SIZE
    family, _, size = name.rpartition("-")
    if family in FAMILIES and size in SIZES:
        return family, size
    nearest = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.0)
    raise UsageError(
        f"unknown preset {name!r}; did you mean {nearest[0]!r}? Families: {', '.join(FAMILIES)}; sizes: "
        f"{', '.join(SIZES)}"
    )


def preset_options(name: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of :class:`~kalmagrove.models.config.KalmaGroveConfig` for a preset.

    Args:
        name: A family or family-size, with parts of kalmagrove behind plus signs.
        overrides: Options that replace the preset's. A new ``hidden_size`` or ``num_hidden_layers`` resizes
            everything that depends on it.

    Raises:
        UsageError: The preset is unknown, or has a part already or cannot have it.
    """
    overrides = dict(overrides or {})
    _, parts = split_parts(name)
    family, size_name = split_preset(name)
    size = SIZES[size_name]
    width = overrides.get("hidden_size") or (size.slim_width if family == "slim" else size.hidden_size)
    head_dim = overrides.get("head_dim") or min(size.head_dim, width)
    options = {
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.context_length,
        "hidden_size": width,
        "num_hidden_layers": size.num_hidden_layers,
    }
    context_length = overrides.get("max_position_embeddings") or size.context_length
    options |= _family_options(family, width, head_dim, context_length)
    for part in parts:
        options |= _part_options(part, family, options, context_length)
    attention = overrides.get("attention") or options.get("attention")
    if attention == "arnold" and overrides.get("num_attention_heads") and "resolutions" not in overrides:
        raise UsageError(
            f"num_attention_heads is of full attention, and {name} has Arnold's groups of heads; give resolutions, or "
            "attention full"
        )
    if "resolutions" not in overrides and overrides.get("attention") == "full":
        options["resolutions"] = None
    return options | overrides


def _family_options(family: str, width: int, head_dim: int, context_length: int) -> dict[str, Any]:
    heads = max(1, width // head_dim)
    if family == "gpt2":
        return {
            "norm": "layernorm",
            "feed_forward": "gelu",
            "positions": "learned",
            "bias": True,
            "num_attention_heads": heads,
            "head_dim": width // heads,
            "intermediate_size": 4 * width,
        }
    llama = {"num_attention_heads": heads, "head_dim": width // heads, "intermediate_size": _llama_inner(width)}
    if family == "llama":
        return llama
    if family == "llama-plus":
        return llama | TRICKS
    if family == "slim":
        half_heads = max(2, round(width / 2 / head_dim))
        return TRICKS | {
            "feed_forward": "relu2",
            "num_attention_heads": half_heads,
            "head_dim": width // 2 // half_heads // 2 * 2,
            "intermediate_size": 2 * width,
        }
    half_heads = max(2, width // 2 // head_dim)
    return {
        **TRICKS,
        **GROVE,
        "feed_forward": "relu2",
        "intermediate_size": 2 * width,
        "num_attention_heads": half_heads,
        "head_dim": head_dim,
        **_arnold(half_heads, head_dim, context_length),
    }


def _arnold(num_heads: int, head_dim: int, context_length: int) -> dict[str, Any]:
    """Every head sees the near past token by token, and all of the past in blocks."""
    reach = min(LONGEST_REACH, max(COARSE_STRIDE, context_length // 4))
    scales = [[1, reach], [COARSE_STRIDE, None]]
    return {
        "attention": "arnold",
        "resolutions": [{"num_heads": num_heads, "head_dim": head_dim, "scales": scales}],
    }


def _part_options(part: str, family: str, options: dict[str, Any], context_length: int) -> dict[str, Any]:
    """Grove or Arnold as kalmagrove has it, and nothing else of it."""
    if family == "kalmagrove":
        raise UsageError(f"kalmagrove has {part} already; put it into gpt2, llama, llama-plus or slim")
    if part == "arnold":
        return _arnold(options["num_attention_heads"], options["head_dim"], context_length)
    # Grove's factors have no biases.
    return GROVE | ({"bias": False} if options.get("bias") else {})


def _llama_inner(width: int) -> int:
    """Two thirds of 4 x width, rounded up to a multiple of 8: as many parameters as a two-matrix feed-forward."""
    return -(-8 * width // 3 // 8) * 8
