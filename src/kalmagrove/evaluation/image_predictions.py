"""What a model of images says about pictures: the probability of each label, and the bits of a pixel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.parts import FEATURE, image_part, label_part
from kalmagrove.data.images.pictures import Picture, find_pictures
from kalmagrove.data.images.sequences import sequences_of
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.modality_model import ModalityModel, Predictions
from kalmagrove.modalities.patch import PatchModality, bits_per_dimension
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.scoring import evaluating
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import Precision, autocast


def predict_images(opened: ModalityModel, path: str, *, batch_size: int = 64) -> Predictions:
    """The label of every image, where the model knows labels, and what its pixels cost, where it knows those.

    Args:
        opened: A model of images.
        path: See `find_pictures`; the images of all splits.
        batch_size: Images of one forward.

    Returns:
        Rows with ``image``, its ``label`` where one is known, ``prediction`` and ``probabilities``, and
        ``bits_per_dimension``; scores ``rows``, ``accuracy``, ``log_loss`` (nats a label) and ``bits_per_dimension``.

    Raises:
        KalmaGroveError: An image cannot be read, or is not like those that the model knows.
    """
    form = ImageFormat.from_dict(opened.schema)
    check_model(opened.model, form)
    pictures = chain.from_iterable(pictures() for pictures in find_pictures(path).values())
    rows: list[dict[str, Any]] = []
    unknown = 0
    for names, labels, pixels in _batches(form, pictures, batch_size):
        nats, probabilities = look_at(opened.model, form, pixels, precision=opened.precision)
        unknown += sum(label is not None and label not in form.classes for label in labels)
        for name, label, own, chances in zip(names, labels, nats.tolist(), probabilities.tolist(), strict=True):
            rows.append({"image": name, **_described(form, label, own, chances)})
    if not rows:
        raise KalmaGroveError(f"{path} holds no image; give some")
    if all(row.get("label") is None for row in rows):
        for row in rows:
            row.pop("label", None)
    notes = [f"{unknown:,} images have a label that no training image had"] if unknown else []
    return Predictions(rows, _scores(form, rows), notes)


def check_model(model: KalmaGroveForCausalLM, form: ImageFormat) -> None:
    """That a model and a format belong together.

    Raises:
        KalmaGroveError: They do not, or an image does not fit into the model's context.
    """
    tokens = (form.end_token, form.image_token, form.patch_token, form.label_token, *form.class_tokens)
    options, own = form.patch_options(), model.config.modalities.get(FEATURE, {})
    if max(tokens) >= model.config.vocab_size or {name: own.get(name) for name in options} != options:
        raise KalmaGroveError("the model and its schema of images do not belong together; its folder is damaged")
    needed, context = len(form.places) + 2 + bool(form.classes), model.config.max_position_embeddings
    if needed > context:
        raise KalmaGroveError(f"an image needs {needed} tokens, the model's context is {context}")


def look_at(
    model: KalmaGroveForCausalLM, form: ImageFormat, pixels: np.ndarray, *, precision: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """What images cost and show.

    Args:
        model: Of images; its mode (training or not) is kept.
        form: Of the images.
        pixels: (images, height, width, channels), each of :meth:`ImageFormat.prepared`.
        precision: Of the forward.

    Returns:
        Nats of each image, its placeholders among them, (images,), and probabilities of the labels given the image,
        (images, classes); on the CPU. Where images were not learnt the nats mean nothing.
    """
    question = [label_part(form, None)] if form.classes else []
    sequences = sequences_of(form, [[image_part(form, own), *question] for own in pixels]).to(model.device)
    with evaluating(model), torch.inference_mode(), composed_weights(model), autocast(precision, model.device):
        hidden = model.model(sequences.tokens, features=sequences.features, axes=sequences.axes).last_hidden_state
        nats = _patch_nats(model, form, hidden, sequences.features[FEATURE])
        logits = model.precise_logits(hidden[:, -1])[:, list(form.class_tokens)]
    return nats.cpu(), logits.softmax(dim=-1).cpu()


def _patch_nats(model: KalmaGroveForCausalLM, form: ImageFormat, hidden: Tensor, features: Tensor) -> Tensor:
    """Nats of each image, (images,); the patches begin behind the two tokens that begin example and image."""
    count, modality = len(form.places), model.model.modalities[FEATURE]
    assert isinstance(modality, PatchModality)
    before, patches = hidden[:, 1 : 1 + count].flatten(0, 1), features[:, 2 : 2 + count].flatten(0, 1)
    nats = modality.nats(before, patches) - model.precise_logits(before).log_softmax(dim=-1)[:, form.patch_token]
    return nats.double().unflatten(0, (-1, count)).sum(dim=1)


def _batches(
    form: ImageFormat, pictures: Iterable[Picture], size: int
) -> Iterator[tuple[list[str], list[str | None], np.ndarray]]:
    """Names, labels and pixels; an image is read before the next picture is taken."""
    read = ((p.name, p.label, form.prepared(p.load(), p.name)) for p in pictures)
    while batch := list(islice(read, size)):
        names, labels, pixels = zip(*batch, strict=True)
        yield list(names), list(labels), np.stack(pixels)


def _described(form: ImageFormat, label: str | None, nats: float, chances: Sequence[float]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if form.classes:
        row["label"] = label
        row["prediction"] = form.classes[int(np.argmax(chances))]
        row["probabilities"] = dict(zip(form.classes, chances, strict=True))
    if form.predicts_pixels:
        row["bits_per_dimension"] = bits_per_dimension(nats, form.dimensions)
    return row


def _scores(form: ImageFormat, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores: dict[str, Any] = {"rows": len(rows)}
    known = [row for row in rows if row.get("label") in form.classes]
    if known:
        chances = [row["probabilities"][row["label"]] for row in known]
        scores["accuracy"] = float(np.mean([row["prediction"] == row["label"] for row in known]))
        scores["log_loss"] = -float(np.mean([math.log(max(chance, 1e-300)) for chance in chances]))
    if form.predicts_pixels:
        scores["bits_per_dimension"] = float(np.mean([row["bits_per_dimension"] for row in rows]))
    return scores
