"""`kalmagrove watch` beside a run that goes on, stops, goes on again and ends."""

import io
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from kalmagrove.cli import main
from kalmagrove.commands.run_view import age, draw, duration, line, view
from kalmagrove.commands.watch import follow_in_lines, follow_live
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.training.tracking import MetricsWriter
from kalmagrove.training.watching import FolderWatch, RunState

CONFIG: dict[str, Any] = {
    "model": {"preset": "llama"},
    "loop": {"tokens": 9600, "batch_size": 4, "context_length": 24},
}
SMALL = [
    "--preset", "llama", "--model.hidden_size", "32", "--model.num_hidden_layers", "1", "--model.head_dim", "8",
    "--loop.batch_size", "4", "--loop.context_length", "24", "--loop.device", "cpu", "--loop.precision", "fp32",
    "--data.vocab_size", "300",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record(step: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        "step": step, "tokens": 96 * step, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 32.0,
        "step_seconds": 3.0, "seconds": 3.0 * step, "peak_memory_bytes": 10**9,
    }  # fmt: skip


def shown(states: list[RunState], *, width: int = 80, is_table: bool = False, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, force_terminal=False)
    console.print(view(states, console, title="runs/book", is_table=is_table))
    stream.seek(0)
    return stream.read()


def test_a_finished_run_is_shown_and_watching_it_ends(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", str(text_file), "--tokens", "2k", "--out", "run", "--loop.log_every", "1", *SMALL]
    assert main(words) == 0
    error = capsys.readouterr().err
    assert re.search(r"^20 steps of 96 tokens on cpu, fp32, threads: \d+$", error, re.MULTILINE)
    progress = [text for text in error.splitlines() if text.startswith("training: step ")]
    assert len(progress) <= 3 and "step 1/20" in progress[0] and "step 20/20" in progress[-1]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert main(["watch", "run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run, finished: step 20/20 (100 %), loss ") and out.count("\n") == 1
    assert f"test perplexity {result['test']['perplexity']:.2f}" in out
    assert main(["watch", "run", "--once", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["status"], state["step"], state["total_steps"]) == ("finished", 20, 20)
    assert state["test_perplexity"] == result["test"]["perplexity"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "nowhere does not exist"), ("empty", "empty is not a run folder")]
)
def test_a_folder_that_is_no_run_is_one_line(folder: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert main(["watch", folder]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_values_that_are_no_numbers_are_shown_as_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(record(step)) for step in (1, 2)]
    wrong: list[Any] = [None, "x", [], 10**400, float("inf"), float("nan")]
    names = ["loss", "lr", "grad_norm", "seconds", "peak_memory_bytes", "tokens"]
    for places in (names, names[1:] + names[:1], names[3:] + names[:3]):
        lines.append(json.dumps(record(3) | dict(zip(places, wrong, strict=True))))
    folder = tmp_path / "run"
    open_run_folder(folder, CONFIG).release()
    (folder / "metrics.jsonl").write_text("\n".join([*lines, "[" * 100_000, ""]))
    assert main(["watch", "run", "--once"]) == 0
    assert capsys.readouterr().out == "run, stopped: step 3/100 (3 %), 32 tokens/s, left 0:04:51\n"
    assert main(["watch", "run", "--once", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    unknown = ("loss", "lr", "grad_norm", "seconds", "peak_memory_bytes", "test_perplexity")
    assert state["step"] == 3 and {name: state[name] for name in unknown} == dict.fromkeys(unknown)
    stream = io.StringIO()
    follow_live(FolderWatch(Path("run")), Console(file=stream, width=80, force_terminal=True), once=True, wait=never)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for part in ("step 3 of 100", "loss -", "gradient norm -", "learning rate -", "peak memory -", "elapsed -"):
        assert part in plain, part


def test_lines_come_once_a_minute_and_with_every_change_of_status(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run, now = open_run_folder(folder, CONFIG), 0.0
    metrics = MetricsWriter(run.metrics_path)
    metrics.write(record(1))
    lines: list[tuple[float, str]] = []

    def resume() -> None:
        nonlocal run, metrics
        run = open_run_folder(folder, CONFIG)
        run.truncate_metrics(40)
        metrics = MetricsWriter(run.metrics_path)

    def finish() -> None:
        run.write_result({"test": {"perplexity": 5.25}})
        run.release()

    events: dict[float, Callable[[], None]] = {90: lambda: run.release(), 200: resume, 250: finish}

    def wait(seconds: float) -> bool:
        nonlocal now
        now += seconds
        events.get(now, lambda: None)()
        if now < 90:
            metrics.write(record(int(now) + 1))
        elif 200 <= now < 250:
            metrics.write(record(int(now) - 159))
        return False

    follow_in_lines(
        FolderWatch(folder),
        once=False,
        as_json=False,
        say=lambda text: lines.append((now, text)),
        clock=lambda: now,
        wait=wait,
    )
    found = [(moment, *re.findall(r", (\w+): step (\d+)/100", text)[0]) for moment, text in lines]
    assert found == [
        (0, "running", "1"), (60, "running", "61"), (90, "stopped", "90"), (200, "running", "41"),
        (250, "finished", "90"),
    ]  # fmt: skip
    assert lines[1][1].endswith("loss 2.0000, 32 tokens/s, elapsed 0:03:03, left 0:01:57")
    assert lines[-1][1].endswith("test perplexity 5.25")


def test_json_lines_hold_one_run_each(tmp_path: Path) -> None:
    (tmp_path / "book" / "llama" / "lr-x1" / "seed-0").mkdir(parents=True)
    (tmp_path / "book" / "config.yaml").write_text(yaml.safe_dump({"models": "llama,gpt2", "loop": CONFIG["loop"]}))
    (tmp_path / "book" / "llama" / "lr-x1" / "seed-0" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    lines: list[str] = []
    follow_in_lines(FolderWatch(tmp_path / "book"), once=True, as_json=True, say=lines.append, wait=never)
    assert [json.loads(text)["name"] for text in lines] == ["llama/lr-x1/seed-0"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_panel_of_a_run_has_every_number_and_fits_its_terminal(encoding: str) -> None:
    losses = tuple((step, 6.0 / step**0.25) for step in range(1, 61))
    state = RunState(
        "mine", "running", 60, 100, 2.1556, 2.25, 0.0012, 0.75, 12345.6, 3723.0, 90061.0, 2 * 10**9, 50, 130.0, 2.0,
        None, losses, ((10, 3.4), (60, 2.25)),
    )  # fmt: skip
    text = shown([state], encoding=encoding)
    for part in (
        "running: mine", "step 60 of 100", "loss 2.1556", "validation 2.2500", "gradient norm 0.75", "12,346 tokens/s",
        "learning rate 0.0012", "peak memory 2.00 GB", "elapsed 1:02:03", "left 1 day, 1:01:01",
        "checkpoint at step 50 2 min ago", "last record 2 s ago",
    ):  # fmt: skip
        assert part in text, part
    rows = text.splitlines()
    assert {len(row) for row in rows} == {80}
    assert ("█" in text) is (encoding == "utf-8")


def test_a_run_that_has_just_begun_and_a_comparison_have_their_views() -> None:
    new = RunState("llama/lr-x1/seed-0", "running", 0, 100)
    text = shown([new])
    assert "step 0 of 100" in text and "no checkpoint yet" in text
    done = RunState("kalmagrove/lr-x1/seed-0", "finished", 100, 100, loss=1.5, losses=((50, 2.0), (100, 1.5)))
    text = shown([new, done], width=100, is_table=True)
    assert re.search(r"llama/lr-x1/seed-0 +running +0 % +- +- +- +-", text)
    assert re.search(r"kalmagrove/lr-x1/seed-0 +finished +100 % +1\.5000 ", text)
    assert max(map(len, text.splitlines())) <= 100
    # Brackets in a name are no markup.
    assert "[/bold]x" in shown([RunState("[/bold]x", "running", 0, 100)], is_table=True)
    # A comparison that has only just begun has no run to show.
    assert "run" in shown([], is_table=True)


def test_a_curve_falls_from_its_highest_to_its_lowest_and_ends_at_the_newest_step() -> None:
    curve = draw([(step, 9.0 - step) for step in range(1, 9)], 16, 16, 1, blocks=True)
    assert (curve.lines, curve.low, curve.high) == (("█▇▆▅▄▃▂▁        ",), 1.0, 8.0)
    two = draw([(step, 9.0 - step) for step in range(1, 9)], 8, 8, 2, blocks=True)
    assert two.lines == ("█▆▄▂    ", "████▇▅▃▁")
    assert draw([(1, 2.0)], 4, 4, 1, blocks=True).lines == ("▁   ",)
    # Two steps a column, and a column between two records that has none.
    assert draw([(1, 8.0), (2, 6.0), (7, 0.0)], 8, 4, 1, blocks=True).lines == ("███▁",)
    # What it fell from at the start does not flatten the rest.
    steep = draw([(1, 1000.0), *((step, 9.0 - step / 10) for step in range(2, 41))], 40, 40, 1, blocks=True)
    assert steep.high < 9.0 and steep.lines[0][0] == "█" and "▄" in steep.lines[0]


def test_ages_and_lines() -> None:
    assert [age(seconds) for seconds in (5, 200, 7300, 200000)] == ["5 s ago", "3 min ago", "2 h ago", "2 d ago"]
    times = [0, 59.9, 3661, 86400, 2 * 86400 + 1, 9e15]
    assert [duration(seconds) for seconds in times] == [
        "0:00:00", "0:00:59", "1:01:01", "1 day, 0:00:00", "2 days, 0:00:01", "104,166,666,666 days, 16:00:00",
    ]  # fmt: skip
    assert line(RunState("mine", "stopped", 0, 100)) == "mine, stopped: step 0/100 (0 %)"


def test_a_live_view_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run_folder(tmp_path / "run", CONFIG)
    MetricsWriter(run.metrics_path).write(record(1))
    monkeypatch.setenv("TERM", "xterm-256color")

    def finish(seconds: float) -> bool:
        run.write_result({"test": {"perplexity": 5.25}})
        return False

    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True)
    follow_live(FolderWatch(Path("run")), console, once=False, wait=finish)
    run.release()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert plain.rindex("finished: run") > plain.rindex("running: run")
    assert "test perplexity 5.25" in plain


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal_ctrl_c_ends_the_live_view_quietly(tmp_path: Path) -> None:
    import pty

    with open_run_folder(tmp_path / "run", CONFIG) as run:
        MetricsWriter(run.metrics_path).write(record(7))
        process, terminal = pty.fork()
        if process == 0:
            os.environ.update(TERM="xterm-256color", COLUMNS="80")
            os.execv(sys.executable, [sys.executable, "-m", "kalmagrove", "watch", "run"])
        output = read_until(terminal, b"step 7 of 100")
        MetricsWriter(run.metrics_path).write(record(8))
        output += read_until(terminal, b"step 8 of 100")
        os.write(terminal, b"\x03")
        output += read_until(terminal, None)
    assert exit_code(process) == 0
    os.close(terminal)
    assert b"Traceback" not in output and b"stopped" not in output
    assert not RunFolder(tmp_path / "run").result_path.exists()


def never(seconds: float) -> bool:
    """Waits for nothing, and nobody asks to end."""
    return False


def exit_code(process: int) -> int:
    """Of a process that ends by itself within some seconds; one that goes on is killed, so that the test fails."""
    deadline = time.monotonic() + 20
    ended, status = os.waitpid(process, os.WNOHANG)
    while not ended:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.05)
        ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status)


def read_until(terminal: int, wanted: bytes | None) -> bytes:
    """What a terminal shows up to some text, or to its end."""
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline and (
        wanted is None or wanted not in re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", output)
    ):
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            new = os.read(terminal, 65536)
        except OSError:  # How Linux says that the other side is gone.
            new = b""
        if not new:
            break
        output += new
    return output
