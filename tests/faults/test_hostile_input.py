"""Whatever a file holds that a person gives or a disk spoiled: it is used, or refused in one line, and soon."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import (
    CHUNKS,
    dumped,
    ends_well,
    hostile_bytes,
    hostile_json,
    hostile_value,
    inputs,
    little_memory,
)
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kalmagrove.commands import run_view
from kalmagrove.commands.parsing import build, open_data, parse
from kalmagrove.commands.train import SHORT, make_train_parser
from kalmagrove.data.batches import batch_at
from kalmagrove.data.packing import PackedText, open_packed
from kalmagrove.data.sources import iter_file
from kalmagrove.data.tokenizer import load_tokenizer
from kalmagrove.errors import UsageError
from kalmagrove.models.convert import load_config, load_model
from kalmagrove.report.page import render_page
from kalmagrove.report.results import Results, load_results
from kalmagrove.report.table import build_table, to_markdown
from kalmagrove.report.verdict import verdict
from kalmagrove.training.checkpoint import latest_checkpoint, naming_checkpoint
from kalmagrove.training.config import DataConfig, LoopConfig, ModelConfig, TrainConfig, plain_options
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.tracking import MetricsWriter
from kalmagrove.training.watching import FolderWatch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures(little_memory.__name__)]

TINY = ModelConfig(hidden_size=16, num_hidden_layers=1, head_dim=8)
LOOP = LoopConfig(tokens=96, batch_size=2, context_length=16, precision="fp32", device="cpu", log_every=1)


@pytest.fixture
def tally(count: Callable[[str, int], None]) -> Callable[[], None]:
    """Counts an input."""
    return lambda: count("inputs", 1)


@pytest.fixture(scope="module")
def session(packed: PackedText, tmp_path_factory: pytest.TempPathFactory) -> TrainingSession:
    """A finished run, closed."""
    session = TrainingSession(
        TrainConfig(data=DataConfig(vocab_size=300), model=TINY, loop=LOOP), packed, tmp_path_factory.mktemp("run")
    )
    while not session.run.done:
        session.advance()
    session.finish({"loss": 1.0})
    session.close()
    return session


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Configurations.

CONFIG = plain_options(TrainConfig(data=DataConfig(source="book.txt"), model=TINY, loop=LOOP))
RESOLUTIONS = [{"num_heads": 2, "head_dim": 8, "scales": [[1, 16], [4, None]]}]


@inputs(0.03)
@given(value=hostile_value(CONFIG | {"model": CONFIG["model"] | {"resolutions": RESOLUTIONS}}), data=st.data())
def test_a_configuration(value: Any, data: st.DataObject, tmp_path_factory: Any, tally: Callable[[], None]) -> None:
    tally()
    text = yaml.dump(value).encode(errors="surrogatepass")
    if data.draw(st.booleans()):
        text = data.draw(hostile_bytes(yaml.dump(CONFIG).encode()))
    path = written(tmp_path_factory.getbasetemp() / "config.yaml", text)

    def read() -> None:
        parser = make_train_parser()
        options = build(parser, parse(parser, ["--config", str(path), "--out", "run"], SHORT))
        config = TrainConfig(**{name: getattr(options, name) for name in TrainConfig.__dataclass_fields__})
        plain_options(config)

    ends_well(read)


@inputs(0.02)
@given(content=st.one_of(hostile_json(CONFIG), hostile_bytes(yaml.safe_dump(CONFIG).encode())))
def test_the_configuration_of_a_run_folder(content: bytes, tmp_path_factory: Any, tally: Callable[[], None]) -> None:
    tally()
    folder = tmp_path_factory.getbasetemp() / "opened"
    folder.mkdir(exist_ok=True)
    written(folder / "config.yaml", content)
    ends_well(lambda: open_run_folder(folder, CONFIG).release())
    assert (folder / "config.yaml").read_bytes() == content


def alias_bomb(place: str) -> str:
    """A few hundred bytes that stand for a billion values in one place of a configuration."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join([*lines, place, ""])


