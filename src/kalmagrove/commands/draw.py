"""``kalmagrove draw``."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from kalmagrove.commands.parsing import check_new_file, make_parser, parse, print_json, require_left_out
from kalmagrove.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from kalmagrove.data.images.format import ImageFormat
    from kalmagrove.evaluation.modality_model import ModalityModel

KEPT = 0.5
EXAMPLES = """\
  kalmagrove draw runs/digits --label 3 --out threes.png
  kalmagrove draw runs/digits --every_label --count 8 --out digits.png
  kalmagrove draw runs/faces --begin face.png --kept 0.5 --out faces.png"""


def make_draw_parser() -> ArgumentParser:
    """The flags of ``kalmagrove draw``."""
    parser = make_parser("draw", "New images by a model of images, in one PNG.", EXAMPLES, configurable=False)
    parser.add_argument("model", type=str, help="a run folder or a model folder, trained on images")
    parser.add_argument("--out", type=Path, required=True, help="a new .png")
    parser.add_argument("--count", type=int, default=16, help="images, or with --every_label images of each label")
    parser.add_argument("--label", type=str, default=None, help="their class; left out: whatever comes")
    parser.add_argument("--every_label", action="store_true", help="a row for each class")
    parser.add_argument("--begin", type=str, default=None, help="an image whose beginning is kept, a PNG or JPEG")
    parser.add_argument(
        "--kept",
        type=float,
        default=None,
        help=f"share of that image's patches that are kept, in their order; left out: {KEPT:g}",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 likelier images; 0 takes means")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch_size", type=int, default=64, help="images that are drawn at once")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", type=str, default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", action="store_true", help="print what was drawn as JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Draws and writes the picture."""
    options = parse(make_draw_parser(), words)
    _check(options)
    from kalmagrove.data.images.format import ImageFormat
    from kalmagrove.evaluation.image_grid import image_grid, write_png
    from kalmagrove.evaluation.modality_model import open_modality_model

    opened = open_modality_model(options.model, device=options.device, precision=options.precision)
    form = ImageFormat.from_dict(opened.schema)
    images = _drawn(opened, form, options)
    columns = options.count if options.every_label else ceil(options.count**0.5)
    write_png(image_grid(images, columns, form.levels), options.out)
    if options.json:
        print_json({"out": str(options.out), "images": len(images), "label": options.label}, indent=None)
        return
    print(f"{options.out}: {len(images)} images of {form.height} x {form.width} pixels")


def _check(options: Namespace) -> None:
    if min(options.count, options.batch_size) < 1 or options.temperature < 0 or not 0 <= options.seed < 2**63:
        raise UsageError("need --count >= 1, --batch_size >= 1, --temperature >= 0 and --seed between 0 and 2**63")
    if options.kept is not None and not 0 <= options.kept < 1:
        raise UsageError(f"--kept must be at least 0 and below 1, got {options.kept}")
    if options.begin is None:
        require_left_out(options, ("kept",), "is of the image that --begin names; leave it out")
    if options.every_label and options.label is not None:
        raise UsageError("--every_label draws all labels; leave --label out")
    check_new_file(options.out, (".png",))


def _at_levels(pixels: np.ndarray, levels: int) -> np.ndarray:
    """A file's pixels, from 0 to 255, in the levels that a model knows."""
    import numpy as np

    return np.rint(pixels * ((levels - 1) / 255)).astype(np.uint8)


def _drawn(opened: ModalityModel, form: ImageFormat, options: Namespace) -> np.ndarray:
    """(images, height, width, channels); the draws of a label follow those of the label before it."""
    import numpy as np
    import torch

    from kalmagrove.data.images.reading import read_image
    from kalmagrove.evaluation.image_drawing import draw_images

    if options.every_label and not form.classes:
        raise UsageError("--every_label: the model knows no labels; leave it out")
    begun, kept = None, 0
    if options.begin is not None:
        begun = form.prepared(_at_levels(read_image(Path(options.begin)), form.levels), options.begin)
        kept = int(len(form.places) * (KEPT if options.kept is None else options.kept))
    generator = torch.Generator().manual_seed(options.seed)
    batches = [
        draw_images(
            opened.model,
            form,
            min(options.batch_size, options.count - first),
            generator=generator,
            label=label,
            begun=begun,
            kept=kept,
            temperature=options.temperature,
            precision=opened.precision,
        )
        for label in (form.classes if options.every_label else (options.label,))
        for first in range(0, options.count, options.batch_size)
    ]
    return np.concatenate(batches)
