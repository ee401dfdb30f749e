"""Images drawn by a model, patch by patch, with its decoding cache: new ones, or the rest of one that is begun."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kalmagrove.data.examples import Part
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.parts import FEATURE, image_part, label_part
from kalmagrove.data.images.patches import from_patches
from kalmagrove.data.images.sequences import sequences_of
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.image_predictions import check_model
from kalmagrove.modalities.patch import PatchModality
from kalmagrove.modalities.sequences import Sequences
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.scoring import evaluating
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import Precision, autocast


def draw_images(
    model: KalmaGroveForCausalLM,
    form: ImageFormat,
    count: int,
    *,
    generator: torch.Generator,
    label: str | None = None,
    begun: np.ndarray | None = None,
    kept: int = 0,
    temperature: float = 1.0,
    precision: Precision = "fp32",
) -> np.ndarray:
    """Draws images that go together in one batch.

    Args:
        model: Of images; its mode (training or not) is kept.
        form: Of the images.
        count: How many.
        generator: Of the draws; on the CPU.
        label: Their class; None is whatever comes.
        begun: An image of :meth:`ImageFormat.prepared` to begin with.
        kept: How many patches of it are kept, in the order of the scan.
        temperature: Below 1 likelier images; 0 gives means of the likeliest.
        precision: Of the forward.

    Returns:
        (count, height, width, channels), uint8.

    Raises:
        KalmaGroveError: The model did not learn images, or does not know the label.
    """
    check_model(model, form)
    if not form.predicts_pixels:
        raise KalmaGroveError("the model learnt labels alone, and cannot draw; train one on all of the images")
    if label is not None and label not in form.classes:
        known = f"it knows {', '.join(form.classes)}" if form.classes else "it knows no labels"
        raise KalmaGroveError(f"the model does not know the label {label!r}; {known}")
    before = [] if label is None else [label_part(form, label)]
    beginning = sequences_of(form, [[*before, _begun_part(form, begun, kept)]] * count).to(model.device)
    with evaluating(model), torch.inference_mode(), composed_weights(model), autocast(precision, model.device):
        patches = _draw(model, form, beginning, next_hidden(model), kept, generator, temperature)
    return from_patches(patches.cpu().numpy().astype(np.uint8), form.places, form.patch_size, form.channels)


def next_hidden(model: KalmaGroveForCausalLM) -> Callable[[Sequences], Tensor]:
    """A function from the tokens that are new since its last call to the hidden state (rows, hidden) of the last."""
    cache = model.new_cache()

    def look(new: Sequences) -> Tensor:
        hidden: Tensor = model.model(new.tokens, features=new.features, axes=new.axes, cache=cache).last_hidden_state
        return hidden[:, -1]

    return look


def _begun_part(form: ImageFormat, begun: np.ndarray | None, kept: int) -> Part:
    """The token that begins an image, and the patches that are kept."""
    whole = image_part(form, np.zeros((form.height, form.width, form.channels), np.uint8) if begun is None else begun)
    assert whole.places is not None
    return Part(
        whole.tokens[: 1 + kept],
        whole.weights[: 1 + kept],
        {name: values[:kept] for name, values in whole.features.items()},
        whole.places[: 1 + kept],
    )


def _draw(
    model: KalmaGroveForCausalLM,
    form: ImageFormat,
    beginning: Sequences,
    look: Callable[[Sequences], Tensor],
    kept: int,
    generator: torch.Generator,
    temperature: float,
) -> Tensor:
    """Patches of whole images, (images, patches, pixels)."""
    modality = model.model.modalities[FEATURE]
    assert isinstance(modality, PatchModality) and beginning.axes is not None
    count, first = len(beginning), beginning.tokens.shape[1] - 1 - kept
    places, following = (
        torch.from_numpy(values).to(model.device).float() for values in (form.places, form.next_places)
    )
    patches = [*beginning.features[FEATURE][:, first + 1 :, : form.pixels].unbind(dim=1)]
    hidden = look(beginning)
    for place in range(kept, len(places)):
        drawn = modality.sample(hidden, generator, temperature)
        patches.append(drawn)
        if place + 1 < len(places):
            features = torch.cat((drawn, following[place].expand(count, -1)), dim=1)[:, None]
            axes = beginning.axes[:, first : first + 1] + places[place] + 1
            tokens = torch.full((count, 1), form.patch_token, device=model.device)
            hidden = look(Sequences(tokens, torch.zeros_like(axes[..., 0]), {FEATURE: features}, axes))
    return torch.stack(patches, dim=1)
