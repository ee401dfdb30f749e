"""A model of tables or images with what is needed to read further rows, and what it says about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.data.example_store import read_schema
from kalmagrove.data.tokenizer import load_tokenizer
from kalmagrove.errors import KalmaGroveError
from kalmagrove.models.convert import load_model, model_folder
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.precision import Precision, choose_device, choose_precision

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class ModalityModel:
    """A model with its tokeniser and schema.

    Attributes:
        model: On its device.
        tokenizer: Has its tokens.
        schema: What its rows hold; ``modality`` says of which kind they are.
        precision: Of a forward.
    """

    model: KalmaGroveForCausalLM
    tokenizer: Tokenizer
    schema: dict[str, Any]
    precision: Precision


@dataclass(frozen=True)
class Predictions:
    """What a model says about the rows of a file.

    Attributes:
        rows: One for each row, in their order.
        scores: Of the rows whose truth is known; empty where there are none.
        notes: What a person should know of them, a line each.
    """

    rows: list[dict[str, Any]]
    scores: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_modality_model(source: str, *, device: str = "auto", precision: str = "auto") -> ModalityModel:
    """Opens a model that was trained on tables or images.

    Args:
        source: A run folder or a model folder.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, bf16 or fp32.

    Raises:
        UsageError: The device or the precision is unknown or not there.
        KalmaGroveError: The model cannot be read, or was trained on text.
    """
    chosen_device = choose_device(device)
    chosen_precision = choose_precision(precision, chosen_device)
    folder = model_folder(source)
    schema = read_schema(Path(folder))
    model = load_model(source)
    if not isinstance(model, KalmaGroveForCausalLM):
        raise KalmaGroveError(f"{source} is no model of this package, but {type(model).__name__}; train one on a table")
    return ModalityModel(model.to(chosen_device), load_tokenizer(folder), schema, chosen_precision)
