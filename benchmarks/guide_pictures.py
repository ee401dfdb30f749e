"""Draws the pictures of the guides from the package itself, so that they cannot differ from it.

python benchmarks/guide_pictures.py               docs/guides/arnold.png and docs/guides/grove.png
python benchmarks/guide_pictures.py --out pictures/ --preset kalmagrove-mini
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kalmagrove.models.accounting import build_empty
from kalmagrove.models.build import model_config
from kalmagrove.nn.grove import GroveLinear
from kalmagrove.nn.resolution import Resolution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_TOKENS = 48
SHOWN_GROUPS = {
    "the short convolution: 4 tokens": Resolution(1, 2, [(1, 4)]),
    "two scales: 12 tokens, then blocks of 4": Resolution(1, 2, [(1, 12), (4, None)]),
    "three scales: 8 tokens, blocks of 4, then of 8": Resolution(1, 2, [(1, 8), (4, 20), (8, None)]),
}
SCALES = ("#2b7cc4", "#d0601c", "#0f9671")
HIDDEN, LINE = "#eef1f5", "#ffffff"
OWNERS = ("#2b7cc4", "#d0601c", "#0f9671", "#b5689b", "#a17a00", "#3d95b5", "#7a6fd0", "#6f8f3a")
PRIVATE = "#dfe3e8"


def draw_arnold(path: Path) -> None:
    """Which tokens (columns) each position (rows) sees, a colour a scale; a key of several tokens is one bar."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(12, 4.4), dpi=160, layout="constrained")
    positions = torch.arange(SHOWN_TOKENS)
    subplots = figure.subplots(1, len(SHOWN_GROUPS), sharey=True)
    for axes, (title, group) in zip(subplots, SHOWN_GROUPS.items(), strict=True):
        axes.add_patch(Rectangle((0, 0), SHOWN_TOKENS, SHOWN_TOKENS, color=HIDDEN))
        for scale, (stride, _) in enumerate(group.scales):
            firsts = torch.arange(SHOWN_TOKENS // stride) * stride
            for position, key in group.visible(scale, positions, firsts).nonzero().tolist():
                corner = (key * stride + 0.08, position + 0.08)
                axes.add_patch(Rectangle(corner, stride - 0.16, 0.84, color=SCALES[scale], linewidth=0))
        axes.set_title(title, fontsize=10, loc="left")
        _token_axes(axes)
    figure.axes[0].set_ylabel("position that asks")
    figure.savefig(path, metadata={"Software": None})


def _token_axes(axes: Axes) -> None:
    ticks = range(0, SHOWN_TOKENS + 1, 8)
    axes.set_aspect("equal")
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.invert_yaxis()
    axes.set_xlabel("token that is seen")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_grove(preset: str, path: Path) -> None:
    """The tensors of each projection (rows) in each layer (columns): one colour is one tensor."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    model = build_empty(model_config(preset))
    layers = list(model.model.layers)
    names = [name for name, module in layers[0].named_modules() if name.endswith("_proj")]
    figure = Figure(figsize=(2.4 + 1.05 * len(layers), 0.9 + 0.52 * len(names)), dpi=160, layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        owners: dict[int, str] = {}
        for column, layer in enumerate(layers):
            module = layer.get_submodule(name)
            shared = _shared_tensors(module)
            for index, tensor in enumerate(shared or [None]):
                colour = PRIVATE if tensor is None else owners.setdefault(id(tensor), OWNERS[len(owners) % len(OWNERS)])
                height = 0.78 / max(1, len(shared))
                axes.add_patch(
                    Rectangle((column + 0.06, row + 0.11 + index * height), 0.7, height - 0.02, color=colour)
                )
            if isinstance(module, GroveLinear) and module.core_kind != "none":
                axes.add_patch(Rectangle((column + 0.8, row + 0.11), 0.1, 0.76, color="#30363d"))
    axes.set_xlim(0, len(layers))
    axes.set_ylim(len(names), 0)
    axes.set_yticks([row + 0.5 for row in range(len(names))], [name.rsplit(".", 1)[-1] for name in names])
    axes.set_xticks([column + 0.42 for column in range(len(layers))], [f"layer {n}" for n in range(len(layers))])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def _shared_tensors(module: nn.Module) -> list[nn.Parameter]:
    return [basis.weight for basis in (*module._left, *module._right)] if isinstance(module, GroveLinear) else []


def main() -> None:
    """Draws both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="kalmagrove-mini")
    parser.add_argument("--out", type=Path, default=Path("docs/guides"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    draw_arnold(options.out / "arnold.png")
    draw_grove(options.preset, options.out / "grove.png")


if __name__ == "__main__":
    main()
