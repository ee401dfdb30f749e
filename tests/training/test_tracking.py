"""Records are whole lines of JSON, and progress goes to its stream in the way the stream can show."""

import io
import json
import math
import re
from pathlib import Path

import pytest

from kalmagrove.training.tracking import MetricsWriter, ProgressBar


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test sets."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_each_record_is_complete_in_the_file_when_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    writer = MetricsWriter(path)
    assert not path.exists()
    writer.write({"step": 1, "loss": 2.5})
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n'
    writer.write({"step": 2, "text": "two\nlines"})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    MetricsWriter(tmp_path / "m.jsonl").write({"loss": math.nan, "norms": [1.0, math.inf], "ok": True})
    assert (tmp_path / "m.jsonl").read_text() == '{"loss": null, "norms": [1.0, null], "ok": true}\n'


def test_a_later_writer_appends_and_removes_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsWriter(path).write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_stream_that_is_no_terminal_gets_a_plain_line_at_once_then_one_a_minute_and_the_last() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar(100, description="tree", stream=stream, clock=clock) as bar:
        for step in range(1, 8):
            clock.seconds += 18
            bar.update(step, 4.0 - step / 8, 1234.5)
    assert stream.getvalue().splitlines() == [
        "tree: step 1/100, loss 3.8750, 1,234 tokens/s, elapsed 0:00:18, left 0:29:42",
        "tree: step 5/100, loss 3.3750, 1,234 tokens/s, elapsed 0:01:30, left 0:28:30",
        "tree: step 7/100, loss 3.1250, 1,234 tokens/s, elapsed 0:02:06, left 0:27:54",
    ]


def test_a_plain_line_comes_once_a_minute_however_fast_the_steps_are() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar(10**6, stream=stream, clock=clock) as bar:
        for step in range(1, 100_001):
            clock.seconds += 1 / 512
            bar.update(step, 2.0, 1.0)
    steps = [int(re.search(r"step (\d+)/", line)[1]) for line in stream.getvalue().splitlines()]  # type: ignore[index]
    assert steps == [1, 1 + 60 * 512, 1 + 2 * 60 * 512, 1 + 3 * 60 * 512, 100_000]


def test_the_time_left_of_a_resumed_run_counts_only_its_own_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar(100, start_step=80, stream=stream, clock=clock) as bar:
        clock.seconds += 60
        bar.update(80, math.nan, 0.0)
        clock.seconds += 60
        bar.update(90, 2.0, 10.0)
    first, second = stream.getvalue().splitlines()
    assert first == "training: step 80/100, loss nan, 0 tokens/s, elapsed 0:01:00, left unknown"
    assert second.endswith("elapsed 0:02:00, left 0:02:00")


def test_nothing_is_printed_for_a_run_without_steps() -> None:
    stream = io.StringIO()
    with ProgressBar(10, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_loss_speed_and_times(terminal: Terminal) -> None:
    with ProgressBar(40, description="tree", stream=terminal) as bar:
        bar.update(20, 2.5, 1200.0)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"tree \S+ +20/40 loss 2\.5000 1,200 tokens/s \d:\d\d:\d\d \S+", text.splitlines()[-1])
    assert "step 20/40" not in text


def test_the_bar_starts_at_the_step_from_which_a_run_resumes(terminal: Terminal) -> None:
    with ProgressBar(40, start_step=30, stream=terminal):
        pass
    assert "30/40" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with ProgressBar(40, stream=terminal) as bar:
        bar.update(20, 2.5, 1200.0)
    has_color = re.search(r"\x1b\[(\d+;)*(3[0-7]|38;[0-9;]+)m", terminal.getvalue()) is not None
    assert has_color is not no_color


def test_a_quiet_bar_and_a_dumb_terminal_get_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProgressBar(40, quiet=True, stream=terminal) as bar:
        bar.update(20, 2.5, 1200.0)
    monkeypatch.setenv("TERM", "dumb")
    with ProgressBar(40, stream=terminal) as bar:
        bar.update(30, 2.5, 1200.0)
    lines = terminal.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["training: step 20/40", "training: step 30/40"]
    assert "\x1b" not in terminal.getvalue()


def test_progress_goes_to_stderr_and_leaves_stdout_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(2) as bar:
        print('{"result": 1}')
        bar.update(1, 2.0, 3.0)
    captured = capsys.readouterr()
    assert captured.out == '{"result": 1}\n'
    assert captured.err.startswith("training: step 1/2, loss 2.0000")


def test_printing_to_stdout_beside_a_live_bar_stays_on_stdout(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar(2, stream=terminal):
        print('{"result": 1}')
    assert capsys.readouterr().out == '{"result": 1}\n'
    assert "result" not in terminal.getvalue()
