"""The names that options of images choose from; free of heavy imports, so that the command can list them."""

from typing import Literal

Scan = Literal["z-order", "raster"]
SCANS: tuple[Scan, ...] = ("z-order", "raster")
Learns = Literal["all", "labels"]
