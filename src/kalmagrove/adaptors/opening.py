"""Adaptors by name: where a model's own lie, and a model opened with one of them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from kalmagrove.adaptors.adaptors import Adaptors
from kalmagrove.adaptors.naming import check_name
from kalmagrove.adaptors.storage import ADAPTOR_FOLDER, DESCRIPTION, is_adaptor_folder, load_adaptor
from kalmagrove.errors import UsageError
from kalmagrove.models.convert import load_model
from kalmagrove.models.decoder import KalmaGroveForCausalLM

ADAPTORS_FOLDER = "adaptors"


def open_with_adaptor(source: str, adaptor: str | None) -> PreTrainedModel:
    """A model with an adaptor merged into its weights, to score or to generate with.

    Args:
        source: A run folder, a model folder or a Hub name.
        adaptor: The folder of an adaptor or of the run that trained it, the name of one in the model's folder
            ``adaptors``, or of a task core that is saved with the model itself; None is the model alone.

    Raises:
        UsageError: There is no such adaptor.
        KalmaGroveError: The model or the adaptor cannot be read, or they do not belong together.
    """
    model = load_model(source)
    if adaptor is None:
        return model
    if isinstance(model, KalmaGroveForCausalLM) and adaptor in model.config.adaptors:
        model.set_adaptor(adaptor)
        return model
    folder = find_adaptor(source, adaptor)
    adaptors = Adaptors(model)
    adaptors.set_adaptor(load_adaptor(adaptors, folder))
    adaptors.merge()
    return model


def find_adaptor(source: str, adaptor: str) -> Path:
    """The folder of an adaptor that is given by its folder or by its name.

    Raises:
        UsageError: There is none; the names that there are are listed.
    """
    for folder in (Path(adaptor), Path(adaptor) / ADAPTOR_FOLDER):
        if is_adaptor_folder(folder):
            return folder
    if "/" not in adaptor and is_adaptor_folder(adaptor_folder(source, adaptor)):
        return adaptor_folder(source, adaptor)
    here, names = Path(source) / ADAPTORS_FOLDER, ", ".join(adaptor_names(source)) or "none"
    raise UsageError(f"--adaptor: no adaptor {adaptor!r}; {here} has: {names}")


def adaptor_folder(source: str, name: str) -> Path:
    """Where a model's own adaptor of a name lies."""
    return Path(source) / ADAPTORS_FOLDER / name / ADAPTOR_FOLDER


def adaptor_names(source: str) -> list[str]:
    """The adaptors that a model's folder holds, trained to their end."""
    here = Path(source) / ADAPTORS_FOLDER
    return [path.parent.parent.name for path in sorted(here.glob(f"*/{ADAPTOR_FOLDER}/{DESCRIPTION}"))]


def default_run_folder(source: str, name: str) -> Path:
    """Where the adaptors of a model are trained when nothing else is said: beside the model.

    Raises:
        UsageError: The model is no folder here, or the name cannot be a folder's.
    """
    check_name(name)
    if not Path(source).is_dir():
        raise UsageError(f"{source} is no folder here; say with --out where the adaptor's run is to be kept")
    return Path(source) / ADAPTORS_FOLDER / name
