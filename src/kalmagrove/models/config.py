"""KalmaGroveConfig: every choice that the decoder is composed from."""

from __future__ import annotations

from typing import Any, get_args

from transformers import PretrainedConfig

from kalmagrove.models.choices import (
    Attention,
    CoreKind,
    FeedForwardKind,
    GroveParts,
    Norm,
    Positions,
    Projections,
    SharedSides,
    Sharing,
)
from kalmagrove.nn.resolution import Resolution


class KalmaGroveConfig(PretrainedConfig):
    """Configuration of :class:`~kalmagrove.models.decoder.KalmaGroveForCausalLM`.

    Args:
        vocab_size: Tokens.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of full attention; with Arnold the resolutions count.
        head_dim: Size of a head; None is ``hidden_size / num_attention_heads``.
        intermediate_size: Hidden units of the feed-forward.
        max_position_embeddings: Longest sequence in tokens.
        norm: "rmsnorm" or "layernorm".
        norm_eps: Added to the mean square.
        feed_forward: "swiglu", "gelu" or "relu2".
        positions: "rotary" or "learned".
        rope_theta: Base of rotary positions.
        bias: Whether dense projections have a bias.
        attention: "full" or "arnold".
        resolutions: Arnold's groups of heads: dictionaries with num_heads, head_dim and scales, a list of pairs
            (stride, reach).
        projections: "dense" or "grove".
        grove_parts: The parts of a layer whose projections are Grove's, the others being dense: "all", "attention" or
            "feed_forward".
        rank: Grove's inner size; None is full rank.
        group_size: Layers that share a basis.
        sharing: "group" (disjoint groups of neighbours), "cycle" (the bases in turns), "mix" (every layer adds up all
            of them, each behind a diagonal core) or "band" (overlapping pieces of one bank).
        shared_sides: "residual" (the bases that touch the residual stream), "inner" (those that do not) or "both".
        core: Form of Sigma: "diagonal", "block" or "dense".
        core_block_size: Side of a block of a block-diagonal core.
        qk_norm: Normalise queries and keys a head.
        short_conv: Taps of the causal convolution on keys and values; 0 is none.
        document_mask: Whether tokens see only their own document, the text after the last end-of-text token
            (``eos_token_id``).
        value_residual: Mix the first layer's values into later layers.
        embedding_residual: Mix the token embedding into the input of every layer.
        embedding_rank: Inner size of a factorised embedding: a table (vocabulary, rank) that the input and a tied head
            share, and a matrix between rank and width for each of them; None is one table of full width.
        initializer_range: Standard deviation of initial weights.
        tie_word_embeddings: Whether the output head is the token embedding.
        adaptors: Names of the task cores that the model has.
        modalities: What a sequence holds beside words: by name of the modality its options, the placeholder token
            among them.

    Raises:
        ValueError: A choice is unknown or sizes do not fit together.
    """

    model_type = "kalmagrove"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 128,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 4,
        head_dim: int | None = None,
        intermediate_size: int = 344,
        max_position_embeddings: int = 512,
        norm: Norm = "rmsnorm",
        norm_eps: float = 1e-5,
        feed_forward: FeedForwardKind = "swiglu",
        positions: Positions = "rotary",
        rope_theta: float = 10000.0,
        bias: bool = False,
        attention: Attention = "full",
        resolutions: list[dict[str, Any]] | None = None,
        projections: Projections = "dense",
        grove_parts: GroveParts = "all",
        rank: int | None = None,
        group_size: int = 2,
        sharing: Sharing = "group",
        shared_sides: SharedSides = "residual",
        core: CoreKind = "diagonal",
        core_block_size: int = 16,
        qk_norm: bool = False,
        short_conv: int = 0,
        document_mask: bool = False,
        value_residual: bool = False,
        embedding_residual: bool = False,
        embedding_rank: int | None = None,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        adaptors: list[str] | None = None,
        modalities: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim if head_dim is not None else hidden_size // max(1, num_attention_heads)
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.norm = norm
        self.norm_eps = norm_eps
        self.feed_forward = feed_forward
        self.positions = positions
        self.rope_theta = rope_theta
        self.bias = bias
        self.attention = attention
        self.resolutions = resolutions
        self.projections = projections
        self.grove_parts = grove_parts
        self.rank = rank
        self.group_size = group_size
        self.sharing = sharing
        self.shared_sides = shared_sides
        self.core = core
        self.core_block_size = core_block_size
        self.qk_norm = qk_norm
        self.short_conv = short_conv
        self.document_mask = document_mask
        self.value_residual = value_residual
        self.embedding_residual = embedding_residual
        self.embedding_rank = embedding_rank
        self.initializer_range = initializer_range
        self.adaptors = list(adaptors or [])
        self.modalities = dict(modalities or {})
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self._check()

    def head_groups(self) -> tuple[Resolution, ...]:
        """The groups of heads: one of stride 1 without a window for full attention."""
        if self.attention == "full":
            return (Resolution(self.num_attention_heads, self.head_dim),)
        try:
            return tuple(Resolution(**group) for group in self.resolutions or ())
        except TypeError as error:
            raise ValueError(f"a group of resolutions has num_heads, head_dim and scales: {error}") from error

    @property
    def attention_width(self) -> int:
        """Channels of all heads together."""
        return sum(group.width for group in self.head_groups())

    def _grove_inner_sizes(self) -> list[int]:
        """The sides of Grove's projections that are not the residual stream's."""
        sizes = {"attention": self.attention_width, "feed_forward": self.intermediate_size}
        return [size for part, size in sizes.items() if self.grove_parts in ("all", part)]

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self._check_attention()
        self._check_ranks()
        self._check_sharing()
        if self.short_conv < 0 or self.short_conv == 1:
            raise ValueError(f"short_conv must be 0 (none) or at least 2 taps, got {self.short_conv}")
        if self.bias and self.projections == "grove":
            raise ValueError("bias is for dense projections; set bias: false or projections: dense")

    def _check_attention(self) -> None:
        if self.attention == "full" and self.resolutions is not None:
            raise ValueError("resolutions need attention = arnold; set attention: arnold or leave resolutions out")
        if self.attention == "arnold" and not self.resolutions:
            raise ValueError("attention = arnold needs resolutions: a list with num_heads, head_dim, scales")
        for group in self.head_groups():
            if self.positions == "rotary" and group.head_dim % 2:
                raise ValueError(f"head_dim must be even for rotary positions, got {group.head_dim}")

    def _check_ranks(self) -> None:
        if self.rank is not None:
            width = min(self.hidden_size, *self._grove_inner_sizes())
            if not 1 <= self.rank <= width:
                raise ValueError(
                    f"rank {self.rank} must be between 1 and {width}, the smallest side of a projection; leave rank "
                    "out for full rank"
                )
        if self.embedding_rank is not None and not 1 <= self.embedding_rank <= self.hidden_size:
            raise ValueError(
                f"embedding_rank {self.embedding_rank} must be between 1 and hidden_size {self.hidden_size}; leave it "
                "out for one full table"
            )

    def _check_sharing(self) -> None:
        if self.projections == "grove" and self.sharing == "band" and self.shared_sides != "both":
            pieces = [self.rank] if self.rank is not None else self._grove_inner_sizes()
            if any(size % self.group_size for size in pieces):
                raise ValueError(
                    f"sharing = band cuts sizes {', '.join(map(str, pieces))} into group_size {self.group_size} "
                    "pieces; choose sizes that it divides, or sharing: group"
                )
        if self.projections == "grove" and self.sharing == "mix":
            plain = {"rank": None, "core": "diagonal"}
            wrong = [name for name, value in plain.items() if getattr(self, name) != value]
            if wrong or self.shared_sides == "both":
                raise ValueError(
                    "sharing = mix needs full rank, a diagonal core and one shared side; leave out "
                    + (", ".join(wrong) or "shared_sides: both")
                )


_CHOICES = {
    "norm": Norm,
    "feed_forward": FeedForwardKind,
    "positions": Positions,
    "attention": Attention,
    "projections": Projections,
    "grove_parts": GroveParts,
    "sharing": Sharing,
    "shared_sides": SharedSides,
    "core": CoreKind,
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "group_size",
    "core_block_size",
)
