"""``kalmagrove scale sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import (
    build,
    command_text,
    make_parser,
    open_text,
    parse,
    print_json,
    require_left_out,
    say,
)
from kalmagrove.commands.processes import check_worker_count
from kalmagrove.errors import UsageError
from kalmagrove.scaling.ladder import SweepConfig

if TYPE_CHECKING:
    from kalmagrove.data.packing import PackedText
from kalmagrove.training.config import config_of

SHORT = {"--data": "--data.source"}
EXAMPLES = """\
  kalmagrove scale sweep --config configs/scaling/smoke.yaml --out runs/ladder
  kalmagrove scale sweep --config configs/scaling/two-cores.yaml --dry_run
  kalmagrove scale sweep --config configs/scaling/eight-gpus.yaml --storage postgresql://host/name --out runs/ladder

--data is short for --data.source.
The same command in the same folder goes on where it stopped; started on several machines that see the folder, or with
one --storage, it divides the runs between them."""


def make_scale_sweep_parser() -> ArgumentParser:
    """The flags of ``kalmagrove scale sweep``."""
    parser = make_parser("scale sweep", "Train a ladder of models: sizes x tokens for each family.", EXAMPLES)
    parser.add_class_arguments(SweepConfig)
    parser.add_argument("--out", type=str, default=None, help="folder of the runs; needed unless --dry_run is given")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes on this machine; left out: one for each GPU, or each core"
    )
    parser.add_argument(
        "--storage", type=str, default=None, help="journal file or URL of an SQL database that all machines share"
    )
    parser.add_argument("--dry_run", action="store_true", help="print runs, FLOPs and hours, and train nothing")
    parser.add_argument(
        "--flops_per_second", type=float, default=None, help="of a worker, for --dry_run; left out: measured here"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Trains a ladder, or prints what it would cost."""
    parser = make_scale_sweep_parser()
    options = build(parser, parse(parser, words, SHORT))
    config = config_of(SweepConfig, options)
    check_worker_count(options.workers)
    if options.flops_per_second is not None and not 0 < options.flops_per_second < float("inf"):
        raise UsageError(f"--flops_per_second must be positive, got {options.flops_per_second:g}")
    if not options.dry_run:
        require_left_out(options, ("flops_per_second",), "is for --dry_run; leave it out")
    if options.out is None and not options.dry_run:
        raise UsageError("kalmagrove scale sweep needs --out, the folder of the runs")
    from kalmagrove.scaling.sweep import sweep
    from kalmagrove.training.environment import keep_freed_memory
    from kalmagrove.training.worker_processes import default_workers
    from kalmagrove.world import world_of_environment

    if world_of_environment().size > 1:
        raise UsageError("scale sweep has workers of its own (--workers); start it without torchrun")
    keep_freed_memory()
    data = open_text(config.data)
    workers = options.workers or default_workers()
    if options.dry_run:
        _show_costs(config, data, workers, options.flops_per_second, as_json=options.json)
        return
    facts = sweep(
        config,
        data,
        Path(options.out),
        workers=workers,
        storage=options.storage,
        command=command_text("scale sweep", words),
    )
    if options.json:
        print_json(facts)
        return
    for family in facts["tuning"] if config.trials > 1 else []:
        print(_tuning_line(family))
    print(f"{facts['runs']} of {facts['planned_runs']} runs in {options.out}/runs.jsonl")
    print(f"next: kalmagrove scale fit {options.out}")


def _tuning_line(tuning: dict[str, Any]) -> str:
    line = f"{tuning['family']}: learning rate x{tuning['chosen']:.3g}"
    if tuning["at_the_edge"]:
        line += ", at the edge of what was tried: more --trials would be better"
    check = tuning["check"]
    if check is not None:
        verdict = (
            "best of half, same and double" if check["best"] == 1 else f"x{check['best']:g} would have been better"
        )
        line += f"; at {check['size']} {verdict}" + ("" if check["best"] == 1 else f" by {check['lost']:.4f} nats")
    return line


def _show_costs(
    config: SweepConfig, data: PackedText, workers: int, flops_per_second: float | None, *, as_json: bool
) -> None:
    from kalmagrove.scaling.costs import cost_table, ladder_costs
    from kalmagrove.scaling.ladder import planned_runs

    runs = planned_runs(config, {})
    costs = ladder_costs(config, runs, data, flops_per_second=flops_per_second, say=say)
    if as_json:
        rows = [
            {
                "run": cost.rung.key,
                "parameters": cost.model.parameters,
                "flops": cost.flops,
                "hours": cost.seconds / 3600,
            }
            for cost in costs
        ]
        print_json({"runs": rows, "workers": workers})
        return
    print(cost_table(costs, workers=workers))
