"""What else classifies images: a small encoder of patches, a small convolutional network, logistic regression."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images_lab.data import ImageSet, arrays
from images_lab.ours import BATCH_SIZE, LOOKS, PARAMETERS, VARIANTS, source_of

TITLES = {"vit": "encoder of patches (ViT)", "cnn": "convolutional network", "logistic": "logistic regression"}
RATES = {"vit": (5e-4, 1e-3, 2e-3), "cnn": (1e-3, 2e-3, 4e-3), "logistic": (0.01, 0.1, 1.0)}
"""Peak rates of AdamW; of logistic regression the inverse strength of its penalty."""
WARMUP = 0.1


class PatchEncoder(nn.Module):
    """A Vision Transformer (arXiv:2010.11929) without a class token: the mean of its outputs is classified."""

    def __init__(self, shape: tuple[int, ...], classes: int, patch_size: int, width: int) -> None:
        super().__init__()
        height, breadth, channels = shape
        self.cut = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(height * breadth // patch_size**2, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (images, classes) of ``pixels`` (images, height, width, channels)."""
        patches = self.cut(pixels.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.layers(patches + self.positions)).mean(dim=1))
        return logits


class ConvolutionalNetwork(nn.Module):
    """Three convolutions, the second with a stride, each behind a norm; then a mean and a linear layer."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        sizes = [(shape[2], width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(inner, outer, 3, stride, padding=1), nn.BatchNorm2d(outer), nn.ReLU())
                for inner, outer, stride in sizes
            )
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (images, classes) of ``pixels`` (images, height, width, channels)."""
        logits: Tensor = self.head(self.layers(pixels.permute(0, 3, 1, 2)).mean(dim=(2, 3)))
        return logits


def fit(images: ImageSet, path: Path, name: str, *, rate: float, seed: int, epochs: float) -> dict[str, Any]:
    """Trains a method on the same images as our models see, as often; scores of the validation and test split."""
    source = source_of(images, path, VARIANTS["kalmagrove-labels"])
    parts = {split: arrays(source, split) for split in ("train", "valid", "test")}
    started = time.perf_counter()
    if name == "logistic":
        chances, parameters = _logistic(parts, rate)
    else:
        chances, parameters = _network(images, parts, name, rate, seed, epochs)
    seconds = time.perf_counter() - started
    found = {split: _scores(chances(parts[split][0]), parts[split][1]) for split in ("valid", "test")}
    return {**found, "seconds": seconds, "parameters": parameters}


Parts = dict[str, tuple[np.ndarray, np.ndarray]]
Fitted = tuple[Callable[[np.ndarray], np.ndarray], int]
"""From pixels to probabilities, and how many parameters that has."""


def _logistic(parts: Parts, strength: float) -> Fitted:
    from sklearn.linear_model import LogisticRegression

    pixels, labels = parts["train"]
    model = LogisticRegression(C=strength, max_iter=2000).fit(pixels.reshape(len(pixels), -1), labels)
    return lambda given: model.predict_proba(given.reshape(len(given), -1)), model.coef_.size + model.intercept_.size


def _network(images: ImageSet, parts: Parts, name: str, rate: float, seed: int, epochs: float) -> Fitted:
    pixels, labels = (torch.from_numpy(values) for values in parts["train"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _of_equal_size(tuple(pixels.shape[1:]), int(labels.max()) + 1, images.patch_size, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    steps = max(LOOKS, int(epochs * len(pixels) / BATCH_SIZE))
    best, weights = math.inf, model.state_dict()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        rising = min(1.0, (step + 1) / max(1.0, WARMUP * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * rising * 0.5 * (1 + math.cos(math.pi * step / steps))
        if len(order) < BATCH_SIZE:
            order = torch.cat((order, torch.randperm(len(pixels), generator=generator)))
        chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        F.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * LOOKS % steps < LOOKS:
            log_loss = _scores(_chances(model, parts["valid"][0]), parts["valid"][1])["log_loss"]
            if log_loss < best:
                best, weights = log_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return lambda given: _chances(model, given), _size(model)


@torch.no_grad()
def _chances(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Probabilities of the classes, (images, classes)."""
    model.eval()
    found: np.ndarray = model(torch.from_numpy(pixels)).softmax(dim=-1).numpy()
    model.train()
    return found


def _of_equal_size(shape: tuple[int, ...], classes: int, patch_size: int, name: str) -> nn.Module:
    """The width at which it has about as many parameters as our models."""

    def made(width: int) -> nn.Module:
        if name == "vit":
            return PatchEncoder(shape, classes, patch_size, width)
        return ConvolutionalNetwork(shape, classes, width)

    widths = range(16, 257, 16 if name == "vit" else 4)
    with torch.device("meta"):
        width = min(widths, key=lambda width: abs(_size(made(width)) - PARAMETERS))
    return made(width)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _scores(chances: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    own = chances[np.arange(len(labels)), labels].clip(min=1e-12)
    return {"accuracy": float((chances.argmax(axis=1) == labels).mean()), "log_loss": float(-np.log(own).mean())}
