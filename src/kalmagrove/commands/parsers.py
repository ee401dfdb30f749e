"""Every command with its parser, by name: for shell completion and for what is said about all flags."""

from __future__ import annotations

import importlib

from jsonargparse import ArgumentParser

PARSERS = {
    "compare": ("compare", "make_compare_parser"),
    "train": ("train", "make_train_parser"),
    "eval": ("evaluate", "make_eval_parser"),
    "generate": ("generate", "make_generate_parser"),
    "predict": ("predict", "make_predict_parser"),
    "draw": ("draw", "make_draw_parser"),
    "serve": ("serve", "make_serve_parser"),
    "info": ("info", "make_info_parser"),
    "export": ("export", "make_export_parser"),
    "report": ("report", "make_report_parser"),
    "report scaling": ("report", "make_report_scaling_parser"),
    "report claims": ("report", "make_report_claims_parser"),
    "data prepare": ("data", "make_data_parser"),
    "watch": ("watch", "make_watch_parser"),
    "adapt": ("adapt", "make_adapt_parser"),
    "compress": ("compress", "make_compress_parser"),
    "reproduce": ("reproduce", "make_reproduce_parser"),
    "completion": ("completion", "make_completion_parser"),
    "scale sweep": ("scale_sweep", "make_scale_sweep_parser"),
    "scale fit": ("scale_fit", "make_scale_fit_parser"),
    "scale plan": ("scale_plan", "make_scale_plan_parser"),
}
"""The module of each command, of one or two words, and what in it makes its parser."""


def short_names(command: str) -> dict[str, str]:
    """The short names of a command's long flags."""
    module = importlib.import_module(f"kalmagrove.commands.{PARSERS[command][0]}")
    names: dict[str, str] = getattr(module, "SHORT", {})
    return names


def parser_of(command: str) -> ArgumentParser:
    """The parser of a command."""
    module_name, make = PARSERS[command]
    parser: ArgumentParser = getattr(importlib.import_module(f"kalmagrove.commands.{module_name}"), make)()
    return parser
