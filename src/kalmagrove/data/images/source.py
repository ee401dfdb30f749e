"""Images, with labels and captions where they have them, as a source of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from kalmagrove.data.examples import Example, ExampleSource
from kalmagrove.data.images.choices import SCANS, Learns, Scan
from kalmagrove.data.images.fitting import parse_size
from kalmagrove.data.images.format import MODALITY, ImageFormat
from kalmagrove.data.images.parts import FEATURE, caption_part, image_part, label_part
from kalmagrove.data.images.patches import choose_patch_size
from kalmagrove.data.images.pictures import Picture, find_pictures
from kalmagrove.data.images.survey import Survey, survey_pictures
from kalmagrove.data.tokenizer import SMALLEST_VOCABULARY, end_of_text_id, train_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE, PATCH, LABEL, CAPTION, CAPTION_END = "<image>", "<patch>", "<label>", "<caption>", "</caption>"


@dataclass
class ImageSource:
    """Images in patches, each with its label and its caption in any order: an `ExampleSource`."""

    source: str
    form: ImageFormat
    survey: Survey
    tokenizer: Tokenizer
    modalities: dict[str, dict[str, Any]]
    schema: dict[str, Any]
    shuffles: bool
    inputs: dict[str, Any]
    modality: str = MODALITY
    predicts_end: bool = False

    def examples(self, split: str) -> Iterator[Example]:
        """The images of a split; those without a label are left out where labels alone are learnt.

        Raises:
            KalmaGroveError: An image cannot be read, or does not have the training images' levels.
        """
        for picture in self.survey.pictures(find_pictures(self.source), split):
            if picture.label is not None or self.form.predicts_pixels:
                yield self._example(picture)

    def _example(self, picture: Picture) -> Example:
        pixels = self.form.prepared(picture.load(), picture.name)
        parts = [image_part(self.form, pixels)]
        if picture.caption is not None and self.form.caption_tokens is not None:
            parts.append(caption_part(self.form, _text_tokens(self.tokenizer, picture.caption)))
        if picture.label is not None:
            parts.append(label_part(self.form, picture.label))
        dimensions = self.form.dimensions if self.form.predicts_pixels else 1
        return Example(tuple(parts), values=dimensions, size=dimensions)


def image_source(
    path: str,
    *,
    seed: int,
    patch_size: int | None = None,
    scan: Scan = "z-order",
    image_size: str | None = None,
    learns: Learns = "all",
    caption_vocab_size: int = 1024,
    progress: Callable[[str, int], None] | None = None,
) -> ExampleSource:
    """The images of a folder, a JSONL or an .npz, ready to be packed.

    Where images have labels or captions, the parts of an example are learnt in any order: the label of an image and
    the image of a label.

    Args:
        path: See `find_pictures`.
        seed: Divides the images where they come without splits.
        patch_size: Pixels of a patch's side; None is the largest that divides both sides of the image and is at most
            the root of the shorter one.
        scan: The order of the patches: z-order, so that neighbours of the sequence make squares, or raster.
        image_size: Such as 32 or 32x48, height before width: every image is scaled to cover it and cut to it in the
            middle. None is the size that all images have.
        learns: all, or the labels alone: the model then says nothing about pixels and learns to classify faster.
        caption_vocab_size: Vocabulary of the byte-level BPE that is trained on the captions of the training images.
        progress: Called now and then with ``"reading"`` and the bytes of pixels that were read.

    Raises:
        KalmaGroveError: An image cannot be read, or they do not go together; the text names it.
        UsageError: An option is out of its range, or does not fit the images.
    """
    if scan not in SCANS or learns not in get_args(Learns) or caption_vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"data.scan must be one of {', '.join(SCANS)}, data.learns all or labels, and caption_vocab_size at least "
            f"{SMALLEST_VOCABULARY}; got {scan}, {learns} and {caption_vocab_size}"
        )
    size = None if image_size is None else parse_size(image_size)
    found = find_pictures(path)
    survey = survey_pictures(found, source=path, size=size, seed=seed, progress=progress)
    if learns == "labels" and not survey.classes:
        raise UsageError(f"{path} has no labels to learn; leave data.learns out, or give every image a class")
    patch_size = choose_patch_size(survey.height, survey.width, patch_size)
    captions = (picture.caption or "" for picture in survey.pictures(found, "train"))
    has_captions = survey.has_captions and learns == "all"
    tokenizer = train_tokenizer(captions if has_captions else (), caption_vocab_size)
    tokenizer.encode_special_tokens = True
    looks = {"patch_size": patch_size, "scan": scan, "is_fitted": size is not None, "predicts_pixels": learns == "all"}
    form = image_format(survey, tokenizer, looks, has_captions=has_captions)
    options = {"patch_size": patch_size, "scan": scan, "image_size": size, "learns": learns}
    return ImageSource(
        path,
        form,
        survey,
        tokenizer,
        {FEATURE: form.patch_options()},
        form.to_dict(),
        shuffles=learns == "all" and (has_captions or bool(form.classes)),
        inputs={"content": survey.content, "seed": seed, "caption_vocab_size": caption_vocab_size, **options},
    )


def image_format(survey: Survey, tokenizer: Tokenizer, looks: dict[str, Any], *, has_captions: bool) -> ImageFormat:
    """The format, with tokens that no text is encoded as: they are added behind those of texts."""
    names = [IMAGE, PATCH, LABEL, *(f"<label:{name}>" for name in survey.classes)]
    names += [CAPTION, CAPTION_END] if has_captions else []
    if tokenizer.add_special_tokens(names) != len(names):
        raise KalmaGroveError(f"the captions' vocabulary holds one of {', '.join(names[:8])}; choose a smaller one")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    image, patch, label, *rest = (vocabulary[name] for name in names)
    return ImageFormat(
        height=survey.height,
        width=survey.width,
        channels=survey.channels,
        levels=survey.levels,
        **looks,
        classes=survey.classes,
        end_token=end_of_text_id(tokenizer),
        image_token=image,
        patch_token=patch,
        label_token=label,
        class_tokens=tuple(rest[: len(survey.classes)]),
        caption_tokens=(rest[-2], rest[-1]) if has_captions else None,
    )


def _text_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's tokens; what looks like a special token in it is text like any other."""
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return tokens
