"""What the sizes and scores of a comparison are called: a text has words and documents, a table values and rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Names of one kind of data.

    Attributes:
        by_value: Perplexity of what stands between spaces or in a cell.
        value: What that is, in a sentence.
        values: The same, as the head of a column.
        examples: What a split is counted in.
        whole: All of it.
    """

    by_value: str
    value: str
    values: str
    examples: str
    whole: str


TEXT = Wording("word perplexity", "whitespace-separated word", "Words", "Documents", "text")
_OTHERS = {
    "table": Wording("perplexity a value", "cell", "Values", "Rows", "table"),
    "image": Wording("perplexity a value", "pixel of a channel and each word of a label", "Values", "Images", "images"),
    "mixed": Wording("perplexity a value", "word, cell and pixel that is learnt", "Values", "Lines", "lines"),
}


def wording_of(modality: str) -> Wording:
    """The names for a kind of data; of one that is not known, those of a text."""
    return _OTHERS.get(modality, TEXT)
