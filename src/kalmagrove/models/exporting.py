"""A model folder without Grove, for tools that know only plain layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from kalmagrove.compression.model import CompressedForCausalLM, to_dense
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import whole_folder
from kalmagrove.models.convert import (
    as_decoder,
    load_model,
    model_folder,
    obstacles,
    save_model,
    stock_family,
    write_folder,
)
from kalmagrove.models.merging import merge

FORMS = ("auto", "llama", "gpt2", "dense")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modality.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def require_free_folder(folder: Path) -> None:
    """That nothing would be overwritten.

    Raises:
        UsageError: The folder is not empty, or a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty; choose another --out")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokeniser, as far as the source has them.

    Raises:
        OSError: They cannot be read or written.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


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
    if form not in FORMS:
        raise UsageError(f"--format must be one of {', '.join(FORMS)}, got {form!r}")
    folder = folder.resolve()
    require_free_folder(folder)
    opened = open_model(source)
    if isinstance(opened, CompressedForCausalLM):
        return _export_compressed(opened, source, folder, form)
    merged = merge(as_decoder(opened))
    family = stock_family(merged.config)
    if form in ("llama", "gpt2") and family != form:
        found = ", ".join(obstacles(merged.config, form)) or "tied embeddings or the width of its heads"  # type: ignore[arg-type]
        raise UsageError(f"this model cannot be written as {form}: it differs in {found}; use --format dense")
    try:
        with whole_folder(folder) as temporary:
            if form == "dense":
                merged.save_pretrained(temporary)
            else:
                save_model(merged, temporary)
            copy_tokenizer(Path(model_folder(source)), temporary)
    except (OSError, SafetensorError) as error:
        raise KalmaGroveError(f"cannot write {folder}: {error}") from error
    return "a dense kalmagrove model" if form == "dense" or family is None else f"a stock {family} model"


def _export_compressed(model: CompressedForCausalLM, source: str, folder: Path, form: str) -> str:
    """A compressed model as the dense one of its source's own architecture."""
    dense = to_dense(model)
    family = dense.config.model_type
    if form in ("llama", "gpt2") and form != family:
        raise UsageError(f"this model was compressed from a {family}; leave out --format {form} to write it as one")
    try:
        with whole_folder(folder) as temporary:
            write_folder(dense, temporary)
            copy_tokenizer(Path(model_folder(source)), temporary)
    except (OSError, SafetensorError) as error:
        raise KalmaGroveError(f"cannot write {folder}: {error}") from error
    return f"a dense {family} model"
