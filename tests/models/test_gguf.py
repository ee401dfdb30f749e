"""GGUF files read back: the same logits and tokens as the model that they were written from; and what cannot be one."""

import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mistral import MistralConfig, MistralForCausalLM

from kalmagrove.adaptors import Adaptors, save_adaptor
from kalmagrove.cli import main
from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import END_OF_TEXT, save_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.exporting.folders import export_gguf
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.convert import load_model, write_folder
from kalmagrove.models.convert import save_model as save_ours

pytest.importorskip("gguf", reason="the extra gguf is not installed")

ROWS = 307
"""Of the embedding: more than the 300 tokens of the text."""
SIZES = {"vocab_size": ROWS, "hidden_size": 48, "num_hidden_layers": 2, "head_dim": 8, "max_position_embeddings": 64}
STOCK = {
    "vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
WIDER = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}


def ours(preset: str, **options: Any) -> PreTrainedModel:
    return build_model(model_config(preset, SIZES | options, bos_token_id=0, eos_token_id=0), seed=0)


# transformers' reader makes every GPT-2 one of 1,024 positions.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: ours("llama"),
    "grove": lambda: ours("llama", projections="grove", sharing="cycle", group_size=2),
    "untied": lambda: ours("llama", tie_word_embeddings=False),
    "gpt2": lambda: ours("gpt2", max_position_embeddings=1024),
    "grouped": lambda: LlamaForCausalLM(LlamaConfig(**STOCK | WIDER, rope_parameters=ROPE)),
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
TEXTS = [
    "The river follows 17 gardens.",
    "na\u00efve \u20ac5 \U0001f600 ''s \t\n x",
    f"{END_OF_TEXT}The end{END_OF_TEXT}",
]
DIGITS_AFTER_SPACES = "a\n\n12  3 x   45"


def folder_of(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)
    if model.config.model_type == "kalmagrove":
        save_ours(model, folder)
    else:
        write_folder(model, folder)
    save_tokenizer(tokenizer, folder, context_length=64)
    return folder


@pytest.fixture(params=MODELS)
def written(request: pytest.FixtureRequest, packed: PackedText, tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = folder_of(MODELS[request.param](), packed.load_tokenizer(), tmp_path / "model")
    assert main(["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "files" / "book.gguf")]) == 0
    return tmp_path


def test_a_file_read_back_gives_the_same_logits_and_tokens(written: Path, packed: PackedText) -> None:
    files = {"pretrained_model_name_or_path": str(written / "files"), "gguf_file": "book.gguf"}
    model = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32).eval()
    source = load_model(written / "model")
    tokens = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = source(input_ids=tokens).logits
        assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-4)
        assert not torch.allclose(expected[:, 1:], expected[:, :-1], atol=1e-2)
    read, tokenizer = AutoTokenizer.from_pretrained(**files), packed.load_tokenizer()
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text).ids
    assert read.eos_token_id == 0 and len(read.get_vocab()) >= 300
    assert [path.name for path in (written / "files").iterdir()] == ["book.gguf"]


