"""Decoders on a set of images: one training, and what it says about the validation and test images."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from images_lab.data import ImageSet
from kalmagrove.data.example_store import PackedExamples, prepare_examples
from kalmagrove.data.examples import Example
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.source import ImageSource, image_source
from kalmagrove.errors import UsageError
from kalmagrove.modalities.patch import bits_per_dimension
from kalmagrove.models.accounting import build_empty, count_parameters
from kalmagrove.models.build import model_config
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.nn.grove import composed_weights
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, OptimizerName, TrainConfig
from kalmagrove.training.run import TrainingDiverged, TrainingRun

BATCH_SIZE, LAYERS, HEAD_DIM, PARAMETERS = 32, 4, 16, 200_000
LOOKS = 5
"""At the validation images in a training, of which the best is kept."""
RATES = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Variant:
    """A way to train on images.

    Attributes:
        title: For the page.
        family: Of the model.
        optimizer: Kalma, or AdamW as the baseline is usually trained.
        scan: The order of the patches.
        attention: Full, or the family's own.
        is_flat: Whether patches are in one line for the rotary positions.
        learns: All, or labels alone.
    """

    title: str
    family: str
    optimizer: OptimizerName = "kalma"
    scan: str = "z-order"
    attention: str | None = None
    is_flat: bool = False
    learns: str = "all"


VARIANTS = {
    "llama-adamw": Variant("llama, AdamW", "llama", "adamw"),
    "llama": Variant("llama, Kalma", "llama"),
    "kalmagrove": Variant("kalmagrove", "kalmagrove"),
    "kalmagrove-full": Variant("kalmagrove, full attention", "kalmagrove", attention="full"),
    "kalmagrove-raster": Variant("kalmagrove, raster order", "kalmagrove", scan="raster"),
    "kalmagrove-line": Variant("kalmagrove, positions in one line", "kalmagrove", is_flat=True),
    "llama-labels": Variant("llama, AdamW, labels alone", "llama", "adamw", learns="labels"),
    "kalmagrove-labels": Variant("kalmagrove, labels alone", "kalmagrove", learns="labels"),
}


class _InOneLine(ImageSource):
    """The same images without rows and columns."""

    def examples(self, split: str) -> Iterator[Example]:
        for example in super().examples(split):
            yield replace(example, parts=tuple(replace(part, places=None) for part in example.parts))


def source_of(images: ImageSet, path: Path, variant: Variant) -> ImageSource:
    """The images as a variant sees them."""
    made = image_source(
        str(path),
        seed=0,
        patch_size=images.patch_size,
        scan=variant.scan,
        learns=variant.learns,  # type: ignore[arg-type]
    )
    assert isinstance(made, ImageSource)
    return _InOneLine(**vars(made)) if variant.is_flat else made


def fit(images: ImageSet, path: Path, name: str, *, rate: float, seed: int, epochs: float) -> dict[str, Any]:
    """Trains a variant; scores of the validation and test split.

    Args:
        images: The set.
        path: Where it is.
        name: Of the variant.
        rate: Multiplies the family's learning rates.
        seed: Of the model and the batches.
        epochs: Of the training images.
    """
    variant = VARIANTS[name]
    source = source_of(images, path, variant)
    folder = path.parent / f"{images.name}-packed"
    kind = f"{variant.scan}-{variant.learns}{'-line' if variant.is_flat else ''}"
    data = prepare_examples(source, folder / kind)
    # The image before its label: what the scores are of.
    in_order = prepare_examples(replace(source, shuffles=False), folder / f"{kind}-in-order")
    run = TrainingRun(_config(data, variant, rate, seed, epochs), data)
    best: dict[str, float] = {}
    weights: dict[str, Any] = {}
    seconds = 0.0
    for look in range(1, LOOKS + 1):
        started = time.perf_counter()
        try:
            while run.step < run.total_steps * look // LOOKS:
                run.train_step()
        except TrainingDiverged:
            break
        seconds += time.perf_counter() - started
        found = _scores(run.model, in_order, source.form, "valid")
        if not best or found[chief_of(found)] < best[chief_of(found)]:
            best, weights = found, copy.deepcopy(run.model.state_dict())
    if not best:
        return {"diverged": True}
    run.model.load_state_dict(weights)
    return {
        "valid": best,
        "test": _scores(run.model, in_order, source.form, "test"),
        "seconds": seconds,
        "parameters": count_parameters(run.model).total,
        "hidden_size": run.model.config.hidden_size,
        "images": run.step * BATCH_SIZE,
        "tokens": run.step * BATCH_SIZE * run.config.loop.context_length,
    }


def chief_of(scores: dict[str, float]) -> str:
    """The score that a method is tuned for."""
    return "bits_per_dimension" if "bits_per_dimension" in scores else "log_loss"


def _config(data: PackedExamples, variant: Variant, rate: float, seed: int, epochs: float) -> TrainConfig:
    """A model as near to PARAMETERS as its width can be chosen."""
    context = data.longest - 1
    steps = max(LOOKS, int(epochs * data.splits["train"].documents / BATCH_SIZE))
    options: dict[str, Any] = {"num_hidden_layers": LAYERS, "head_dim": HEAD_DIM}
    if variant.attention is not None:
        options["attention"] = variant.attention

    def apart(width: int) -> float:
        sizes = {**data.model_options(), **options, "hidden_size": width, "max_position_embeddings": context}
        try:
            return abs(count_parameters(build_empty(model_config(f"{variant.family}-tiny", sizes))).total - PARAMETERS)
        except UsageError:
            # The width cannot be divided into even heads.
            return math.inf

    width = min(range(2 * HEAD_DIM, 16 * HEAD_DIM, 2), key=apart)
    return TrainConfig(
        model=ModelConfig(preset=f"{variant.family}-tiny", hidden_size=width, **options),
        optim=OptimConfig(name=variant.optimizer, lr_scale=rate),
        loop=LoopConfig(
            tokens=steps * BATCH_SIZE * context, batch_size=BATCH_SIZE, context_length=context, seed=seed, device="cpu"
        ),
    )


def _scores(model: KalmaGroveForCausalLM, data: PackedExamples, form: ImageFormat, split: str) -> dict[str, float]:
    """Bits a pixel and channel, its placeholder's among them, and accuracy and nats of the labels given the images."""
    model.eval()
    count, nats, label_nats, right = data.splits[split].documents, 0.0, 0.0, 0
    classes = torch.tensor(form.class_tokens)
    with torch.no_grad(), composed_weights(model):
        for first in range(0, count, 100):
            rows = data.rows(split, range(first, min(first + 100, count)))
            inputs, targets = rows[:, :-1], rows[:, 1:]
            nats += sum(float(values.sum()) for values in model.nats_by_kind(inputs, targets).values())
            if not form.classes:
                continue
            hidden = model.model(inputs.tokens, features=inputs.features, axes=inputs.axes).last_hidden_state
            # Behind the label stands the end of the example, which is not predicted.
            logits = F.linear(model.before_head(hidden[:, -2]), model.output_weight())
            labels = targets.tokens[:, -2]
            label_nats += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((classes[logits[:, classes].argmax(dim=-1)] == labels).sum())
    model.train()
    found = {"accuracy": right / count, "log_loss": label_nats / count} if form.classes else {}
    if form.predicts_pixels:
        found["bits_per_dimension"] = bits_per_dimension((nats - label_nats) / count, form.dimensions)
    return found
