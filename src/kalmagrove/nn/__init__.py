"""The layers as plain modules: they need torch alone and can be lifted out one by one."""

from kalmagrove.nn.arnold import MultiResolutionAttention
from kalmagrove.nn.decoding import DecodingCache
from kalmagrove.nn.grove import Basis, GroveBank, GroveLinear
from kalmagrove.nn.layers import FeedForward, RMSNorm, RotaryEmbedding, ShortConvolution
from kalmagrove.nn.resolution import Resolution, Scale

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
    "Scale",
    "ShortConvolution",
]
