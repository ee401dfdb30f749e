"""A model folder without Grove, for tools that know only plain layers."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import whole_folder
from kalmagrove.models.convert import as_decoder, load_model, model_folder, obstacles, save_model, stock_family
from kalmagrove.models.merging import merge

FORMS = ("auto", "llama", "gpt2", "dense")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
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


def export_folder(source: str, folder: Path, *, form: str = "auto", adaptor: str | None = None) -> str:
    """Writes a model, with the tokeniser where the source is a folder, as a dense Hugging Face folder.

    Args:
        source: A run folder, a model folder or a Hub name.
        folder: Must not exist, or be empty.
        form: "llama" or "gpt2" for a stock folder, "dense" for one of ours, "auto" for stock where it is possible.
        adaptor: The task core that is merged into the weights.

    Returns:
        What was written.

    Raises:
        UsageError: The form or the adaptor is unknown, the model cannot take the form, or the folder is in use.
        KalmaGroveError: The source cannot be read.
    """
    if form not in FORMS:
        raise UsageError(f"--format must be one of {', '.join(FORMS)}, got {form!r}")
    folder = folder.resolve()
    require_free_folder(folder)
    model = as_decoder(load_model(source))
    if adaptor is not None:
        try:
            model.set_adaptor(adaptor)
        except ValueError as error:
            raise UsageError(f"--adaptor: {error}") from error
    merged = merge(model)
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
            for name in TOKENIZER_FILES:
                path = Path(model_folder(source)) / name
                if path.is_file():
                    shutil.copyfile(path, temporary / name)
    except (OSError, SafetensorError) as error:
        raise KalmaGroveError(f"cannot write {folder}: {error}") from error
    return "a dense kalmagrove model" if form == "dense" or family is None else f"a stock {family} model"