def test_llama_cpp_itself_gives_the_same_tokens_and_probabilities(written: Path, packed: PackedText) -> None:
    llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a package, is not installed")
    options = llama_cpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(written / "files" / "book.gguf"), 64, 1
    options.cpuparams.n_threads, options.warmup, options.port, options.verbosity = 1, False, 0, 0
    server = llama_cpp.Server(options)

    def ask(path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    tokenizer = packed.load_tokenizer()
    for text in [*TEXTS, DIGITS_AFTER_SPACES]:
        assert ask("/tokenize", {"content": text, "parse_special": True})["tokens"] == tokenizer.encode(text).ids
    ids = tokenizer.encode(TEXTS[0]).ids
    with torch.no_grad():
        all_expected = load_model(written / "model")(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    # It shows no probabilities of a text that ends at once.
    length = next(n for n in range(5, len(ids)) if int(all_expected[n - 1].argmax()) != 0)
    expected = all_expected[length - 1]
    answer = ask("/completion", {"prompt": ids[:length], "n_predict": 1, "temperature": 0, "n_probs": 20})
    found = answer["completion_probabilities"][0]["top_logprobs"]
    assert len(found) == 20 and found[0]["id"] == int(expected.argmax())
    # Its cache of keys and values is float16.
    for token in found:
        assert token["logprob"] == pytest.approx(float(expected[token["id"]]), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_matrices_keep_their_number_type_and_vectors_are_float32(
    dtype: torch.dtype, packed: PackedText, tmp_path: Path
) -> None:
    from gguf import GGUFReader, dequantize

    folder = folder_of(MODELS["llama"]().to(dtype), packed.load_tokenizer(), tmp_path / "model")
    export_gguf(str(folder), tmp_path / "book.gguf")
    reader = GGUFReader(tmp_path / "book.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = load_model(folder).state_dict()
    assert stored["model.embed_tokens.weight"].dtype == dtype
    short = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {short, "F32"}
    for theirs, name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        found = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        assert torch.equal(found, stored[name].float())
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adaptor_is_merged_and_a_chat_template_taken_along(place: str, packed: PackedText, tmp_path: Path) -> None:
    folder = folder_of(MODELS["llama"](), packed.load_tokenizer(), tmp_path / "model")
    if place.endswith(".json"):
        options = json.loads((folder / place).read_text()) if (folder / place).is_file() else {}
        (folder / place).write_text(json.dumps(options | {"chat_template": "{{ messages }}"}))
    else:
        (folder / place).write_text("{{ messages }}")
    adaptors = Adaptors(load_model(folder))
    with torch.no_grad():
        for core in adaptors.add_adaptor("legal", rank=4).values():
            core.normal_(generator=torch.Generator().manual_seed(2))
    save_adaptor(adaptors, "legal", tmp_path / "legal")
    words = ["export", str(folder), "--format", "gguf", "--adaptor", str(tmp_path / "legal"), "--out"]
    assert main([*words, str(tmp_path / "book.gguf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="book.gguf", dtype=torch.float32)
    tokens = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(2))
    adaptors.set_adaptor("legal")
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, adaptors.model(input_ids=tokens).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="book.gguf").chat_template == "{{ messages }}"


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "kalmagrove": (
        lambda: ours("kalmagrove"),
        "it differs in attention, qk_norm, short_conv, value_residual, embedding_r",
    ),
    "slim": (
        lambda: ours("slim"),
        "in which llama.cpp runs Llama and GPT-2: as llama it differs in qk_norm, short_conv",
    ),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**STOCK)), "it is a mistral, and only Llama and GPT-2"),
    "bias": (lambda: LlamaForCausalLM(LlamaConfig(**STOCK, attention_bias=True)), "it has attention_bias = True"),
    "rope": (
        lambda: LlamaForCausalLM(LlamaConfig(**STOCK, rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0})),
        "it has linear rotary positions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused_and_nothing_is_written(
    case: str, packed: PackedText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = REFUSED[case]
    folder = folder_of(make(), packed.load_tokenizer(), tmp_path / "model")
    assert main(["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "out" / "x.gguf")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*gguf*"))


def changed(tokenizer: Tokenizer, how: str) -> Tokenizer:
    if how == "normaliser":
        tokenizer.normalizer = normalizers.Lowercase()
    elif how == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif how == "kind":
        tokenizer.model = models.WordLevel({END_OF_TEXT: 0, "a": 1}, unk_token="a")
    return tokenizer


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("normaliser", "it changes the text before it is cut"),
        ("words", "it cuts text into words in another way"),
        ("kind", "its tokens are not those of a plain byte-level BPE"),
    ],
)
def test_a_tokeniser_that_llama_cpp_does_not_know_is_refused(
    how: str, message: str, packed: PackedText, tmp_path: Path
) -> None:
    folder = folder_of(MODELS["llama"](), changed(packed.load_tokenizer(), how), tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        export_gguf(str(folder), tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_a_tokeniser_of_another_model_is_refused(packed: PackedText, tmp_path: Path) -> None:
    folder = folder_of(ours("llama", vocab_size=290), packed.load_tokenizer(), tmp_path / "model")
    with pytest.raises(KalmaGroveError, match="has tokens that its model does not know"):
        export_gguf(str(folder), tmp_path / "x.gguf")


def test_a_file_is_written_whole_or_not_at_all(
    packed: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    folder = folder_of(MODELS["llama"](), packed.load_tokenizer(), tmp_path / "model")

    def full_disk(self: Any, **_: Any) -> None:
        self.write_ti_data_to_file()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full_disk)
        with pytest.raises(KalmaGroveError, match=r"cannot write .*x\.gguf: .*No space left"):
            export_gguf(str(folder), tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "x.gguf").write_text("mine")
    words = ["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "x.gguf")]
    assert main(words) == 2 and "exists; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "x.gguf").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(words) == 2 and "pip install 'kalmagrove[gguf]'" in capsys.readouterr().err
