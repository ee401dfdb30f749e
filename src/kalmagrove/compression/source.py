"""Opens what is to be compressed: a dense model, whatever it was stored as, and its tokeniser."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kalmagrove.auto_classes import register_when_imported
from kalmagrove.data.tokenizer import copy_tokenizer
from kalmagrove.errors import KalmaGroveError, first_line
from kalmagrove.models.compressed import CompressedForCausalLM, to_dense
from kalmagrove.models.convert import load_model, model_folder
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.merging import merge
from kalmagrove.training.extras import require_extra

ARCHITECTURES = ("gpt2", "kalmagrove", "kalmagrove_compressed", "llama", "mistral", "qwen2", "qwen3")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """What is compressed.

    Attributes:
        model: Dense, float32, in evaluation mode.
        dtype: Of its stored weights, in which the output is written.
        folder: The model folder, or the folder of the GGUF file.
        gguf_file: The file's name in the folder, or None.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    folder: Path
    gguf_file: str | None

    def files(self) -> list[Path]:
        """What the model was read from."""
        if self.gguf_file is not None:
            return [self.folder / self.gguf_file]
        return [self.folder / "config.json", *self.folder.glob("*.safetensors")]


def open_source(path: str) -> Source:
    """The dense model of a folder of transformers, of one of our run or model folders, or of a GGUF file.

    A Grove model, and one that was compressed before, is multiplied out first.

    Args:
        path: A folder, or a file that ends in .gguf (which needs the extra of that name).

    Raises:
        KalmaGroveError: It is no such folder, holds pickles, quantised weights, an architecture that is not known, too
            few files or weights that are not numbers.
        UsageError: A GGUF file is given and the package that reads it is not installed.
    """
    register_when_imported()
    if path.endswith(".gguf"):
        return _open_gguf(Path(path))
    if not Path(path).is_dir():
        raise KalmaGroveError(f"{path} is not a folder; give a model folder, a run folder or a .gguf file")
    folder = Path(model_folder(path))
    _check_files(folder)
    _check_config(folder)
    model = load_model(folder)
    dtype = model.dtype
    model = model.to(torch.float32)
    if isinstance(model, CompressedForCausalLM):
        model = to_dense(model)
    elif isinstance(model, KalmaGroveForCausalLM):
        model = merge(model)
    _check_numbers(model, path)
    return Source(model.eval(), dtype, folder, None)


def save_tokenizer_of(source: Source, folder: Path) -> None:
    """Puts the source's tokeniser into a folder: its files as they are, or made from a GGUF file.

    Raises:
        OSError: They cannot be written.
    """
    if source.gguf_file is not None:
        AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf_file).save_pretrained(folder)
        return
    copy_tokenizer(source.folder, folder)


@contextmanager
def tokenizer_folder(source: Source) -> Iterator[Path]:
    """A folder with the source's tokenizer.json: its own, or a temporary one of a GGUF file."""
    if source.gguf_file is None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer_of(source, Path(folder))
        yield Path(folder)


def _open_gguf(path: Path) -> Source:
    require_extra("gguf", "gguf", f"the file {path.name}")
    if not path.is_file():
        raise KalmaGroveError(f"{path} is not a file; give a model folder, a run folder or a .gguf file")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A damaged file reaches several libraries' own code, which have no common error for it.
    except Exception as error:
        raise KalmaGroveError(f"cannot read {path}: {first_line(error)}") from error
    # What was read is plain numbers: without these marks it is written like any other model.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _check_numbers(model, str(path))
    return Source(model.eval(), torch.float32, path.parent, path.name)


def _check_files(folder: Path) -> None:
    """Only whole sets of safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise KalmaGroveError(f"{index} is damaged; fetch the model again") from error
        missing = sorted(str(name) for name in needed if not (folder / str(name)).is_file())
        if missing:
            raise KalmaGroveError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(needed)} files are missing); fetch it again"
            )
    elif not any(folder.glob("*.safetensors")):
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            raise KalmaGroveError(
                f"{folder} holds pickled weights, which can run code and are never opened; where you trust them, "
                "convert them to safetensors with transformers: load the model and call "
                "save_pretrained(folder, safe_serialization=True)"
            )
        raise KalmaGroveError(f"{folder} holds no model.safetensors; give a folder with a model's weights")


def _check_config(folder: Path) -> None:
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # What is wrong with the file reaches the library's own code, which has no common error for it.
    except Exception as error:
        raise KalmaGroveError(f"cannot read {folder / 'config.json'}: {first_line(error)}") from error
    if config.model_type not in ARCHITECTURES:
        raise KalmaGroveError(
            f"{folder} is of the architecture {config.model_type!r}; {', '.join(ARCHITECTURES)} can be compressed"
        )
    if getattr(config, "document_mask", False):
        raise KalmaGroveError(
            f"{folder} was trained with model.document_mask, which compression does not know; compress a model that "
            "was trained without it"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise KalmaGroveError(
            f"{folder} holds quantised weights; compress the model that they were made from, and quantise after it"
        )


def _check_numbers(model: PreTrainedModel, path: str) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise KalmaGroveError(f"{path}: the weights {name} hold NaN or infinity; fetch the model again")
