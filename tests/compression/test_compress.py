"""A whole compression of a trained model: budgets, resuming, refitting, and what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kalmagrove.compression.compress import CompressResult, compress
from kalmagrove.compression.options import CompressOptions
from kalmagrove.compression.refit import RefitLength, parse_refit
from kalmagrove.compression.source import open_source
from kalmagrove.compression.work import WorkFolder
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.locks import FolderInUse
from kalmagrove.training.checkpoint import CheckpointError


@pytest.fixture
def options(llama_folder: Path, text_file: Path, tmp_path: Path) -> CompressOptions:
    return CompressOptions(
        source=str(llama_folder), out=tmp_path / "small", keep=0.7, data=str(text_file), calibration_tokens=1024,
        context_length=32, device="cpu", precision="fp32",
    )  # fmt: skip


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 41)[None]).logits


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_everything_kept_is_the_same_model(options: CompressOptions, llama_folder: Path) -> None:
    result = compress(replace(options, keep=1.0))
    assert torch.equal(logits(options.out), logits(llama_folder))
    assert result.factorised == 0 and result.before.parameters == result.after.parameters


@pytest.mark.parametrize("keep", [0.85, 0.6])
def test_the_whole_model_has_the_size_that_was_asked_for(keep: float, options: CompressOptions) -> None:
    result = compress(replace(options, keep=keep))
    assert keep - 0.005 < result.after.parameters / result.before.parameters <= keep
    stored = load_file(options.out / "model.safetensors")
    floats = sum(tensor.numel() for tensor in stored.values() if tensor.is_floating_point())
    assert floats == result.after.parameters
    assert result.after.flops_per_token < result.before.flops_per_token
    assert result.after.perplexity > 1
    assert json.loads((options.out / "compression.json").read_text())["after"]["parameters"] == floats
    assert not options.out.with_name("small.work").exists()


def test_what_the_loss_feels_matters_more_than_chance(options: CompressOptions) -> None:
    """The planned ranks lose less than the same rank everywhere, at no more parameters."""
    same = compress(replace(options, keep=None, rank=14))
    keep = same.after.parameters / same.before.parameters
    planned = compress(replace(options, out=options.out.with_name("planned"), keep=keep))
    assert planned.after.parameters <= same.after.parameters
    assert planned.after.perplexity < same.after.perplexity


class Cut(Exception):
    """Ends a compression in the middle."""


def cut_at(stage: str, part: float) -> Callable[[str, float], None]:
    """Cuts a compression off when more than a part of a stage is done."""

    def cut(now: str, done: float) -> None:
        if now == stage and done > part:
            raise Cut

    return cut


@pytest.mark.parametrize(("out", "dense_out"), [("small", "small/dense"), ("a/small", "a"), ("small", "small.work/x")])
def test_outputs_inside_each_other_are_refused(out: str, dense_out: str, options: CompressOptions) -> None:
    folder = options.out.parent
    with pytest.raises(UsageError, match="choose folders beside each other"):
        replace(options, out=folder / out, dense_out=folder / dense_out)


def test_a_folder_that_is_not_a_compression_s_is_left_as_it_is(options: CompressOptions) -> None:
    thesis = options.out.with_name(f"{options.out.name}.work") / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    with pytest.raises(UsageError, match=r"small\.work is in the way"):
        compress(options)
    assert thesis.read_text() == "mine" and list(thesis.parent.iterdir()) == [thesis]


@pytest.mark.parametrize("content", ["[]", "null", "{"])
def test_a_damaged_identity_is_named_and_its_folder_given_free(content: str, tmp_path: Path) -> None:
    path = tmp_path / "small.work"
    WorkFolder(path, {"keep": 0.5}).close()
    sound = (path / "identity.json").read_text()
    (path / "identity.json").write_text(content)
    with pytest.raises(KalmaGroveError, match=r"identity\.json is damaged; remove .*small\.work to begin anew"):
        WorkFolder(path, {"keep": 0.5})
    (path / "identity.json").write_text(sound)
    WorkFolder(path, {"keep": 0.5}).close()


def test_two_processes_do_not_compress_into_one_folder(options: CompressOptions) -> None:
    path = options.out.with_name("small.work")

    def meet(now: str, done: float) -> None:
        with pytest.raises(FolderInUse, match=r"small\.work is in use by another process"):
            WorkFolder(path, {})

    compress(options, meet)
    assert options.out.is_dir() and not path.exists()


def test_a_search_that_was_cut_off_goes_on_to_the_same_bytes(options: CompressOptions) -> None:
    target = 1.2 * compress(replace(options, keep=1.0)).before.perplexity
    options = replace(options, out=options.out.with_name("whole"), keep=None, target_ppl=target)
    compress(options)
    again = replace(options, out=options.out.with_name("again"))
    seen: list[float] = []

    def cut(now: str, done: float) -> None:
        if now == "searching the size":
            seen.append(done)
            if len(seen) == 3:
                raise Cut

    with pytest.raises(Cut):
        compress(again, cut)
    compress(again, cut)
    assert seen == sorted(seen) and len(seen) == len(set(seen))
    assert digest(again.out) == digest(options.out)


@pytest.mark.parametrize("stage", ["watching the dense model", "factorising layers"])
def test_a_compression_that_was_cut_off_goes_on_to_the_same_bytes(stage: str, options: CompressOptions) -> None:
    compress(options)
    unbroken = replace(options, out=options.out.with_name("again"))

    with pytest.raises(Cut):
        compress(unbroken, cut_at(stage, 0.5))
    work = unbroken.out.with_name("again.work")
    assert not unbroken.out.exists() and work.is_dir()
    kept = sorted(path.name for path in work.iterdir())
    with pytest.raises(UsageError, match=r"unfinished compression with other options \(keep\)"):
        compress(replace(unbroken, keep=0.5))
    seen: list[tuple[str, float]] = []
    compress(unbroken, lambda now, done: seen.append((now, done)))
    assert digest(unbroken.out) == digest(options.out)
    assert not work.exists()
    if stage == "factorising layers":
        assert {"moments-0.safetensors", "plan.json", "factors-0.safetensors"} <= set(kept)
        assert not any(now == "planning ranks" for now, _ in seen)


def test_the_dense_folder_is_a_stock_model_with_the_same_logits(options: CompressOptions, tmp_path: Path) -> None:
    compress(replace(options, dense_out=tmp_path / "dense"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is LlamaForCausalLM
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"
    assert torch.allclose(logits(tmp_path / "dense"), logits(options.out), atol=1e-4)
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    # What was compressed can be compressed again, as can the dense folder: both are the same function.
    again = compress(replace(options, source=str(options.out), out=tmp_path / "again", keep=1.0))
    assert again.before.perplexity == pytest.approx(again.after.perplexity, rel=1e-4)


def test_a_refit_lowers_the_loss_and_is_never_worse(options: CompressOptions) -> None:
    plain = compress(replace(options, keep=0.5))
    result = compress(replace(options, keep=0.5, out=options.out.with_name("refitted"), refit="6000"))
    assert result.refit is not None and 6000 <= result.refit.tokens < 6200
    assert result.refit.loss_after <= result.refit.loss_before
    assert result.after.perplexity < plain.after.perplexity
    assert result.after.parameters == plain.after.parameters


def test_a_refit_that_was_cut_off_goes_on_to_the_same_bytes(options: CompressOptions) -> None:
    options = replace(options, keep=0.5, refit="4000")
    compress(options)
    again = replace(options, out=options.out.with_name("again"))

    with pytest.raises(Cut):
        compress(again, cut_at("refitting", 0.55))
    seen: list[float] = []
    result = compress(again, lambda now, done: seen.append(done) if now == "refitting" else None)
    assert 0.3 < seen[0] < 0.65 and result.refit is not None and 4000 <= result.refit.tokens < 4200
    assert digest(again.out) == digest(options.out)


def test_a_damaged_refit_is_named_and_kept(options: CompressOptions) -> None:
    options = replace(options, keep=0.5, refit="2000")

    with pytest.raises(Cut):
        compress(options, cut_at("refitting", 0.35))
    kept = list(options.work_path.glob("refit/*/model.safetensors"))
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        compress(options)
    assert kept and all(path.is_file() for path in kept)


def test_a_refit_of_another_length_begins_anew(options: CompressOptions) -> None:
    options = replace(options, keep=0.5, refit="4000")

    with pytest.raises(Cut):
        compress(options, cut_at("refitting", 0.55))
    seen: list[float] = []
    compress(replace(options, refit="2000"), lambda now, done: seen.append(done) if now == "refitting" else None)
    assert seen[0] < 0.2


def test_a_refit_that_only_harms_is_not_kept(options: CompressOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalmagrove.compression.refit.LEARNING_RATE", 0.3)
    compress(options)
    result = compress(replace(options, out=options.out.with_name("refitted"), refit="2000"))
    assert result.refit is not None and result.refit.loss_after == result.refit.loss_before
    assert digest(options.out.with_name("refitted")) == digest(options.out)


def test_a_perplexity_is_reached_with_fewer_parameters(options: CompressOptions) -> None:
    dense = compress(replace(options, keep=1.0)).before.perplexity
    target = 1.2 * dense
    result = compress(replace(options, out=options.out.with_name("target"), keep=None, target_ppl=target))
    assert result.after.perplexity <= target
    assert result.after.parameters < 0.95 * result.before.parameters
    with pytest.raises(UsageError, match="below the dense model's own"):
        compress(replace(options, out=options.out.with_name("none"), keep=None, target_ppl=0.9 * dense))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.0}, "--keep must be above 0 and at most 1, got 0"),
        ({"keep": 1.5}, "--keep must be above 0 and at most 1"),
        ({"keep": None}, "give one of --keep, --rank and --target_ppl"),
        ({"rank": 3}, "not keep and rank"),
        ({"keep": 0.05}, "out of reach: embeddings, head, norms and rank 1 everywhere are"),
        ({"calibration_tokens": 64}, "fewer than 4 windows of 32 tokens"),
        ({"calibration_tokens": 10**6}, r"holds only [\d,]+ tokens; [\d,]+ are needed"),
        ({"context_length": 65}, "longer than the model's context, 64"),
        ({"refit": "soon"}, "neither a duration"),
        ({"source": "nowhere"}, "is not a folder"),
        ({"source": "nowhere.gguf"}, r"nowhere\.gguf"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error_and_leaves_nothing(
    changes: dict[str, Any], message: str, options: CompressOptions
) -> None:
    with pytest.raises(KalmaGroveError, match=message):
        compress(replace(options, **changes))
    assert not options.out.exists() and not options.out.with_name("small.work").exists()


def test_an_output_that_exists_is_not_touched(options: CompressOptions) -> None:
    options.out.mkdir()
    (options.out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        compress(options)
    assert [path.name for path in options.out.iterdir()] == ["mine.txt"]


def damaged(name: str, folder: Path) -> str:
    """Damages a model folder in a named way; returns what the error says."""
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if name == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        return "pickled weights.*safe_serialization"
    if name == "no weights":
        weights.unlink()
        return r"holds no model\.safetensors"
    if name == "architecture":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
        return "architecture 'mamba'; gpt2, "
    if name == "document mask":
        (folder / "config.json").write_text(json.dumps(config | {"document_mask": True}))
        return "was trained with model.document_mask"
    if name == "quantised":
        quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
        return "quantised weights"
    if name == "shards":
        index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return r"lacks model-2\.safetensors \(1 of 2 files"
    if name == "NaN":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
        return r"model\.layers\.1\.mlp\.up_proj\.weight hold NaN"
    (folder / "config.json").write_text("{")
    return r"cannot read .*config\.json"


DAMAGES = ["pickle", "no weights", "architecture", "document mask", "quantised", "shards", "NaN", "config"]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_cannot_be_compressed_is_refused_by_what_is_wrong(
    name: str, options: CompressOptions, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(options.source, folder)
    with pytest.raises(KalmaGroveError, match=damaged(name, folder)):
        compress(replace(options, source=str(folder)))
    assert not options.out.exists() and not options.out.with_name("small.work").exists()


def test_weights_are_stored_in_the_sources_type(options: CompressOptions, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.bfloat16).save_pretrained(half)
    shutil.copyfile(Path(options.source) / "tokenizer.json", half / "tokenizer.json")
    assert open_source(str(half)).dtype == torch.bfloat16
    compress(replace(options, source=str(half)))
    kinds = {t.dtype for t in load_file(options.out / "model.safetensors").values() if t.is_floating_point()}
    assert kinds == {torch.bfloat16}


def test_a_refit_is_minutes_or_tokens() -> None:
    assert parse_refit("10m") == RefitLength(600.0, None)
    assert parse_refit("500k") == RefitLength(None, 500_000)
    with pytest.raises(UsageError, match="neither a duration"):
        parse_refit("0s")
    assert parse_refit("1234") == RefitLength(None, 1234)


def test_results_are_plain_numbers(options: CompressOptions) -> None:
    result = compress(options)
    assert isinstance(result, CompressResult)
    assert json.loads(json.dumps(result.to_dict()))["before"]["tokens_per_second"] > 0


def test_units_of_feed_forwards_go_where_that_costs_less(options: CompressOptions, tmp_path: Path) -> None:
    """A feed-forward whose second half repeats its first loses half of its units and nothing else."""
    source = tmp_path / "doubled"
    model = AutoModelForCausalLM.from_pretrained(options.source)
    with torch.no_grad():
        for layer in model.model.layers:
            half = layer.mlp.up_proj.out_features // 2
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[half:] = part.weight[:half]
    shutil.copytree(options.source, source)
    model.save_pretrained(source)
    result = compress(replace(options, source=str(source), keep=0.8))
    assert result.cut >= 2 and result.units_kept < 0.8
    assert result.after.perplexity < 1.05 * result.before.perplexity
    assert AutoModelForCausalLM.from_pretrained(options.out).config.sizes
