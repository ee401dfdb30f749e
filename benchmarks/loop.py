"""What the training loop costs beside the steps, how it compares with other loops, and how soon its first step is done.

    python benchmarks/loop.py shares                each part of the loop as a share of a step, for two models
    python benchmarks/loop.py peers --litgpt_python OTHER/bin/python
                                                    tokens a second beside transformers.Trainer, litgpt, a plain loop
    python benchmarks/loop.py start                 seconds from the command to the end of the first step

All train on --data (left out: the built-in corpus), packed into --data_folder once. litgpt needs an environment of its
own: python -m venv OTHER; OTHER/bin/pip install litgpt. Writes JSON with --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kalmagrove.commands.parsing import open_data
from kalmagrove.data.packing import PackedText
from kalmagrove.files import write_json_atomic
from kalmagrove.training.config import DataConfig
from kalmagrove.training.environment import describe_environment


def _shares(data: PackedText, options: argparse.Namespace) -> list[dict[str, Any]]:
    from loop_lab.shares import measure_shares, show_shares

    results = []
    for preset in options.presets:
        results.append(measure_shares(preset, data, options))
        show_shares(results[-1])
    return results


def _peers(data: PackedText, options: argparse.Namespace) -> list[dict[str, Any]]:
    from loop_lab.peers import measure_peers, show_peers

    rows = measure_peers(data, options)
    show_peers(rows)
    return rows


def _start(data: PackedText, options: argparse.Namespace) -> list[dict[str, Any]]:
    from loop_lab.start import measure_start, show_start

    rows = measure_start(options.presets, ["--data", str(data.folder)], options.rounds)
    show_start(rows)
    return rows


PARTS = {"shares": _shares, "peers": _peers, "start": _start}


def main() -> None:
    """Measures one part and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data")
    common.add_argument("--data_folder", default="runs/data")
    common.add_argument("--out", type=Path)
    parts = parser.add_subparsers(dest="part", required=True)
    shares = parts.add_parser("shares", parents=[common])
    shares.add_argument("--presets", nargs="+", default=["llama-mini", "kalmagrove-mini"])
    shares.add_argument("--steps", type=int, default=80)
    shares.add_argument("--context_length", type=int, default=256)
    shares.add_argument("--batch_size", type=int, default=16)
    peers = parts.add_parser("peers", parents=[common])
    peers.add_argument("--preset", default="llama-small", help="of the family llama")
    peers.add_argument("--context_length", type=int, default=512)
    peers.add_argument("--batch_size", type=int, default=8)
    peers.add_argument("--rounds", type=int, default=8)
    peers.add_argument("--steps_a_turn", type=int, default=3)
    peers.add_argument("--litgpt_python", type=Path, help="python of an environment with litgpt")
    start = parts.add_parser("start", parents=[common])
    start.add_argument("--presets", nargs="+", default=["llama-mini", "kalmagrove-mini"])
    start.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    data = open_data(DataConfig(source=options.data, folder=options.data_folder))
    results = PARTS[options.part](data, options)
    if options.out is not None:
        described = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        record = {"options": described, "environment": describe_environment(), "results": results}
        write_json_atomic(options.out, record)


if __name__ == "__main__":
    main()
