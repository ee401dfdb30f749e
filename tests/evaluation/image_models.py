"""Small images with a bright bar across or down, and models that have learnt them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kalmagrove.data.example_store import prepare_examples
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.source import image_source
from kalmagrove.evaluation.modality_model import ModalityModel, open_modality_model
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.trainer import train

LEVELS = 6
CLASSES = ("across", "down")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 6, 8) with a bar of levels 4 and 5 on 0 and 1, and their classes."""
    draw = np.random.Generator(np.random.PCG64(seed))
    images, labels = draw.integers(0, 2, (count, 6, 8)), draw.integers(0, 2, count)
    for image, label in zip(images, labels, strict=True):
        place = int(draw.integers(0, 6))
        line = image[place] if label == 0 else image[:, place]
        line += 4
    return images, np.array(CLASSES)[labels]


def save_bars(path: Path, count: int, seed: int, *, labels: bool = True) -> Path:
    images, classes = bars(count, seed)
    np.savez(path, images=images, **({"labels": classes} if labels else {}))
    return path


def train_bars(folder: Path, family: str, steps: int, **options: str) -> ModalityModel:
    """A model trained by the real loop; the run is ``folder / "run"``."""
    source = image_source(str(save_bars(folder / "bars.npz", 600, seed=0)), seed=0, **options)  # type: ignore[arg-type]
    data = prepare_examples(source, folder / "packed")
    context, batch = data.longest - 1, 32
    loop = LoopConfig(
        tokens=steps * batch * context, batch_size=batch, context_length=context, precision="fp32", device="cpu"
    )
    sizes = ModelConfig(preset=family, hidden_size=32, num_hidden_layers=2, head_dim=8)
    train(
        TrainConfig(model=sizes, optim=OptimConfig(name="kalma"), loop=loop), data, folder / "run", say=lambda _: None
    )
    return open_modality_model(str(folder / "run"), device="cpu", precision="fp32")


def fresh_model(folder: Path, family: str, scan: str = "z-order") -> tuple[KalmaGroveForCausalLM, ImageFormat]:
    """A model of bars that has learnt nothing, and the format of its images."""
    source = image_source(str(save_bars(folder / "bars.npz", 40, seed=0)), seed=0, scan=scan)  # type: ignore[arg-type]
    form = ImageFormat.from_dict(source.schema)
    options = {
        "vocab_size": max(form.class_tokens) + 1,
        "modalities": source.modalities,
        "max_position_embeddings": len(form.places) + 4,
        "initializer_range": 0.3,
        **SIZES,
    }
    if family.startswith("kalmagrove"):
        heads = {"num_heads": 2, "head_dim": 8, "scales": [[1, 4], [4, None]]}
        options["resolutions"] = [heads]
    return build_model(model_config(family, options, eos_token_id=form.end_token), seed=0).eval(), form
