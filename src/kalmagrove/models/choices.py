"""The names that a model configuration chooses from; free of heavy imports, so that the command can list them."""

from typing import Literal

Norm = Literal["rmsnorm", "layernorm"]
FeedForwardKind = Literal["swiglu", "gelu", "relu2"]
Positions = Literal["rotary", "learned"]
Attention = Literal["full", "arnold"]
Projections = Literal["dense", "grove"]
GroveParts = Literal["all", "attention", "feed_forward"]
Sharing = Literal["group", "cycle", "mix", "band"]
SharedSides = Literal["residual", "inner", "both"]
CoreKind = Literal["diagonal", "block", "dense"]
