"""What a model costs: parameters, FLOPs a token, and memory for training and decoding, computed before step 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.projections import grove_rank, is_grove, projection_sizes, shared_sides
from kalmagrove.nn.grove import ComputePath, GroveLinear, compute_path
from kalmagrove.nn.resolution import Resolution
from kalmagrove.precision import autocast


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
    if any(key in name for key in ("embed", "lm_head", "wte", "wpe")):
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
    output head; of Grove's projections the cheaper path for one sequence, with its share of composing W. Left out:
    norms and other elementwise work, and the multiplication of weights with diagonal cores.
    """
    layer = 0.0
    for name, (in_features, out_features) in projection_sizes(config).items():
        layer += _projection_macs(config, name, in_features, out_features, context_length)
    layer += sum(2 * group.width * mean_visible_keys(group, context_length) for group in config.head_groups())
    layer += 2 * config.short_conv * config.attention_width
    rank = config.embedding_rank
    embedding = 2 * config.hidden_size * rank if rank is not None else 0
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


def decoding_bytes(config: KalmaGroveConfig, length: int, bytes_per_value: int = 4) -> int:
    """Bytes of the decoding cache for one sequence after ``length`` tokens."""
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
    return config.num_hidden_layers * values * bytes_per_value


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training memory by part."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together; work space of single operations comes on top."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def training_memory(
    config: KalmaGroveConfig, *, batch_size: int, context_length: int, optimizer: str, precision: str = "fp32"
) -> TrainingMemory:
    """Memory of one training step.

    The activations are those that autograd saves in a forward that is run without data.

    Args:
        config: The model.
        batch_size: Sequences of a micro-batch.
        context_length: Tokens of a sequence.
        optimizer: "adamw", "muon" or "kalma".
        precision: "fp32" or "bf16" autocast.
    """
    model = build_empty(config)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    return TrainingMemory(
        parameters=parameters,
        gradients=parameters,
        optimizer=_optimizer_bytes(model, optimizer),
        activations=_saved_bytes(config, batch_size, context_length, precision),
    )


def _optimizer_bytes(model: KalmaGroveForCausalLM, optimizer: str) -> int:
    from kalmagrove.optim.curvature import BLOCK_SIZE, blocks_shape
    from kalmagrove.optim.groups import kalma_groups
    from kalmagrove.optim.whitening import count_state

    if optimizer == "adamw":
        return 8 * sum(p.numel() for p in model.parameters())
    values = 0
    for group in kalma_groups(model):
        is_matrix, is_whitened = group["method"] == "kalma", optimizer == "kalma" and group["method"] != "adamw"
        for parameter in group["params"]:
            values += parameter.numel()
            if is_whitened:
                outputs, inputs = parameter.shape
                values += count_state(outputs, inputs, BLOCK_SIZE, features_only=not is_matrix)
                values += 2 * math.prod(blocks_shape(parameter.shape[1], BLOCK_SIZE)) if is_matrix else 0
            elif not is_matrix:
                values += parameter.numel()
    return 4 * values


def _saved_bytes(config: KalmaGroveConfig, batch_size: int, context_length: int, precision: str) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward, without the parameters."""
    saved: dict[int, int] = {}

    def look_on(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        keep.append(tensor)
        return tensor

    look_on.only_looks_on = True  # type: ignore[attr-defined]
    keep: list[Tensor] = []
    with FakeTensorMode():
        model = KalmaGroveForCausalLM(config)
        owned = {p.untyped_storage()._cdata for p in model.parameters()}
        tokens = torch.zeros(batch_size, context_length, dtype=torch.int64)
        device = torch.device("cpu")
        with (
            torch.autograd.graph.saved_tensors_hooks(look_on, lambda tensor: tensor),
            autocast("bf16" if precision == "bf16" else "fp32", device),
        ):
            model.token_loss_sum(tokens, tokens)
    return sum(size for key, size in saved.items() if key not in owned)
