"""Where the tokens of a forward stand in their texts, and what is remembered of those before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = ("padding", "document_start", "axes")
"""What a cache keeps of each row beside its layers."""


@dataclass(frozen=True)
class Placement:
    """Where the tokens of a forward stand.

    Attributes:
        seen: Tokens of the batch before them, padding included.
        positions: Counted from the first token of each row's text: (sequence,), or in a padded batch
            (batch, sequence), where padding is negative.
        padding: Tokens before each row's text, (batch,); None is none.
        starts: First position that each token may see, (batch, sequence); None is 0.
        axes: Row and column of every token of the texts so far, these among them, (batch, seen + sequence, 2): what
            rotary positions turn by, in the place of ``positions``; None is one line.
    """

    seen: int
    positions: Tensor
    padding: Tensor | None = None
    starts: Tensor | None = None
    axes: Tensor | None = None

    def turns(self, positions: Tensor) -> Tensor:
        """What rotary positions turn the tokens at ``positions`` by: these, or (batch, tokens, 2) on two axes."""
        return positions if self.axes is None else self.axes[:, positions]

    @property
    def reach(self) -> Tensor | None:
        """How many tokens back each token may look, (batch, sequence); None is as far as the text goes."""
        return None if self.starts is None else self.positions - self.starts


def placement(
    length: int,
    device: torch.device,
    *,
    seen: int = 0,
    padding: Tensor | None = None,
    document_starts: Tensor | None = None,
    axes: Tensor | None = None,
) -> Placement:
    """The placement of ``length`` tokens that follow ``seen`` others.

    Args:
        length: Tokens.
        device: Of the model.
        seen: Tokens before them, padding included.
        padding: Tokens before each row's text, (batch,).
        document_starts: Position of the first token of each token's document, (batch, sequence).
        axes: Of all tokens so far, (batch, seen + length, 2); for texts without padding.
    """
    positions = torch.arange(seen, seen + length, device=device)
    if padding is None:
        return Placement(seen, positions, None, document_starts, axes)
    positions = positions - padding[:, None]
    # A padding token sees itself alone: with nothing to see its values would not be numbers.
    starts = torch.zeros_like(positions) if document_starts is None else document_starts
    return Placement(seen, positions, padding, torch.where(positions < 0, positions, starts))


def document_starts(is_end: Tensor, positions: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where each token's document begins.

    Args:
        is_end: Whether a token is the last of its document, (batch, sequence).
        positions: Of the tokens, (sequence,) or (batch, sequence).
        before: Where the document of the first token begins, (batch,); None is 0.

    Returns:
        The starts, (batch, sequence), and what ``before`` is for the tokens that follow.
    """
    after_end = torch.where(is_end, positions + 1, 0).clamp(min=0)
    first = after_end.new_zeros(len(is_end)) if before is None else before
    starts = torch.cat((first[:, None], after_end), dim=1).cummax(dim=1).values
    return starts[:, :-1], starts[:, -1]


class DecodingCache:
    """What the layers of a model remember while text is decoded.

    Each layer keeps, in a dictionary of tensors whose first axis is the batch, only what its resolutions can still
    see: a window of tokens, the pooled keys of finished blocks, the tokens of the block that is not finished,
    and the short convolution's last inputs.

    Attributes:
        layers: The tensors of each layer, by name.
        length: Tokens seen so far, padding included.
        padding: Tokens before each row's text, (batch,); None is none.
        document_start: Where the document of the next token begins, (batch,); None where documents are not told apart.
        axes: Row and column of all tokens seen so far, (batch, tokens, 2); None is one line.
    """

    # Read by transformers' generate(): no fixed size, no linear-attention layer.
    is_compileable = False
    is_linear = (False,)

    def __init__(self, num_layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
        self.length = 0
        self.padding: Tensor | None = None
        self.document_start: Tensor | None = None
        self.axes: Tensor | None = None

    def add_axes(self, axes: Tensor) -> Tensor:
        """Remembers rows and columns of new tokens, (batch, sequence, 2); returns those of all.

        Raises:
            ValueError: Earlier tokens had none.
        """
        known = 0 if self.axes is None else self.axes.shape[1]
        if known != self.length:
            raise ValueError(f"{self.length} tokens were seen and {known} of them with axes; give axes to all or none")
        self.axes = axes if self.axes is None else torch.cat((self.axes, axes), dim=1)
        return self.axes

    def following_axes(self, length: int) -> Tensor | None:
        """Rows and columns of ``length`` words that follow, (batch, length, 2): on from the largest so far.

        None where the tokens so far are in one line.
        """
        if self.axes is None:
            return None
        first = self.axes.amax(dim=(1, 2)) + 1
        words = first[:, None] + torch.arange(length, device=first.device)
        return words[..., None].expand(-1, -1, 2)

    def get_seq_length(self, layer_index: int = 0) -> int:
        """Tokens seen so far, the same for every layer."""
        return self.length

    def reorder_cache(self, beam_index: Tensor) -> None:
        """Selects rows of the batch, as beam search needs."""
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = tensor.index_select(0, beam_index.to(tensor.device))
        for name in _ROWS:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, beam_index.to(tensor.device)))

    def num_bytes(self) -> int:
        """Bytes that the layers hold now."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, which safetensors can store; :meth:`from_tensors` is the way back."""
        tensors = {
            f"layers.{i}.{name}": t.contiguous() for i, layer in enumerate(self.layers) for name, t in layer.items()
        }
        tensors["length"] = torch.tensor(self.length)
        tensors["num_layers"] = torch.tensor(len(self.layers))
        return tensors | {n: t for n in _ROWS if (t := getattr(self, n)) is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DecodingCache:
        """The cache of :meth:`to_tensors`; the tensors are taken as they are.

        Raises:
            ValueError: A name is missing or is not a cache's.
        """
        missing = {"length", "num_layers"} - tensors.keys()
        if missing:
            raise ValueError(f"this is not a decoding cache: {', '.join(sorted(missing))} is missing")
        cache = cls(int(tensors["num_layers"]))
        cache.length = int(tensors["length"])
        for name, tensor in tensors.items():
            if name in ("length", "num_layers"):
                continue
            if name in _ROWS:
                setattr(cache, name, tensor)
                continue
            kind, _, rest = name.partition(".")
            index, _, own_name = rest.partition(".")
            if kind != "layers" or not index.isdigit() or int(index) >= len(cache.layers) or not own_name:
                raise ValueError(f"this is not a decoding cache: it has a tensor {name!r}")
            cache.layers[int(index)][own_name] = tensor
        return cache