@pytest.mark.parametrize("place", ["loop: {tokens: *a8}", "model: {resolutions: *a8}", "", "b: &b [*b]"])
def test_aliases_that_stand_for_a_billion_values(place: str, tmp_path: Path, tally: Callable[[], None]) -> None:
    tally()
    path = written(tmp_path / "config.yaml", alias_bomb(place).encode())
    with pytest.raises(UsageError, match="stands for more than 10,000 values; write fewer aliases"):
        parse(make_train_parser(), ["--config", str(path), "--out", "run"], SHORT)
    ends_well(lambda: open_run_folder(tmp_path, CONFIG).release())


# Checkpoints.


@pytest.fixture(scope="module")
def checkpoint(session: TrainingSession) -> dict[str, bytes]:
    """The files of a valid checkpoint."""
    checkpoint, _ = latest_checkpoint(session.folder.checkpoints_path)
    assert checkpoint is not None
    return {path.name: path.read_bytes() for path in checkpoint.path.iterdir()}


def signed(files: dict[str, bytes]) -> dict[str, bytes]:
    """With a manifest that fits the files, so that what they hold is read."""
    manifest = json.loads(files["manifest.json"])
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    return files | {"manifest.json": json.dumps(manifest).encode()}


def restore(files: dict[str, bytes], session: TrainingSession, folder: Path) -> None:
    """As a run does that goes on: the checkpoint is used or passed over, and passed over in one line."""
    path = folder / f"step-{session.run.step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        written(path / name, content)

    def read() -> None:
        found, passed_over = latest_checkpoint(folder)
        for line in passed_over:
            assert line.startswith(path.name) and len(line.splitlines()) == 1, line
        if found is not None:
            step = session.run.step
            try:
                session.run.restore(found)
                with naming_checkpoint(found.path):
                    float(found.progress["seconds"])
            finally:
                session.run.step = step

    ends_well(read)


@inputs(0.12)
@given(data=st.data())
def test_the_manifest_of_a_checkpoint(
    data: st.DataObject,
    checkpoint: dict[str, bytes],
    session: TrainingSession,
    tmp_path_factory: Any,
    tally: Callable[[], None],
) -> None:
    tally()
    content = data.draw(hostile_json(json.loads(checkpoint["manifest.json"])))
    folder = tmp_path_factory.getbasetemp() / "manifests"
    restore(checkpoint | {"manifest.json": content}, session, folder)


@inputs(0.1)
@given(data=st.data())
def test_the_state_of_a_checkpoint(
    data: st.DataObject,
    checkpoint: dict[str, bytes],
    session: TrainingSession,
    tmp_path_factory: Any,
    tally: Callable[[], None],
) -> None:
    tally()
    content = data.draw(hostile_json(json.loads(checkpoint["state.json"])))
    restore(signed(checkpoint | {"state.json": content}), session, tmp_path_factory.getbasetemp() / "states")


@st.composite
def hostile_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with a changed header, a wrong length of it, or changed bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = draw(st.sampled_from(("header", "entry", "length", "bytes")))
    if kind == "bytes":
        return draw(hostile_bytes(content))
    if kind == "entry":
        name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        shape = [
            draw(st.sampled_from((0, 1, -1, 7, 2**20, 2**40, 2**63, 2**64))) for _ in range(draw(st.integers(0, 4)))
        ]
        offsets = [draw(st.sampled_from((0, 4, len(body), len(body) + 4, 2**62, -4))) for _ in range(2)]
        dtype = draw(st.sampled_from(("F32", "F64", "BF16", "BOOL", "F8_E8M0", "F4", "C64", "U16", "X", "")))
        choices = {"shape": shape, "data_offsets": offsets, "dtype": dtype}
        header[name] |= {key: value for key, value in choices.items() if draw(st.booleans())}
    text = dumped(header) if kind != "header" else dumped(draw(hostile_value(header)))
    wrong = draw(st.sampled_from((0, 1, 7, len(text) + 1, 10**8, 2**32, 2**63, 2**64 - 1)))
    return struct.pack("<Q", wrong if kind == "length" else len(text)) + text + body


