"""What a model costs and how well it predicts, before and after."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kalmagrove.compression.calibration import loss_of
from kalmagrove.models.compressed import matrix_sizes
from kalmagrove.nn.compact import CompactLinear
from kalmagrove.precision import Precision, autocast, synchronize

REPEATS = 3


@dataclass(frozen=True)
class Measures:
    """Of one model.

    Attributes:
        parameters: A shared or tied one counts once.
        bytes: Of all tensors that are stored.
        flops_per_token: Of the forward's matrices and output head, two for each multiplication; scores of attention
            and elementwise work are the same before and after and are left out.
        perplexity: On the validation windows.
        tokens_per_second: Of a forward of one window, the median of a few.
    """

    parameters: int
    bytes: int
    flops_per_token: int
    perplexity: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def measure(model: PreTrainedModel, windows: Tensor, *, dtype: torch.dtype, precision: Precision) -> Measures:
    """Measures of a model on windows (windows, context + 1).

    Args:
        model: In evaluation mode.
        windows: Tokens.
        dtype: That floating-point tensors are stored in.
        precision: "bf16" or "fp32", of the products.
    """
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
    return Measures(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors),
        flops_per_token=2 * multiplications(model),
        perplexity=math.exp(min(700.0, loss_of(model, windows, precision))),
        tokens_per_second=_speed(model, windows[:1, :-1], precision),
    )


def multiplications(model: PreTrainedModel) -> int:
    """Of one token with all matrices, the output head included."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, CompactLinear):
            total += layer.rank * (layer.in_features - layer.rank + layer.out_features)
        elif isinstance(layer, nn.Linear | Conv1D):
            in_features, out_features = matrix_sizes(layer)
            total += in_features * out_features
    head = model.get_output_embeddings()
    if isinstance(head, nn.Embedding):
        # Our own decoder with tied embeddings multiplies by the table itself.
        total += head.weight.numel()
    return total


@torch.no_grad()
def _speed(model: PreTrainedModel, tokens: Tensor, precision: Precision) -> float:
    device = next(model.parameters()).device
    tokens, seconds = tokens.to(device), []
    with autocast(precision, device):
        for _ in range(REPEATS + 1):
            synchronize(device)
            began = time.perf_counter()
            model(input_ids=tokens)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
    # The first one warms up.
    return tokens.numel() / statistics.median(seconds[1:])
