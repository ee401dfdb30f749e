"""A tiny source of examples: a grid of pixels in four patches, its brightness as a number, and a word for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from kalmagrove.data.examples import Example, Part
from kalmagrove.data.tokenizer import END_OF_TEXT, train_tokenizer

WORDS = ["<patch>", "<number>", "<dark>", "<bright>"]
LEVELS, BINS = 8, 4


def tiny_tokenizer() -> Tokenizer:
    tokenizer = train_tokenizer(["some text", END_OF_TEXT], 258)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS])
    return tokenizer


@dataclass
class TinySource:
    """Brightness decides number and word; any of the three parts can be predicted from the others."""

    count: int = 60
    shuffles: bool = True
    predicts_end: bool = False
    modality: str = "image"
    source: str = "tiny"
    tokenizer: Tokenizer = field(default_factory=tiny_tokenizer)
    inputs: dict[str, Any] = field(default_factory=lambda: {"seed": 0})
    schema: dict[str, Any] = field(default_factory=lambda: {"words": WORDS})

    def id_of(self, word: str) -> int:
        token = self.tokenizer.token_to_id(word)
        assert token is not None
        return int(token)

    @property
    def modalities(self) -> dict[str, dict[str, Any]]:
        return {
            "number": {"placeholder": self.id_of("<number>"), "bins": [BINS]},
            "patch": {
                "placeholder": self.id_of("<patch>"), "patch_size": 2, "channels": 1, "levels": LEVELS,
                "rows": 2, "columns": 2,
            },
        }  # fmt: skip

    def examples(self, split: str) -> Iterator[Example]:
        generator = np.random.Generator(np.random.PCG64(["train", "valid", "test"].index(split)))
        for _ in range(self.count if split == "train" else self.count // 4):
            level = int(generator.integers(0, LEVELS))
            yield self.example(level, generator)

    def example(self, level: int, generator: np.random.Generator) -> Example:
        pixels = np.clip(level + generator.integers(-1, 2, size=(4, 4)), 0, LEVELS - 1)
        patch, number = self.id_of("<patch>"), self.id_of("<number>")
        word = self.id_of("<bright>" if level >= LEVELS // 2 else "<dark>")
        features = np.array([[0, level / (LEVELS - 1), level - 3.5, level * BINS // LEVELS]])
        places = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        patches = np.hstack((pixels, [*places[1:], [2, 2]]))
        picture = Part(np.full(4, patch), np.ones(4, bool), {"patch": patches}, places)
        brightness = Part(np.array([number]), np.ones(1, bool), {"number": features})
        return Example((picture, brightness, Part(np.array([word]), np.ones(1, bool))), values=18, size=18)
