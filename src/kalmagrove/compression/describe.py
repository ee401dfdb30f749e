"""What a compressed model's folder holds, for ``kalmagrove info``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from kalmagrove.compression.measures import multiplications
from kalmagrove.errors import KalmaGroveError
from kalmagrove.models.accounting import count_parameters
from kalmagrove.models.compressed import CompressedForCausalLM
from kalmagrove.models.compressed_config import CompressedConfig
from kalmagrove.models.convert import any_config


def describe_compressed(folder: str) -> dict[str, Any] | None:
    """Counts, FLOPs and bases of a compressed model; None where the folder holds another kind of model.

    Raises:
        KalmaGroveError: The configuration cannot be read.
    """
    config = any_config(folder)
    if not isinstance(config, CompressedConfig):
        return None
    try:
        with torch.device("meta"):
            model = CompressedForCausalLM(config)
    # What is wrong with a configuration reaches the library's own code, which has no common error for it.
    except Exception as error:
        raise KalmaGroveError(f"{folder} does not describe a compressed model: {error}") from error
    parameters = count_parameters(model)
    readers = list(config.factors.values())
    return {
        "name": folder,
        "architecture": config.text_config.model_type,
        "context_length": config.max_position_embeddings,
        "parameters": asdict(parameters),
        "forward_flops_per_token": 2 * multiplications(model),
        "factorised_matrices": len(readers),
        "bases": len(config.bases),
        "matrices_that_share_a_basis": sum(1 for name in readers if readers.count(name) > 1),
        "cut_layers": len(config.sizes),
        "mean_rank": sum(rank for rank, _ in config.bases.values()) / max(1, len(config.bases)),
    }
