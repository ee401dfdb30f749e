"""A run folder belongs to one configuration and to one process at a time, and nothing in it is overwritten."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.run_folder import RunFolder, open_run_folder

CONFIG: dict[str, Any] = {
    "seed": 7,
    "model": {"width": 12, "layers": 3, "tied": True},
    "optimizer": {"lr": 1e-5, "betas": (0.9, 0.95), "clip": math.nan},
    "data": {"sources": [{"path": Path("texts/a.txt"), "weight": 2}], "note": "\u00e4"},
    "log_every": 10,
}


def changed(**values: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG, default=str))
    for name, value in values.items():
        *groups, key = name.split("__")
        part = config
        for group in groups:
            part = part[group]
        part[key] = value
    return config


def test_a_new_folder_gets_the_whole_configuration(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "runs" / "a", CONFIG) as run:
        stored = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
    assert math.isnan(stored["optimizer"].pop("clip"))
    assert stored["optimizer"] == {"lr": 1e-5, "betas": [0.9, 0.95]}
    assert stored["data"] == {"sources": [{"path": "texts/a.txt", "weight": 2}], "note": "\u00e4"}
    assert list(stored) == list(CONFIG)


def test_the_parts_of_a_run_have_fixed_names(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    paths = [
        run.config_path,
        run.environment_path,
        run.metrics_path,
        run.checkpoints_path,
        run.model_path,
        run.result_path,
    ]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "result.json",
    ]


def test_the_same_configuration_continues_and_keeps_every_file(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "a", CONFIG) as run:
        run.write_result({"loss": 2.5})
        text = run.config_path.read_text() + "# kept\n"
        run.config_path.write_text(text)
    with open_run_folder(tmp_path / "a", changed()) as run:
        assert run.read_result() == {"loss": 2.5}
        assert run.config_path.read_text() == text


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "a", CONFIG).release()
    before = (tmp_path / "a" / "config.yaml").read_text()
    other = changed(model__width=16, optimizer__lr=0.5, data__sources=[{"path": "texts/b.txt", "weight": 2}], extra=1)
    del other["seed"]
    with pytest.raises(KalmaGroveError) as caught:
        open_run_folder(tmp_path / "a", other)
    assert str(caught.value) == (
        f"Run folder {tmp_path / 'a'} belongs to another configuration (model.width: 12 -> 16, "
        "optimizer.lr: 1e-05 -> 0.5, data.sources.0.path: texts/a.txt -> texts/b.txt and 2 more); "
        "choose another folder or delete this one"
    )
    assert (tmp_path / "a" / "config.yaml").read_text() == before


def test_absent_keys_and_long_values_are_shown_briefly(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "a", {"old": None}).release()
    with pytest.raises(KalmaGroveError) as caught:
        open_run_folder(tmp_path / "a", {"new": "x" * 100})
    assert f"(new: (absent) -> {'x' * 57}..., old: None -> (absent));" in str(caught.value)


def test_keys_that_may_change_alone_or_by_group_do_not_stop_a_run(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "a", CONFIG).release()
    other = changed(log_every=50, model__width=16)
    open_run_folder(tmp_path / "a", other, allow_changed=frozenset({"log_every", "model"})).release()
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["log_every"] == 10
    with pytest.raises(KalmaGroveError, match=r"\(model\.width: 12 -> 16\)"):
        open_run_folder(tmp_path / "a", other, allow_changed=frozenset({"log_every", "mod"}))


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(KalmaGroveError, match=r"is not empty and is not a run folder \(it has no config\.yaml\)"):
        open_run_folder(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(KalmaGroveError, match="a is a file; choose another run folder"):
        open_run_folder(tmp_path / "a", CONFIG)


@pytest.mark.parametrize(("content", "message"), [("a: [", "is not valid YAML"), ("", "does not hold a configuration")])
def test_an_unusable_configuration_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(KalmaGroveError, match=rf"config\.yaml {message}; choose another run folder"):
        open_run_folder(tmp_path, CONFIG)
    assert (tmp_path / "config.yaml").read_text() == content


def test_a_folder_left_by_a_crash_before_its_configuration_is_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.tmp-99").write_text("se")
    open_run_folder(tmp_path, CONFIG).release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]


OPEN_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.run_folder import open_run_folder
try:
    with open_run_folder(Path(sys.argv[1]), {"seed": 1}):
        print("opened")
except KalmaGroveError as error:
    print(error)
"""


def answer_of_another_process(folder: Path) -> str:
    command = [sys.executable, "-c", OPEN_IN_ANOTHER_PROCESS, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_two_processes_cannot_use_one_folder(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "a", {"seed": 1}):
        assert answer_of_another_process(tmp_path / "a") == (
            f"Run folder {tmp_path / 'a'} is in use by another process; wait for it to end or choose another folder"
        )
    assert answer_of_another_process(tmp_path / "a") == "opened"


def test_a_folder_is_free_again_after_a_failure_and_after_two_releases(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "a", CONFIG).release()
    with pytest.raises(KalmaGroveError, match="another configuration"):
        open_run_folder(tmp_path / "a", {})
    run = open_run_folder(tmp_path / "a", CONFIG)
    with pytest.raises(KalmaGroveError, match="is in use by another process"):
        open_run_folder(tmp_path / "a", CONFIG)
    run.release()
    run.release()
    open_run_folder(tmp_path / "a", CONFIG).release()


@pytest.mark.parametrize("cut", ["", '{"step": 3, "lo', '{"name": "\u00e9"'])
def test_metrics_are_read_without_a_cut_last_line(tmp_path: Path, cut: str) -> None:
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    run.metrics_path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + cut.encode()[:-1])
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics_path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(KalmaGroveError, match=r"metrics\.jsonl line 2 is not a JSON object; delete that line"):
        run.read_metrics()


def test_truncating_keeps_the_lines_up_to_the_step_as_they_were(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.truncate_metrics(5)
    assert not run.metrics_path.exists()
    kept = '{"note":   "start"}\n{"step": 10, "loss": 2.0}\n{"step": 20}\n{"note": "at 20"}\n'
    run.metrics_path.write_text(kept + '{"step": 30}\n{"note": "at 30"}\n{"step": 40, "lo')
    run.truncate_metrics(20)
    assert run.metrics_path.read_text() == kept


def test_the_result_comes_back_and_is_none_before(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_result() is None
    run.write_result({"loss": math.nan, "steps": 3})
    assert run.read_result() == {"loss": None, "steps": 3}


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_an_unusable_result_is_named(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    run.result_path.write_text(content)
    with pytest.raises(KalmaGroveError, match=r"result\.json is damaged; delete it and run again"):
        run.read_result()


def test_an_option_that_is_newer_than_the_folder_has_its_usual_value(tmp_path: Path) -> None:
    old = {"model": {"width": 12}, "loop": {"tokens": 5}}
    open_run_folder(tmp_path / "a", old).release()
    usual = {"model": {"width": 12, "bias": False}, "data": {"bins": 64}}
    new = {"model": {"width": 12, "bias": False}, "loop": {"tokens": 5}}
    open_run_folder(tmp_path / "a", new, usual=usual).release()
    with pytest.raises(KalmaGroveError, match=r"model.bias: False -> True"):
        open_run_folder(tmp_path / "a", {"model": {"width": 12, "bias": True}, "loop": {"tokens": 5}}, usual=usual)
    with pytest.raises(KalmaGroveError, match=r"data: \(absent\) -> "):
        open_run_folder(tmp_path / "a", new | {"data": {"bins": 64}}, usual=usual)
