"""How far the preparation of a text is: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

from kalmagrove.live_display import LiveDisplay, can_draw

_STAGES = {"reading": "reading the images", "tokenizer": "training the tokeniser", "packing": "tokenising and packing"}


class DataProgress(LiveDisplay):
    """Called with a stage and the bytes of text that it has read; used as a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        super().__init__(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(pulse_style="bar.pulse"),
                TextColumn("{task.fields[read]}"),
                TimeElapsedColumn(),
                console=console,
            )
            if can_draw(console)
            else None
        )
        self._task = None if self._live is None else self._live.add_task("preparing the text", total=None, read="")

    def __call__(self, stage: str, count: int) -> None:
        description, read = _STAGES.get(stage, stage), f"{count / 1e6:,.1f} MB"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description=description, read=read)
        else:
            self.print_now_and_then(f"{description}: {read}")
