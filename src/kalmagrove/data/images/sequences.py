"""Parts of images as the sequences that a model reads."""

from __future__ import annotations

from collections.abc import Sequence

from kalmagrove.data.examples import Part
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.parts import FEATURE
from kalmagrove.data.part_sequences import sequences_of_parts
from kalmagrove.modalities.sequences import Sequences


def sequences_of(form: ImageFormat, examples: Sequence[Sequence[Part]]) -> Sequences:
    """Examples with their parts in the order given, behind the token that begins each; (examples, 1 + most tokens)."""
    placeholders, sizes = {FEATURE: form.patch_token}, {FEATURE: form.feature_size}
    return sequences_of_parts(examples, end_token=form.end_token, placeholders=placeholders, sizes=sizes)
