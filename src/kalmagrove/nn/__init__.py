"""The paper's layers as plain modules: they need torch alone and can be lifted out one by one."""

from kalmagrove.nn.arnold import DecodingCache, MultiResolutionAttention, Resolution
from kalmagrove.nn.grove import Basis, GroveBank, GroveLinear
from kalmagrove.nn.layers import FeedForward, RMSNorm, RotaryEmbedding, ShortConvolution

__all__ = [
    "Basis",
    "DecodingCache",
    "FeedForward",
    "GroveBank",
    "GroveLinear",
    "MultiResolutionAttention",
    "RMSNorm",
    "Resolution",
    "RotaryEmbedding",
    "ShortConvolution",
]
