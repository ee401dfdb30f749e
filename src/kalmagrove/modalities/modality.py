"""What a modality is: how its elements come into the decoder, and what a hidden state says about the next one."""

from __future__ import annotations

from torch import Tensor, nn


class Modality(nn.Module):
    """An input encoder and an output head for one kind of element.

    In a sequence of tokens an element is a placeholder token with a feature vector beside it.

    Args:
        hidden_size: Width of the decoder.
        placeholder: The token that stands for an element.

    Attributes:
        feature_size: Numbers in a feature vector.
        macs: Multiply-accumulates of encoder and head for one element.
    """

    feature_size: int
    macs: int

    def __init__(self, hidden_size: int, placeholder: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.placeholder = placeholder

    def encode(self, features: Tensor) -> Tensor:
        """What the decoder reads, (elements, hidden), for ``features`` (elements, feature_size)."""
        raise NotImplementedError

    def nats(self, hidden: Tensor, features: Tensor) -> Tensor:
        """What each element costs, (elements,), given the hidden states (elements, hidden) of the tokens before."""
        raise NotImplementedError
