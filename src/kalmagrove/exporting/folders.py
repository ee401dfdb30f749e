"""A model folder without Grove, for tools that know only plain layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from kalmagrove.data.tokenizer import copy_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import require_free_folder, whole_folder
from kalmagrove.models.compressed import CompressedForCausalLM, to_dense
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.convert import (
    Stock,
    as_decoder,
    load_model,
    model_folder,
    obstacles,
    save_model,
    stock_family,
    to_stock,
    write_folder,
)
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.merging import merge

FOLDER_FORMS = ("auto", "llama", "gpt2", "dense")
STOCK_FORMS: tuple[Stock, ...] = ("llama", "gpt2")


def export_folder(
    source: str, folder: Path, *, form: str = "auto", open_model: Callable[[str], PreTrainedModel] = load_model
) -> str:
    """Writes a model, with the tokeniser where the source is a folder, as a dense Hugging Face folder.

    Args:
        source: A run folder, a model folder or a Hub name.
        folder: Must not exist, or be empty.
        form: "llama" or "gpt2" for a stock folder, "dense" for one of ours, "auto" for stock where it is possible.
        open_model: Reads the source, where it is to be changed before it is written: with an adaptor merged.

    Returns:
        What was written.

    Raises:
        UsageError: The form is unknown, the model cannot take the form, or the folder is in use.
        KalmaGroveError: The source cannot be read.
    """
    if form not in FOLDER_FORMS:
        raise UsageError(f"--format must be one of {', '.join(FOLDER_FORMS)}, or gguf for a file, got {form!r}")
    folder = folder.resolve()
    require_free_folder(folder)
    opened = open_model(source)
    if isinstance(opened, CompressedForCausalLM):
        return _export_compressed(opened, source, folder, form)
    merged = merge(as_decoder(opened))
    family = stock_family(merged.config)
    for stock in STOCK_FORMS:
        if form == stock != family:
            raise UsageError(
                f"this model cannot be written as {form}: {_difference(merged.config, stock)}; use --format dense"
            )
    try:
        with whole_folder(folder) as temporary:
            if form == "dense":
                merged.save_pretrained(temporary)
            else:
                save_model(merged, temporary)
            copy_tokenizer(Path(model_folder(source)), temporary)
    except OSError as error:
        raise KalmaGroveError(f"cannot write {folder}: {error}") from error
    return "a dense kalmagrove model" if form == "dense" or family is None else f"a stock {family} model"


def export_gguf(source: str, path: Path, *, open_model: Callable[[str], PreTrainedModel] = load_model) -> str:
    """Writes a model with its tokeniser as a GGUF file, for llama.cpp.

    Args:
        source: A run folder or a model folder.
        path: The file; nothing may have its name.
        open_model: As for :func:`export_folder`.

    Returns:
        What was written.

    Raises:
        UsageError: llama.cpp cannot run such a model or knows no such tokeniser, or the name is taken.
        KalmaGroveError: The source cannot be read, or the file cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} exists; choose another --out")
    opened = open_model(source)
    folder = Path(model_folder(source))
    if not folder.is_dir():
        raise UsageError(f"{source} is no folder here; fetch the model first")
    stock = to_dense(opened) if isinstance(opened, CompressedForCausalLM) else opened
    if isinstance(stock, KalmaGroveForCausalLM):
        stock = _as_stock(merge(stock))
    from kalmagrove.exporting.gguf_file import write_gguf

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(stock, folder, path, name=path.stem)
    except OSError as error:
        raise KalmaGroveError(f"cannot write {path}: {error}") from error
    return f"a {stock.config.model_type} for llama.cpp"


def _as_stock(merged: KalmaGroveForCausalLM) -> PreTrainedModel:
    if stock_family(merged.config) is None:
        nearest = min(STOCK_FORMS, key=lambda family: len(obstacles(merged.config, family)))
        raise UsageError(
            f"this model cannot be written as gguf, in which llama.cpp runs Llama and GPT-2: as {nearest} "
            f"{_difference(merged.config, nearest)}"
        )
    return to_stock(merged)


def _difference(config: KalmaGroveConfig, family: Stock) -> str:
    found = ", ".join(obstacles(config, family)) or "tied embeddings or the width of its heads"
    return f"it differs in {found}"


def _export_compressed(model: CompressedForCausalLM, source: str, folder: Path, form: str) -> str:
    """A compressed model as the dense one of its source's own architecture."""
    dense = to_dense(model)
    family = dense.config.model_type
    if form in STOCK_FORMS and form != family:
        raise UsageError(f"this model was compressed from a {family}; leave out --format {form} to write it as one")
    try:
        with whole_folder(folder) as temporary:
            write_folder(dense, temporary)
            copy_tokenizer(Path(model_folder(source)), temporary)
    except OSError as error:
        raise KalmaGroveError(f"cannot write {folder}: {error}") from error
    return f"a dense {family} model"
