"""Checkpoints come back bit for bit, and neither damage nor a crash loses the one before."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kalmagrove.errors import KalmaGroveError
from kalmagrove.training.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, betas=(0.8, 0.97)),
    "muon": lambda parameters: torch.optim.Muon(parameters, lr=0.02),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "sgd without state": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
}


def save(folder: Path, step: int, value: float | None = None, **options: Any) -> Path:
    weight = torch.full((3, 5), float(step) if value is None else value)
    optimizer = {"state": {0: {"momentum": weight / 7}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return save_checkpoint(
        folder, step=step, model={"weight": weight}, optimizer=optimizer, progress={"tokens": step * 11}, **options
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_identical(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert [(type(key), key) for key in actual] == [(type(key), key) for key in expected]
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_identical(actual_item, expected_item)
    else:
        assert actual == expected


def tiny_model() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_ends_at_the_same_bits_as_an_unbroken_one(tmp_path: Path, name: str) -> None:
    unbroken = tiny_model()
    unbroken_optimizer = OPTIMIZERS[name](unbroken.parameters())
    train(unbroken, unbroken_optimizer, 0, 4)
    path = save_checkpoint(
        tmp_path, step=4, model=unbroken.state_dict(), optimizer=unbroken_optimizer.state_dict(), progress={}
    )
    checkpoint = load_checkpoint(path)
    assert_identical(checkpoint.optimizer, unbroken_optimizer.state_dict())
    assert_identical(checkpoint.model, dict(unbroken.state_dict()))
    train(unbroken, unbroken_optimizer, 4, 9)

    resumed = tiny_model()
    resumed_optimizer = OPTIMIZERS[name](resumed.parameters())
    resumed.load_state_dict(checkpoint.model)
    resumed_optimizer.load_state_dict(checkpoint.optimizer)
    train(resumed, resumed_optimizer, 4, 9)
    assert_identical(dict(resumed.state_dict()), dict(unbroken.state_dict()))
    assert_identical(resumed_optimizer.state_dict(), unbroken_optimizer.state_dict())


def test_every_kind_of_optimizer_value_comes_back_with_its_type(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    optimizer: dict[Any, Any] = {
        "state": {
            0: {"step": torch.tensor(5.0), "half": torch.randn(3).bfloat16(), "flags": torch.tensor([True, False])},
            12: {"transposed": base.t(), "part": base[1:3, ::2], "overlapping": base[2:4], "whole": base.view(-1)},
        },
        "param_groups": [{"betas": (0.9, (0.99,)), "params": [0, 12], "foreach": None, "nesterov": True, "ratio": 0.1}],
        "0": {"a.b": torch.ones(1), "a": {"b": torch.zeros(2)}, "empty": torch.empty(0, 3)},
        "extremes": [float("inf"), float("-inf"), 2**70, -0.0, "text", [], (), {}],
        True: 1,
    }
    path = save_checkpoint(tmp_path, step=1, model={}, optimizer=optimizer, progress={})
    assert_identical(load_checkpoint(path).optimizer, optimizer)


def test_not_a_number_in_the_optimizer_comes_back(tmp_path: Path) -> None:
    optimizer = {"lr": float("nan"), "loss": torch.tensor([float("nan"), 1.0])}
    loaded = load_checkpoint(save_checkpoint(tmp_path, step=1, model={}, optimizer=optimizer, progress={})).optimizer
    assert loaded["lr"] != loaded["lr"]
    assert loaded["loss"].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"state": {3: {"kind": torch.float32}}}, r"state\.state\.3\.kind is a dtype, which a checkpoint cannot hold"),
        ({"state": {(1, 2): 0}}, r"state\.state has the key \(1, 2\), which is neither a string nor an integer"),
    ],
)
def test_an_optimizer_value_that_json_cannot_hold_is_named(
    tmp_path: Path, optimizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path, step=1, model={}, optimizer=optimizer, progress={})
    assert names(tmp_path) == []


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    table = torch.nn.Parameter(torch.randn(11, 4))
    square = torch.randn(3, 3)
    model = {"embedding": table, "head": table, "square": square, "turned": square.t(), "none": torch.empty(0)}
    shared = {"first": square, "second": {"again": square}}
    path = save_checkpoint(tmp_path, step=1, model=model, optimizer=shared, progress={})
    assert sorted(load_file(path / "model.safetensors")) == ["embedding", "none", "square", "turned"]
    assert len(load_file(path / "optimizer.safetensors")) == 1
    loaded = load_checkpoint(path)
    assert_identical(loaded.model["embedding"], table.detach())
    assert loaded.model["head"] is loaded.model["embedding"]
    assert_identical(loaded.model["turned"], square.t())
    assert loaded.optimizer["first"] is loaded.optimizer["second"]["again"]
    assert_identical(loaded.optimizer["first"], square)


def test_step_progress_and_name_come_back(tmp_path: Path) -> None:
    progress = {"tokens": 2**60, "rng": list(range(20)), "data": {"fingerprint": "f00"}, "best": 0.1}
    path = save_checkpoint(tmp_path / "new" / "folder", step=500, model={}, optimizer={}, progress=progress)
    loaded = load_checkpoint(path)
    assert path == tmp_path / "new" / "folder" / "step-00000500"
    assert (loaded.path, loaded.step, loaded.progress) == (path, 500, progress)
    assert names(path) == sorted(FILES)


def test_every_file_is_as_readable_as_its_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {(path / name).stat().st_mode & 0o777 for name in FILES} == {path.stat().st_mode & 0o666}


def test_loaded_tensors_outlive_the_checkpoint_and_do_not_change_it(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    loaded = load_checkpoint(path)
    loaded.model["weight"].add_(1)
    assert load_checkpoint(path).model["weight"].unique().tolist() == [2.0]
    shutil.rmtree(path)
    assert loaded.model["weight"].unique().tolist() == [3.0]


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def link(file: Path) -> None:
    moved = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(moved)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (flip_bit, r"has changed since it was written \(its SHA-256 differs\)"),
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), r"is cut: it has \d+ bytes, not \d+"),
    "emptied": (lambda file: os.truncate(file, 0), r"is cut: it has 0 bytes, not \d+"),
    "extended": (lambda file: os.truncate(file, 9999), r"has grown: it has 9999 bytes, not \d+"),
    "missing": (Path.unlink, "is missing"),
    "linked": (link, "is a symbolic link"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES[:3])
def test_a_damaged_file_is_named_and_the_older_checkpoint_is_used(tmp_path: Path, file: str, damage: str) -> None:
    harm, reason = DAMAGES[damage]
    older, newer = save(tmp_path, 100), save(tmp_path, 200)
    harm(newer / file)
    with pytest.raises(CheckpointError, match=f"Checkpoint .*step-00000200 cannot be used: {file} {reason}"):
        load_checkpoint(newer)
    checkpoint, passed_over = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == older
    assert checkpoint.model["weight"].unique().tolist() == [100.0]
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"step-00000200: {file} ")


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "extended"])
def test_a_damaged_manifest_is_named_and_the_older_checkpoint_is_used(tmp_path: Path, damage: str) -> None:
    older, newer = save(tmp_path, 100), save(tmp_path, 200)
    DAMAGES[damage][0](newer / "manifest.json")
    checkpoint, passed_over = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == older
    assert len(passed_over) == 1
    assert passed_over[0].startswith("step-00000200: ")


def test_no_flipped_bit_of_the_manifest_changes_what_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 200)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for index in range(len(content)):
        manifest.write_bytes(content[:index] + bytes([content[index] ^ 2]) + content[index + 1 :])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../secret", "..", ".", "/etc/hostname", "inner/file", "..\\secret", ""])
def test_a_manifest_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    path = save(tmp_path, 1)
    edit_manifest(path, lambda manifest: manifest["files"].update({name: {"bytes": 6, "sha256": "0"}}))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert caught.value.reason == f"manifest.json lists {name!r}, which leaves the checkpoint's folder"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda manifest: manifest.update(format_version=2),
            "manifest.json has format version 2, and only 1 is known",
        ),
        (
            lambda manifest: manifest["files"].pop("state.json"),
            "manifest.json does not list exactly model.safetensors, optimizer.safetensors, state.json",
        ),
        (lambda manifest: manifest.update(step=7), "manifest.json says step 7 and state.json says step 1"),
        (lambda manifest: manifest.pop("files"), "its content does not have the checkpoint format (KeyError('files'))"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    path = save(tmp_path, 1)
    edit_manifest(path, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert caught.value.reason == reason


def test_a_path_that_is_no_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match="step-00000009 cannot be used: it is not a folder; choose another"):
        load_checkpoint(tmp_path / "step-00000009")


def test_without_a_whole_checkpoint_there_is_none_and_each_bad_one_is_named(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") == (None, [])
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    assert latest_checkpoint(tmp_path) == (
        None,
        ["step-00000002: state.json is missing", "step-00000001: state.json is missing"],
    )


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 90, 1000, 10**9):
        save(tmp_path, step, keep_last=3)
    assert names(tmp_path) == ["step-00000090", "step-00001000", "step-1000000000"]
    save(tmp_path, 10**9 + 1, keep_last=1)
    assert names(tmp_path) == ["step-1000000001"]
    with pytest.raises(ValueError, match="keep_last must be at least 1, not 0"):
        save(tmp_path, 1, keep_last=0)


def test_the_new_checkpoint_stays_although_damaged_ones_of_later_steps_are_there(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    save(tmp_path, 15, keep_last=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]
    checkpoint, passed_over = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 15
    assert len(passed_over) == 2


def test_a_step_saved_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10, value=1.0)
    path = save(tmp_path, 10, value=2.0)
    assert names(tmp_path) == [path.name]
    assert load_checkpoint(path).model["weight"].unique().tolist() == [2.0]


def test_leftovers_are_ignored_and_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.tmp-123")
    (tmp_path / ".step-00000030.tmp-123").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoint, passed_over = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, passed_over) == (10, [])
    save(tmp_path, 40)
    assert names(tmp_path) == ["notes", "step-00000010", "step-00000040"]


class Killed(BaseException):
    """Stands for the end of the process."""


def break_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException, *, dead_afterwards: bool) -> list[str]:
    """Let the numbered call that changes or syncs the disk fail, and, as after a kill, each later one too."""
    calls: list[str] = []

    def breaking(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number or (dead_afterwards and len(calls) > number):
                raise error
            return original(*arguments, **options)

        return call

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, breaking(name, getattr(module, name)))
    return calls


def count_calls(folder: Path, steps: tuple[int, ...], last: int) -> list[str]:
    for step in steps:
        save(folder, step)
    with pytest.MonkeyPatch.context() as patch:
        calls = break_at(patch, 10**6, Killed(), dead_afterwards=True)
        save(folder, last)
    return calls


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "disk error"])
@pytest.mark.parametrize(("steps", "last"), [((10, 20), 30), ((10,), 10), ((10, 20), 20)])
def test_a_crash_at_any_point_leaves_a_whole_checkpoint_and_no_half_one(
    tmp_path: Path, steps: tuple[int, ...], last: int, killed: bool
) -> None:
    calls = count_calls(tmp_path / "whole", steps, last)
    assert calls.count("fsync") == 6
    assert calls.count("rename") >= 2
    error: BaseException = Killed() if killed else OSError(28, "No space left on device")
    for number in range(1, len(calls) + 1):
        folder = tmp_path / str(number)
        for step in steps:
            save(folder, step, value=-1.0)
        with pytest.MonkeyPatch.context() as patch:
            break_at(patch, number, error, dead_afterwards=killed)
            with pytest.raises(type(error)):
                save(folder, last, value=1.0)
        checkpoint, passed_over = latest_checkpoint(folder)
        assert passed_over == []
        assert checkpoint is not None
        assert checkpoint.step in (steps[-1], last)
        assert checkpoint.model["weight"].unique().tolist() in ([-1.0], [1.0])
        if checkpoint.step not in steps:
            assert checkpoint.model["weight"].unique().tolist() == [1.0]

        save(folder, last, value=2.0)
        assert all(name.startswith("step-") and not name.endswith(".replaced") for name in names(folder))
        recovered, _ = latest_checkpoint(folder)
        assert recovered is not None
        assert (recovered.step, recovered.model["weight"][0, 0].item()) == (last, 2.0)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_the_disk_passes_and_its_temporary_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, 20)
    assert names(tmp_path) == ["step-00000010"]


def test_a_tensor_file_that_cannot_be_written_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def fail(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    save(tmp_path, 10)
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written: I/O error: No space left on device"):
        save(tmp_path, 20)
    assert names(tmp_path) == ["step-00000010"]


def test_a_checkpoint_that_cannot_be_replaced_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def fail_for_the_new_one(old: Path, new: Path) -> None:
        if ".tmp-" in old.name:
            raise OSError(5, "Input/output error")
        rename(old, new)

    path = save(tmp_path, 10, value=1.0)
    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path, 10, value=2.0)
    assert names(tmp_path) == [path.name]
    assert load_checkpoint(path).model["weight"].unique().tolist() == [1.0]