@inputs(0.12)
@given(data=st.data())
def test_the_tensors_of_a_checkpoint(
    data: st.DataObject,
    checkpoint: dict[str, bytes],
    session: TrainingSession,
    tmp_path_factory: Any,
    tally: Callable[[], None],
) -> None:
    tally()
    name = data.draw(st.sampled_from(("model.safetensors", "optimizer.safetensors")))
    content = data.draw(hostile_tensors(checkpoint[name]))
    restore(signed(checkpoint | {name: content}), session, tmp_path_factory.getbasetemp() / "tensors")


# Models.


def copied(source: Path, folder: Path, **contents: bytes) -> Path:
    """A folder in which some files hold something else; ``config_json`` is config.json."""
    if not folder.exists():
        shutil.copytree(source, folder)
    for name, content in contents.items():
        written(folder / name.replace("_json", ".json").replace("_safetensors", ".safetensors"), content)
    return folder


@inputs(0.06)
@given(data=st.data())
def test_the_configuration_of_a_model(
    data: st.DataObject, session: TrainingSession, tmp_path_factory: Any, tally: Callable[[], None]
) -> None:
    tally()
    source = session.folder.model_path
    value = json.loads((source / "config.json").read_bytes())
    content = data.draw(hostile_json(value | {"resolutions": value["resolutions"] or RESOLUTIONS}))
    folder = copied(source, tmp_path_factory.getbasetemp() / "configured", config_json=content)
    ends_well(lambda: load_config(folder))
    if data.draw(st.integers(0, 9)) == 0:
        ends_well(lambda: load_model(folder))


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rank",
    "group_size",
    "short_conv",
    "embedding_rank",
    "core_block_size",
)


@pytest.mark.parametrize("size", [10**4, 10**9, 10**15])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_the_weights_of_a_model_do_not_have(
    name: str, size: int, session: TrainingSession, tmp_path: Path, tally: Callable[[], None]
) -> None:
    """It is found before memory or time is spent on it."""
    tally()
    value = json.loads((session.folder.model_path / "config.json").read_bytes()) | {name: size}
    folder = copied(session.folder.model_path, tmp_path / "model", config_json=dumped(value))
    ends_well(lambda: load_model(folder))


@inputs(0.02)
@given(data=st.data())
def test_the_tensors_of_a_model(
    data: st.DataObject, session: TrainingSession, tmp_path_factory: Any, tally: Callable[[], None]
) -> None:
    tally()
    source = session.folder.model_path
    content = data.draw(hostile_tensors((source / "model.safetensors").read_bytes()))
    folder = copied(source, tmp_path_factory.getbasetemp() / "weighted", model_safetensors=content)
    ends_well(lambda: load_model(folder))


@inputs(0.02)
@given(data=st.data())
def test_a_tokeniser(data: st.DataObject, packed: PackedText, tmp_path_factory: Any, tally: Callable[[], None]) -> None:
    tally()
    content = (packed.folder / "tokenizer.json").read_bytes()
    # Each entry of the vocabulary is like another, and would hide the rest.
    value = json.loads(content)
    short = value | {
        "model": value["model"] | {"vocab": dict(list(value["model"]["vocab"].items())[:260]), "merges": []}
    }
    changed = data.draw(st.one_of(hostile_json(short), hostile_bytes(content)))
    path = written(tmp_path_factory.getbasetemp() / "tokenizer.json", changed)
    loaded = ends_well(lambda: load_tokenizer(str(path)))
    if loaded is not None:
        ends_well(lambda: loaded.encode("The river follows."))


# Texts.


@inputs(0.1)
@given(data=st.data())
def test_the_manifest_of_a_packed_text(
    data: st.DataObject, packed: PackedText, tmp_path_factory: Any, tally: Callable[[], None]
) -> None:
    tally()
    content = data.draw(hostile_json(json.loads((packed.folder / "manifest.json").read_bytes())))
    folder = copied(packed.folder, tmp_path_factory.getbasetemp() / "packed", manifest_json=content)

    def read() -> None:
        opened = open_data(DataConfig(source=str(folder)))
        assert 0 < opened.vocab_size <= packed.vocab_size
        assert 0 <= opened.end_of_text_id < opened.vocab_size
        for split in ("train", "valid", "test"):
            assert opened.tokens(split).max() < opened.vocab_size

    ends_well(read)


