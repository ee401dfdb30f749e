"""``kalmagrove compress``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import make_parser, parse, print_json, require_left_out, say
from kalmagrove.compression.options import CompressOptions
from kalmagrove.live_display import LiveDisplay, can_draw
from kalmagrove.quantities import parse_count

if TYPE_CHECKING:
    from kalmagrove.compression.compress import CompressResult

EXAMPLES = """\
  kalmagrove compress path/to/llama --keep 0.7 --data book.txt --out llama-0.7
  kalmagrove compress runs/book --keep 0.5 --data book.txt --refit 10m --out book-half
  kalmagrove compress smollm2.gguf --target_ppl 20 --data texts/ --out small --dense_out small-dense"""


def make_compress_parser() -> ArgumentParser:
    """The flags of ``kalmagrove compress``."""
    parser = make_parser(
        "compress",
        "A dense model as a Grove: its matrices become factors over shared bases, where that costs least.",
        EXAMPLES,
        configurable=False,
    )
    parser.add_argument("source", type=str, help="a model folder, a run folder or a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--keep", type=float, default=None, help="part of all parameters that stays, with embeddings")
    parser.add_argument("--rank", type=int, default=None, help="of every basis, instead of --keep")
    parser.add_argument(
        "--target_ppl", type=float, default=None, help="the smallest model with at most this perplexity, instead"
    )
    parser.add_argument(
        "--data", type=str, default=None, help="a text as for train, of the kind that the model is for; see the guide"
    )
    parser.add_argument(
        "--calibration_tokens",
        type=str,
        default=None,
        help=f"of the text that are looked at; left out: {CompressOptions.calibration_tokens:,}",
    )
    parser.add_argument("--context_length", type=int, default=None, help="tokens of a window; left out: at most 1,024")
    parser.add_argument(
        "--refit", type=str, default=None, help="train all factors afterwards: 10m is ten minutes, 500k are tokens"
    )
    parser.add_argument(
        "--batch_size", type=int, default=None, help=f"windows of a refit step; left out: {CompressOptions.batch_size}"
    )
    parser.add_argument("--dense_out", type=Path, default=None, help="a plain folder of the source's architecture, too")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", type=str, default="auto", help="auto, bf16 or fp32, of the model's products")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    """Compresses a model and prints what it costs before and after."""
    parsed = parse(make_compress_parser(), words)
    if parsed.refit is None:
        require_left_out(parsed, ("batch_size",), "is of --refit; leave it out")
    given = {name: value for name, value in parsed.as_dict().items() if value is not None}
    as_json = given.pop("json")
    if parsed.calibration_tokens is not None:
        given["calibration_tokens"] = parse_count(parsed.calibration_tokens)
    options = CompressOptions(**given)
    if options.data is None:
        say("calibrating on the built-in corpus, Python code: give --data with the kind of text that the model is for")
    from kalmagrove.compression.compress import compress

    with _Bar() as progress:
        result = compress(options, progress)
    if as_json:
        print_json(result.to_dict())
        return
    _show(result, options)


def _show(result: CompressResult, options: CompressOptions) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(options.out))
    for heading in ("", "before", "after", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    before, after = result.before.to_dict(), result.after.to_dict()
    for name, unit in _ROWS.items():
        old, new = before[name], after[name]
        form = f"{{:,.{2 if name == 'perplexity' else 0}f}}"
        table.add_row(name.replace("_", " ") + unit, form.format(old), form.format(new), f"{new / old:.3f}x")
    console = Console()
    console.print(table)
    console.print(f"{result.factorised} matrices are factors, {result.shared} of them share a basis", highlight=False)
    if result.cut:
        text = f"{result.cut} feed-forwards keep {result.units_kept:.0%} of their units"
        console.print(text, highlight=False)
    if result.refit is not None:
        console.print(
            f"refit: {result.refit.loss_before:.4f} to {result.refit.loss_after:.4f} nats a token, "
            f"{result.refit.tokens:,} tokens in {result.refit.seconds:.0f} s",
            highlight=False,
        )


_ROWS = {
    "parameters": "",
    "bytes": "",
    "flops_per_token": "",
    "perplexity": " (held-out part of the text)",
    "tokens_per_second": "",
}


class _Bar(LiveDisplay):
    """Called with a stage and the part of it that is done: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        super().__init__(Progress(console=console) if can_draw(console) else None)
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: float) -> None:
        if self._live is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._live.add_task(stage, total=1.0)
            self._live.update(self._tasks[stage], completed=done)
        else:
            self.print_now_and_then(f"{stage}: {done:.0%}")
