"""Labels, bits and drawings of images: causality over patches, the cache, and what a trained model says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_models import CLASSES, LEVELS, bars, fresh_model, save_bars, train_bars
from PIL import Image
from torch import Tensor

from kalmagrove.data.example_store import SCHEMA
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.parts import FEATURE, image_part, label_part
from kalmagrove.data.images.sequences import sequences_of
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation import image_drawing
from kalmagrove.evaluation.image_drawing import draw_images
from kalmagrove.evaluation.image_grid import image_grid, write_png
from kalmagrove.evaluation.image_predictions import look_at, predict_images
from kalmagrove.evaluation.modality_model import ModalityModel, open_modality_model
from kalmagrove.modalities.patch import PatchModality
from kalmagrove.modalities.sequences import Sequences
from kalmagrove.models.decoder import KalmaGroveForCausalLM

FAMILIES = ("llama", "kalmagrove")
SCANS = ("z-order", "raster")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> ModalityModel:
    return train_bars(tmp_path_factory.mktemp("bars"), "kalmagrove", steps=500)


def pixels_of(seed: int, count: int) -> np.ndarray:
    return bars(count, seed)[0].astype(np.uint8)[..., None]


@torch.no_grad()
def nats_of_patches(model: KalmaGroveForCausalLM, form: ImageFormat, sequences: Sequences) -> Tensor:
    """Of every patch, (images, patches)."""
    hidden = model.model(sequences.tokens, features=sequences.features, axes=sequences.axes).last_hidden_state
    modality = model.model.modalities[FEATURE]
    assert isinstance(modality, PatchModality)
    is_patch = sequences.tokens[:, 1:] == form.patch_token
    nats = modality.nats(hidden[:, :-1][is_patch], sequences.features[FEATURE][:, 1:][is_patch])
    return nats.unflatten(0, (len(sequences), -1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", SCANS)
def test_no_patch_depends_on_later_ones(tmp_path: Path, family: str, scan: str) -> None:
    model, form = fresh_model(tmp_path, family, scan)
    sequences = sequences_of(form, [[image_part(form, image)] for image in pixels_of(1, 3)])
    before = nats_of_patches(model, form, sequences)
    for place in range(len(form.places)):
        features = sequences.features[FEATURE].clone()
        features[:, 2 + place, : form.pixels] = LEVELS - 1 - features[:, 2 + place, : form.pixels]
        after = nats_of_patches(model, form, replace(sequences, features={FEATURE: features}))
        assert torch.equal(after[:, :place], before[:, :place])
        assert (after[:, place] != before[:, place]).all()
        assert place + 1 == len(form.places) or (after[:, place + 1 :] != before[:, place + 1 :]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_columns_reach_the_model_and_words_keep_one_line(tmp_path: Path, family: str) -> None:
    model, form = fresh_model(tmp_path, family)
    sequences = sequences_of(form, [[label_part(form, "down"), image_part(form, pixels_of(1, 1)[0])]])
    assert sequences.axes is not None

    def hidden(axes: Tensor | None) -> Tensor:
        return model.model(sequences.tokens, features=sequences.features, axes=axes).last_hidden_state.detach()

    at_home = hidden(sequences.axes)
    shifted = sequences.axes.clone()
    shifted[:, 4:, 0] += 3
    assert not torch.allclose(hidden(shifted)[:, 4:], at_home[:, 4:], atol=1e-4)
    # The four tokens before the patches are in one line, and so it makes no difference that they have two axes.
    torch.testing.assert_close(hidden(None)[:, :4], at_home[:, :4])
    assert not torch.allclose(hidden(None)[:, 4:], at_home[:, 4:], atol=1e-4)


def without_cache(model: KalmaGroveForCausalLM) -> Callable[[Sequences], Tensor]:
    """What the cache must agree with: the whole sequence again for every patch."""
    seen: list[Sequences] = []

    def look(new: Sequences) -> Tensor:
        seen.append(new)
        axes = torch.cat([part.axes for part in seen if part.axes is not None], dim=1)
        features = {FEATURE: torch.cat([part.features[FEATURE] for part in seen], dim=1)}
        tokens = torch.cat([part.tokens for part in seen], dim=1)
        hidden: Tensor = model.model(tokens, features=features, axes=axes).last_hidden_state
        return hidden[:, -1]

    return look


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", SCANS)
def test_drawing_with_the_cache_is_drawing_without(
    tmp_path: Path, family: str, scan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, form = fresh_model(tmp_path, family, scan)
    begun = pixels_of(1, 1)[0]
    for terms in ({}, {"label": "down"}, {"begun": begun, "kept": 5}, {"begun": begun, "kept": 1, "label": "across"}):
        hidden: list[list[Tensor]] = []
        images = []
        for look in (image_drawing.next_hidden, without_cache):
            states: list[Tensor] = []

            def watched(model: KalmaGroveForCausalLM, look=look, states=states) -> Callable[[Sequences], Tensor]:
                inner = look(model)
                return lambda new: states.append(inner(new)) or states[-1]  # type: ignore[func-returns-value]

            with monkeypatch.context() as patch:
                patch.setattr(image_drawing, "next_hidden", watched)
                generator = torch.Generator().manual_seed(0)
                images.append(draw_images(model, form, 3, generator=generator, **terms))  # type: ignore[arg-type]
            hidden.append(states)
        assert len(hidden[0]) == len(hidden[1]) == len(form.places) - int(terms.get("kept", 0))
        torch.testing.assert_close(torch.stack(hidden[0]), torch.stack(hidden[1]), rtol=1e-4, atol=1e-4)
        assert np.array_equal(images[0], images[1])


def test_nats_are_those_of_the_training(learnt: ModalityModel) -> None:
    form = ImageFormat.from_dict(learnt.schema)
    pixels = pixels_of(2, 5)
    nats, probabilities = look_at(learnt.model, form, pixels)
    sequences = sequences_of(form, [[image_part(form, image)] for image in pixels])
    with torch.no_grad():
        by_kind = learnt.model.nats_by_kind(sequences[:, :-1], sequences[:, 1:])
    assert float(nats.sum()) == pytest.approx(float(sum(values.sum() for values in by_kind.values())), rel=1e-5)
    assert probabilities.shape == (5, 2)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))


def test_a_trained_model_knows_labels_and_pixels(learnt: ModalityModel, tmp_path: Path) -> None:
    found = predict_images(learnt, str(save_bars(tmp_path / "new.npz", 50, seed=9)), batch_size=16)
    assert len(found.rows) == found.scores["rows"] == 50
    assert list(found.rows[0]) == ["image", "label", "prediction", "probabilities", "bits_per_dimension"]
    assert found.rows[7]["image"] == "new.npz[7]" and set(found.rows[7]["probabilities"]) == set(CLASSES)
    assert found.scores["accuracy"] > 0.9 and found.scores["log_loss"] < 0.3
    # The noise alone is a bit a pixel, and all levels together would be 2.6.
    assert 1 < found.scores["bits_per_dimension"] < 1.35
    again = predict_images(learnt, str(tmp_path / "new.npz"), batch_size=50)
    for one, other in zip(found.rows, again.rows, strict=True):
        assert one["bits_per_dimension"] == pytest.approx(other["bits_per_dimension"], rel=1e-4)


def test_images_without_labels_have_no_scores_of_labels(learnt: ModalityModel, tmp_path: Path) -> None:
    found = predict_images(learnt, str(save_bars(tmp_path / "new.npz", 3, seed=9, labels=False)))
    assert "label" not in found.rows[0] and set(found.scores) == {"rows", "bits_per_dimension"}
    np.savez(tmp_path / "odd.npz", images=bars(2, 0)[0], labels=np.array(["across", "diagonal"]))
    odd = predict_images(learnt, str(tmp_path / "odd.npz"))
    assert odd.notes == ["1 images have a label that no training image had"] and "accuracy" in odd.scores


def test_images_that_are_not_like_the_learnt_ones_are_named(learnt: ModalityModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "size.npz", images=np.zeros((2, 6, 9)))
    with pytest.raises(KalmaGroveError, match=r"size\.npz\[0\] has 6 x 9 pixels, not 6 x 8"):
        predict_images(learnt, str(tmp_path / "size.npz"))
    Image.fromarray(np.full((6, 8), 77, np.uint8)).save(tmp_path / "level.png")
    with pytest.raises(KalmaGroveError, match=r"level\.png has the level 77"):
        predict_images(learnt, str(tmp_path / "level.png"))


def test_drawings_show_what_was_asked_for(learnt: ModalityModel) -> None:
    form = ImageFormat.from_dict(learnt.schema)

    def drawn(seed: int, **terms: object) -> np.ndarray:
        return draw_images(learnt.model, form, 24, generator=torch.Generator().manual_seed(seed), **terms)  # type: ignore[arg-type]

    for label, axis in (("across", 2), ("down", 1)):
        images = drawn(0, label=label)[..., 0]
        assert images.shape == (24, 6, 8) and images.dtype == np.uint8 and images.max() < LEVELS
        means = images.mean(axis=axis)
        assert ((means > 3).sum(axis=1) == 1).mean() > 0.6
    assert np.array_equal(drawn(1), drawn(1)) and not np.array_equal(drawn(1), drawn(2))
    assert len(np.unique(drawn(3, label="down"), axis=0)) > 12


def test_a_begun_image_is_finished(learnt: ModalityModel) -> None:
    form = ImageFormat.from_dict(learnt.schema)
    begun = np.zeros((6, 8, 1), np.uint8)
    begun[:, 2] = 5
    images = draw_images(learnt.model, form, 24, generator=torch.Generator().manual_seed(0), begun=begun, kept=4)
    assert np.array_equal(images[:, :4, :4], np.broadcast_to(begun[:4, :4], (24, 4, 4, 1)))
    assert (images[:, 4:, 2, 0].mean(axis=1) > 3).mean() > 0.8


def test_a_model_that_learnt_labels_alone_does_not_draw(tmp_path: Path) -> None:
    opened = train_bars(tmp_path, "llama", steps=120, learns="labels")
    found = predict_images(opened, str(save_bars(tmp_path / "new.npz", 40, seed=9)))
    assert found.scores["accuracy"] > 0.9 and set(found.scores) == {"rows", "accuracy", "log_loss"}
    form = ImageFormat.from_dict(opened.schema)
    with pytest.raises(KalmaGroveError, match="the model learnt labels alone"):
        draw_images(opened.model, form, 1, generator=torch.Generator())


def test_unknown_labels_and_other_models_are_refused(learnt: ModalityModel, tmp_path: Path) -> None:
    form = ImageFormat.from_dict(learnt.schema)
    with pytest.raises(KalmaGroveError, match="does not know the label 'round'; it knows across, down"):
        draw_images(learnt.model, form, 1, generator=torch.Generator(), label="round")
    data = str(save_bars(tmp_path / "new.npz", 3, seed=9))
    for change in ({"levels": 7}, {"class_tokens": [5000, 5001]}, {"patch_token": 1}):
        with pytest.raises(KalmaGroveError, match="do not belong together"):
            predict_images(replace(learnt, schema=learnt.schema | change), data)


def test_a_model_folder_without_its_schema_says_so(learnt: ModalityModel, tmp_path: Path) -> None:
    learnt.model.save_pretrained(tmp_path / "model")
    with pytest.raises(KalmaGroveError, match=SCHEMA):
        open_modality_model(str(tmp_path / "model"))


def test_a_grid_has_every_image_once(tmp_path: Path) -> None:
    images = np.arange(5)[:, None, None, None] * np.ones((5, 2, 3, 1), int)
    grid = image_grid(images, 2, levels=5)
    side = math.ceil(64 / 3)
    assert grid.shape == (8 * side, 7 * side, 1)
    small = grid[::side, ::side, 0]
    assert small[0, 0] == 0 and small[0, 4] == 64 and small[3, 0] == 128 and small[6, 0] == 255 and small[2, 0] == 255
    write_png(grid, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid[:, :, 0])
    colour = image_grid(np.zeros((1, 70, 2, 3), int), 1, levels=256)
    write_png(colour, tmp_path / "colour.png")
    assert np.asarray(Image.open(tmp_path / "colour.png")).shape == (70, 2, 3)