def total_fingerprint(manifest: dict[str, Any]) -> str:
    """As the package makes it, so that a changed file can pass for the one that was written."""
    files = [f"{split}:{manifest['splits'][split]['sha256']}" for split in ("train", "valid", "test")]
    return hashlib.sha256("\n".join([manifest["tokenizer_fingerprint"], *files]).encode()).hexdigest()


@inputs(0.07)
@given(data=st.data())
def test_the_tokens_of_a_packed_text(
    data: st.DataObject, packed: PackedText, tmp_path_factory: Any, tally: Callable[[], None]
) -> None:
    """Also where a manifest is made to fit them."""
    tally()
    content = data.draw(hostile_bytes((packed.folder / "train.bin").read_bytes()))
    manifest = json.loads((packed.folder / "manifest.json").read_bytes())
    if data.draw(st.booleans()):
        row = {"tokens": len(content) // 2, "sha256": hashlib.sha256(content).hexdigest()}
        manifest["splits"]["train"] |= row
        manifest["fingerprint"] = total_fingerprint(manifest)
    folder = copied(packed.folder, tmp_path_factory.getbasetemp() / "tokens", manifest_json=dumped(manifest))
    written(folder / "train.bin", content)

    def read() -> None:
        tokens = open_packed(folder).tokens("train")
        assert tokens.max() < packed.vocab_size
        batch_at(tokens, context_length=8, batch_size=2, seed=0, step=3)

    ends_well(read)


@inputs(0.1)
@given(data=st.data())
def test_lines_of_text(data: st.DataObject, tmp_path_factory: Any, tally: Callable[[], None]) -> None:
    tally()
    lines = [data.draw(hostile_json({"text": "The river.", "more": [1, 2.5, None]})) for _ in range(2)]
    path = written(tmp_path_factory.getbasetemp() / "lines.jsonl", b"\n".join([b'{"text": "whole"}', *lines]))
    ends_well(lambda: list(iter_file(path)))


# Records of runs and comparisons.


def scores(loss: float) -> dict[str, Any]:
    return {"loss": loss, "perplexity": 20.0, "word_perplexity": 400.0, "bits_per_byte": 1.5, "tokens": 99}


def contestant(name: str, loss: float) -> dict[str, Any]:
    curve = {"tokens": [100, 200, 300], "seconds": [0.1, 0.2, 0.3], "loss": [5.0, 4.0, loss]}
    runs = [
        {
            "seed": seed,
            "folder": f"{name}/seed-{seed}",
            "diverged": False,
            "seconds": 0.3,
            "valid": scores(loss),
            "test": scores(loss + 0.1),
            "curve": curve,
            "valid_curve": {"tokens": [300], "loss": [loss]},
        }
        for seed in (0, 1)
    ]
    return {
        "name": name,
        "preset": name,
        "optim": "adamw",
        "precision": "fp32",
        "model_config": {"hidden_size": 16},
        "optim_config": {"lr": 0.003},
        "lr_trials": [{"lr_scale": 1.0, "valid_loss": loss}, {"lr_scale": 2.0, "valid_loss": None}],
        "lr_scale": 1.0,
        "parameters": {"total": 2000, "embedding": 300, "non_embedding": 1700},
        "flops_per_token": 12000,
        "decode_state_bytes": 4096,
        "step_seconds": 0.08,
        "peak_memory_bytes": 200_000_000,
        "runs": runs,
    }


COMPARISON = {
    "format": 1,
    "title": "ours against llama",
    "command": "kalmagrove compare --out runs/demo",
    "created": "2025-06-01T12:00:00+0000",
    "data": {
        "source": "book.txt",
        "fingerprint": "1234abcd",
        "vocab_size": 300,
        "tokenizer_fingerprint": "5678abcd",
        "splits": {"train": {"tokens": 8000, "bytes": 24000, "words": 4000, "documents": 12}},
    },
    "budget": {"tokens": 10000, "steps": 20, "tokens_per_step": 500, "context_length": 64, "epochs": 1.25},
    "seeds": [0, 1],
    "trials": 2,
    "environment": {"python": "3.12.1", "usable_cores": 4, "packages": {"torch": "2.11.0", "numpy": None}},
    "baseline": "llama",
    "candidate": "ours",
    "models": [contestant("llama", 3.5), contestant("ours", 3.25)],
    "paired_time": [{"model": "ours", "baseline": "llama", "ratios": [0.5, 0.6, 0.7]}],
}

RECORDS = [
    {"step": 1, "tokens": 32, "loss": 5.5, "lr": 0.001, "grad_norm": 1.5, "seconds": 0.1},
    {"step": 1, "tokens": 32, "seconds": 0.1, "valid_loss": 5.0},
    {"step": 2, "tokens": 64, "loss": 5.25, "lr": 0.001, "grad_norm": 1.25, "seconds": 0.2},
]


@inputs(0.1)
@given(data=st.data())
def test_metrics(data: st.DataObject, tmp_path_factory: Any, tally: Callable[[], None]) -> None:
    tally()
    lines = [data.draw(st.one_of(hostile_json(record), st.just(dumped(record)))) for record in RECORDS]
    folder = tmp_path_factory.getbasetemp() / "metrics"
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder)
    written(run.metrics_path, b"\n".join(lines) + data.draw(st.sampled_from(CHUNKS)))

    def read() -> None:
        for record in run.read_metrics():
            assert isinstance(record.get("step", 0), int)
            assert record.get("valid_loss") is None or float(record["valid_loss"]) >= 0 or record["step"]
        run.truncate_metrics(1)
        MetricsWriter(run.metrics_path).write({"step": 2})
        assert run.read_metrics()[-1] == {"step": 2}

    ends_well(read)


