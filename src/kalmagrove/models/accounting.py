"""What a model costs: parameters, FLOPs a token and memory for decoding, computed before step 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kalmagrove.modalities.registry import make_modality
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.projections import grove_rank, is_grove, projection_sizes, shared_sides
from kalmagrove.nn.grove import ComputePath, GroveLinear, compute_path
from kalmagrove.nn.resolution import Resolution


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; a shared or tied one counts once."""

    total: int
    embedding: int
    attention: int
    feed_forward: int
    other: int

    @property
    def non_embedding(self) -> int:
        """All but the embeddings and an untied head."""
        return self.total - self.embedding


def count_parameters(model: nn.Module) -> ParameterCount:
    """Parameters by part; works for any model that names its projections as ours or as Llama's."""
    parts = {"embedding": 0, "attention": 0, "feed_forward": 0, "other": 0}
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
    return ParameterCount(total=sum(parts.values()), **parts)


def _part_of(name: str) -> str:
    # A compressed model's bases are named after the matrices that read them, with dashes for dots.
    name = name.replace("-", ".")
    if any(key in name for key in ("embed", "lm_head", "modalities", "wte", "wpe")):
        return "embedding"
    if any(key in name for key in ("gate_proj", "up_proj", "down_proj", "mlp.")):
        return "feed_forward"
    if any(key in name for key in ("_proj", "self_attn", "attn.")):
        return "attention"
    return "other"


def build_empty(config: KalmaGroveConfig) -> KalmaGroveForCausalLM:
    """A model without memory for its weights, to be counted."""
    with torch.device("meta"):
        return KalmaGroveForCausalLM(config)


def forward_macs_per_token(config: KalmaGroveConfig, context_length: int) -> float:
    """Multiply-accumulates of the forward for one token, averaged over a context of that length.

    Counted: projections, attention scores and mixing over the keys that a query can see, short convolutions and the
    output head, and encoders and heads of other modalities as if every token were of each; of Grove's projections the
    cheaper path for one sequence, with its share of composing W. Left out: norms and other elementwise work, and the
    multiplication of weights with diagonal cores.
    """
    layer = 0.0
    for name, (in_features, out_features) in projection_sizes(config).items():
        layer += _projection_macs(config, name, in_features, out_features, context_length)
    layer += sum(2 * group.width * mean_visible_keys(group, context_length) for group in config.head_groups())
    layer += 2 * config.short_conv * config.attention_width
    rank = config.embedding_rank
    embedding = 2 * config.hidden_size * rank if rank is not None else 0
    embedding += sum(make_modality(n, config.hidden_size, o).macs for n, o in config.modalities.items())
    return config.num_hidden_layers * layer + embedding + (rank or config.hidden_size) * config.vocab_size


def _projection_macs(config: KalmaGroveConfig, name: str, in_features: int, out_features: int, tokens: int) -> float:
    dense = in_features * out_features
    if not is_grove(config, name) or (len(shared_sides(config, name)) == 1 and config.rank is None):
        return dense
    rank = grove_rank(config, name, in_features, out_features)
    if compute_path(tokens, in_features, out_features, rank) == "composed":
        return dense + dense * rank / tokens
    return rank * (in_features + out_features)


def projection_paths(config: KalmaGroveConfig, tokens: int, *, composed_before: bool = False) -> dict[str, ComputePath]:
    """How each Grove projection multiplies so many tokens; none for a dense model."""
    model = build_empty(config)
    layers = {name.rsplit(".", 1)[-1]: m for name, m in model.named_modules() if isinstance(m, GroveLinear)}
    return {name: layer.compute_path(tokens, composed_before=composed_before) for name, layer in layers.items()}


def mean_visible_keys(group: Resolution, context_length: int) -> float:
    """Keys that a query of a resolution sees, averaged over the positions of a context."""
    positions, seen = torch.arange(context_length), 0
    for scale, (stride, reach) in enumerate(group.scales):
        newest = ((positions - group.nearest(scale)) // stride + 1).clamp(min=0)
        oldest = torch.zeros_like(newest) if reach is None else ((positions - reach) // stride + 1).clamp(min=0)
        seen += int((newest - torch.minimum(oldest, newest)).sum())
    return seen / context_length


def training_flops_per_token(config: KalmaGroveConfig, context_length: int) -> float:
    """FLOPs of forward and backward for one token: six for each multiply-accumulate of the forward."""
    return 6 * forward_macs_per_token(config, context_length)


def decoding_bytes(config: KalmaGroveConfig, length: int) -> int:
    """Bytes of the decoding cache for one sequence after ``length`` tokens, in float32."""
    values = 0
    for group in config.head_groups():
        reach = group.scales[0][1]
        kept = length if reach is None else min(length, reach - 1)
        for scale, _ in group.coarse:
            kept += len(range(*group.remembered(scale, length).indices(length)))
        open_tokens = min(length, group.scales[-1][0] - 1)
        values += 2 * group.width * (kept + open_tokens)
    if config.short_conv:
        values += 2 * (config.short_conv - 1) * config.attention_width
    return config.num_hidden_layers * values * torch.float32.itemsize
