"""Whatever file operation a process dies in, or the disk refuses: what was there stays, and a second time heals all."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fault_operations import Fault, faults_of, meet

from kalmagrove.data.packing import PackedText, open_packed, prepare
from kalmagrove.files import write_json_atomic
from kalmagrove.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, TrainConfig
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.tracking import MetricsWriter

Count = Callable[[str, int], None]


@dataclass(frozen=True)
class Scenario:
    """Something that writes, in a folder.

    Attributes:
        before: Makes the folder's earlier content.
        act: Writes.
        check: Fails where the folder, in or after the act, holds something that it must not.
    """

    before: Callable[[Path], object]
    act: Callable[[Path], object]
    check: Callable[[Path], object]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies takes nothing from the system's memory, so waiting for the disk proves nothing here."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, with the content of the files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def meet_every_fault(scenario: Scenario, root: Path, count: Count) -> None:
    """Meets each fault in a folder of its own, then does the act in peace and compares with an undisturbed one.

    After an error the same process acts again, after a death another one.
    """
    numbers = itertools.count()

    def new_folder() -> Path:
        folder = root / str(next(numbers))
        folder.mkdir()
        scenario.before(folder)
        return folder

    whole = new_folder()
    scenario.act(whole)
    scenario.check(whole)
    expected = tree(whole)
    learned = new_folder()
    faults = faults_of(lambda: scenario.act(learned))
    assert tree(learned) == expected
    for fault in faults:
        meet_one(scenario, fault, new_folder(), expected)
    kinds = Counter(fault.kind for fault in faults)
    print(f"{len(faults)} faults: " + ", ".join(f"{kind} {number}" for kind, number in kinds.items()))
    count("faults", len(faults))


def meet_one(scenario: Scenario, fault: Fault, folder: Path, expected: dict[str, bytes | None]) -> None:
    ending = meet(lambda: scenario.act(folder), fault)
    assert ending.died == ("dies" in fault.kind), f"{fault}: {ending.error or ending.operations}"
    try:
        scenario.check(folder)
        scenario.act(folder)
        assert tree(folder) == expected
    except Exception as error:
        raise AssertionError(f"{fault} ({ending.operations[fault.operation - 1]}) lost something: {error}") from error


def save(folder: Path, step: int, value: float, keep_last: int = 2) -> None:
    weight = torch.full((30, 5), value)
    save_checkpoint(
        folder,
        step=step,
        model={"weight": weight},
        optimizer={"state": {0: {"momentum": weight / 7}}},
        progress={"tokens": step},
        keep_last=keep_last,
    )


def holds_checkpoint(*allowed: tuple[int, float]) -> Callable[[Path], None]:
    """The newest checkpoint is one of these (step, value), and nothing with a checkpoint's name is half."""

    def check(folder: Path) -> None:
        checkpoint, passed_over = latest_checkpoint(folder)
        assert passed_over == []
        found = None if checkpoint is None else (checkpoint.step, checkpoint.model["weight"][0, 0].item())
        assert found in allowed or (found is None and not allowed)
        for path in folder.glob("step-*"):
            load_checkpoint(path)

    return check


def at_most(check: Callable[[Path], None]) -> Callable[[Path], None]:
    """The check holds, or there is nothing yet."""
    return lambda folder: check(folder) if list(folder.glob("step-*")) else None


def leave_a_replaced_one(folder: Path) -> None:
    """As a process that died while it replaced its second checkpoint."""
    save(folder, 1, 1.0)
    save(folder, 2, 1.0)
    (folder / "step-00000002").rename(folder / "step-00000002.replaced")
    (folder / ".step-00000002.tmp-1").mkdir()
    (folder / ".step-00000002.tmp-1" / "state.json").write_text("{")