WATCHED: dict[str, Any] = {
    "config.yaml": {"loop": {"tokens": 640, "batch_size": 2, "context_length": 16}},
    "result.json": {"test": {"perplexity": 3.5}, "diverged": False},
    "metrics.jsonl": RECORDS[0] | {"tokens_per_second": 320.0, "step_seconds": 0.1, "peak_memory_bytes": 10**9},
}


@inputs(0.04)
@given(data=st.data())
def test_a_run_that_is_watched(data: st.DataObject, tmp_path_factory: Any, tally: Callable[[], None]) -> None:
    """What can be read is shown as a line, as JSON that every reader takes, and as a panel."""
    tally()
    folder = tmp_path_factory.getbasetemp() / "watched"
    folder.mkdir(exist_ok=True)
    hostile = data.draw(st.sampled_from((*WATCHED, "metrics.jsonl")))
    for name, value in WATCHED.items():
        written(folder / name, data.draw(hostile_json(value)) if name == hostile else dumped(value))
    if data.draw(st.booleans()):
        (folder / "result.json").unlink()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\n" + b"".join(dumped(record) + b"\n" for record in RECORDS[1:]))
        file.write(data.draw(hostile_json(WATCHED["metrics.jsonl"] | {"step": 3})) + b"\n")

    def watch() -> None:
        (state,) = FolderWatch(folder).read()
        assert len(run_view.line(state).splitlines()) == 1
        json.dumps(state.to_dict(), allow_nan=False)
        console = Console(file=io.StringIO(), width=100)
        for is_table in (False, True):
            console.print(run_view.view([state], console, title=str(folder), is_table=is_table))

    ends_well(watch)


@inputs(0.08)
@given(data=st.data())
def test_the_result_of_a_run(data: st.DataObject, session: TrainingSession, tmp_path_factory: Any, tally: Any) -> None:
    tally()
    content = data.draw(hostile_json({"valid": {"perplexity": 3.5, "tokens": 9}, "steps": 3, "seconds": 1.5}))
    folder = tmp_path_factory.getbasetemp() / "results"
    folder.mkdir(exist_ok=True)
    written(folder / "result.json", content)
    ends_well(lambda: RunFolder(folder).read_result())


@inputs(0.06)
@given(data=st.data())
def test_the_results_of_a_comparison(data: st.DataObject, tmp_path_factory: Any, tally: Callable[[], None]) -> None:
    tally()
    path = written(tmp_path_factory.getbasetemp() / "results.json", data.draw(hostile_json(COMPARISON)))

    def report() -> Results:
        results = load_results(path)
        verdict(results)
        to_markdown(build_table(results))
        return results

    results = ends_well(report)
    if results is not None and data.draw(st.integers(0, 19)) == 0:
        ends_well(lambda: render_page(results))