CHECKPOINTS = {
    "the first": Scenario(lambda folder: None, lambda f: save(f, 1, 1.0), at_most(holds_checkpoint((1, 1.0)))),
    "the second": Scenario(lambda f: save(f, 1, 1.0), lambda f: save(f, 2, 2.0), holds_checkpoint((1, 1.0), (2, 2.0))),
    "a step again": Scenario(
        lambda f: save(f, 1, 1.0), lambda f: save(f, 1, 2.0), holds_checkpoint((1, 1.0), (1, 2.0))
    ),
    "the last, with older ones to remove": Scenario(
        lambda f: [save(f, step, 1.0, 9) for step in (1, 2, 3)],
        lambda f: save(f, 4, 4.0, 1),
        holds_checkpoint((3, 1.0), (4, 4.0)),
    ),
    "after a death in replacing": Scenario(
        leave_a_replaced_one, lambda f: save(f, 2, 2.0), holds_checkpoint((2, 1.0), (2, 2.0))
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(name: str, tmp_path: Path, count: Count) -> None:
    meet_every_fault(CHECKPOINTS[name], tmp_path, count)


RECORDS = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]


def write_records(folder: Path) -> None:
    """As a session does: what came after its checkpoint is dropped, then written again."""
    run = RunFolder(folder)
    run.truncate_metrics(1)
    writer = MetricsWriter(run.metrics_path)
    for record in RECORDS[1:]:
        writer.write(record)


def holds_records(folder: Path) -> None:
    found = RunFolder(folder).read_metrics()
    assert 1 <= len(found) <= 3 and found == RECORDS[: len(found)]


@pytest.mark.parametrize("cut", ["", '{"step": 2, "lo'])
def test_metrics(cut: str, tmp_path: Path, count: Count) -> None:
    content = json.dumps(RECORDS[0]) + "\n" + cut
    scenario = Scenario(
        lambda folder: (folder / "metrics.jsonl").write_text(content, encoding="utf-8"), write_records, holds_records
    )
    meet_every_fault(scenario, tmp_path, count)


def test_a_record_that_the_disk_refused_can_be_written_by_the_same_writer(tmp_path: Path, count: Count) -> None:
    path, first = tmp_path / "metrics.jsonl", json.dumps(RECORDS[0]) + "\n"
    path.write_text(first, encoding="utf-8")
    faults = [fault for fault in faults_of(partial(MetricsWriter(path).write, RECORDS[1])) if "dies" not in fault.kind]
    for fault in faults:
        path.write_text(first, encoding="utf-8")
        writer = MetricsWriter(path)
        if meet(partial(writer.write, RECORDS[1]), fault).error:
            writer.write(RECORDS[1])
        assert RunFolder(tmp_path).read_metrics() == RECORDS[:2], str(fault)
    count("faults", len(faults))


@pytest.mark.parametrize("old", [None, {"value": 1}])
def test_a_json_file(old: dict[str, int] | None, tmp_path: Path, count: Count) -> None:
    new = {"value": 2, "text": "x" * 5000}

    def check(folder: Path) -> None:
        path = folder / "plan.json"
        found = json.loads(path.read_text()) if path.exists() else None
        assert found in (old, new)

    scenario = Scenario(
        lambda folder: None if old is None else write_json_atomic(folder / "plan.json", old),
        lambda folder: write_json_atomic(folder / "plan.json", new),
        check,
    )
    meet_every_fault(scenario, tmp_path, count)


def open_and_release(folder: Path) -> None:
    open_run_folder(folder / "run", {"seed": 1, "note": "x" * 300}).release()


def leave_a_half_run_folder(folder: Path) -> None:
    open_and_release(folder)
    (folder / "run" / ".result.json.tmp-1").write_text("{")
    (folder / "run" / ".model.tmp-1").mkdir()
    (folder / "run" / ".model.tmp-1" / "config.json").write_text("{")


def holds_run_folder(folder: Path) -> None:
    path = folder / "run" / "config.yaml"
    if path.exists():
        assert path.read_text().endswith("\n") and "x" * 300 in path.read_text().replace("\n", "")


@pytest.mark.parametrize("before", [lambda folder: None, leave_a_half_run_folder], ids=["new", "again"])
def test_a_run_folder(before: Callable[[Path], object], tmp_path: Path, count: Count) -> None:
    meet_every_fault(Scenario(before, open_and_release, holds_run_folder), tmp_path, count)


def test_a_packed_text(packed: PackedText, tmp_path: Path, count: Count) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for split in ("train", "valid", "test"):
        (source / f"{split}.txt").write_text(f"The river {split}.\n<|endoftext|>\nThe garden.", encoding="utf-8")

    def pack(folder: Path) -> None:
        prepare(str(source), folder / "packed", tokenizer=str(packed.folder))

    def check(folder: Path) -> None:
        if (folder / "packed").exists():
            open_packed(folder / "packed")

    (tmp_path / "folders").mkdir()
    meet_every_fault(Scenario(lambda folder: None, pack, check), tmp_path / "folders", count)


@pytest.fixture(scope="module")
def finished(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> TrainingSession:
    config = TrainConfig(
        data=DataConfig(vocab_size=300),
        model=ModelConfig(hidden_size=16, num_hidden_layers=1, head_dim=8),
        loop=LoopConfig(tokens=64, batch_size=2, context_length=16, precision="fp32", device="cpu"),
    )
    session = TrainingSession(config, packed, tmp_path_factory.mktemp("finished") / "run")
    while not session.run.done:
        session.advance()
    session.close()
    return session


@pytest.mark.slow
@pytest.mark.parametrize("exported", [False, True], ids=["first export", "second export"])
def test_the_end_of_a_run(
    exported: bool, finished: TrainingSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: Count
) -> None:
    config = {"seed": 1}
    # The time of its end is the one thing about a result that differs.
    monkeypatch.setattr("time.strftime", lambda form: "2025-06-01T12:00:00+0000")
    whole: dict[str, bytes | None] = {}

    def act(folder: Path) -> None:
        """As a command that goes on: the folder is opened, and finished if it was not."""
        with open_run_folder(folder, config) as run:
            finished.folder = replace(run, lock=None)
            if run.read_result() is None:
                finished.finish({"loss": 1.0})

    def before(folder: Path) -> None:
        with open_run_folder(folder, config) as run:
            finished.folder = replace(run, lock=None)
            if exported:
                finished.export()

    def check(folder: Path) -> None:
        run = RunFolder(folder)
        if not whole:
            whole.update(tree(run.model_path))
        if run.model_path.exists():
            assert tree(run.model_path) == whole
        if run.result_path.exists():
            assert run.read_result() is not None and run.model_path.exists()

    meet_every_fault(Scenario(before, act, check), tmp_path, count)
