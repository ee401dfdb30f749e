"""Tokenisers are trained reproducibly, lose no text, and open in transformers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from kalmagrove.data import tokenizer as tokenizer_module
from kalmagrove.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from kalmagrove.errors import KalmaGroveError, UsageError

TEXTS = ["the cat sat on the mat and the dog sat on the log\n" * 3, "in 2024 the price was 1999 or 2024 crowns, 2024!"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 290)


@pytest.mark.parametrize(
    "text", ["the cat", " two  spaces\t\r\n\n", "na\u00efve \u65e5\u672c \U0001f600 \x00\x7f", "2024", ""]
)
def test_any_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_vocabulary_is_used_and_digits_stay_single(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 290 and tokenizer.token_to_id(END_OF_TEXT) == 0
    assert len(tokenizer.encode("2024").ids) == 4
    assert len(tokenizer.encode("the the").ids) < 4


def test_training_gives_the_same_in_another_process(tokenizer: Tokenizer) -> None:
    code = (
        "import sys, json; from kalmagrove.data.tokenizer import train_tokenizer, tokenizer_fingerprint;"
        "print(tokenizer_fingerprint(train_tokenizer(json.load(sys.stdin), 290)))"
    )
    found = subprocess.run([sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True)
    assert found.stdout.strip() == tokenizer_fingerprint(tokenizer), found.stderr


def test_training_reads_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def documents() -> Iterator[str]:
        for number in range(100):
            read.append(number)
            yield "abcdefgh"

    whole = train_tokenizer(["abcdefgh", "abcdefgh", "abcd"], 300)
    monkeypatch.setattr(tokenizer_module, "_MOST_BYTES", 20)
    assert tokenizer_fingerprint(train_tokenizer(documents(), 300)) == tokenizer_fingerprint(whole)
    assert len(read) == 3
    monkeypatch.setattr(tokenizer_module, "_MOST_BYTES", 3)
    train_tokenizer(["\u00e9\u00e9"], 300)


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    assert train_tokenizer(TEXTS, 258).get_vocab_size() == 258
    with pytest.raises(UsageError, match=r"vocab_size must be at least 258 .* got 257"):
        train_tokenizer(TEXTS, 257)


def test_saved_and_loaded_by_file_or_folder_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, context_length=None)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizer_fingerprint(load_tokenizer(str(path))) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 280)) != tokenizer_fingerprint(tokenizer)


def test_loading_turns_truncation_and_padding_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(2)
    limited.enable_padding(length=50)
    limited.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1]).ids


def test_transformers_opens_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, context_length=77)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened(TEXTS[1]).input_ids == tokenizer.encode(TEXTS[1]).ids
    assert opened.decode(opened(" a , b ").input_ids) == " a , b "
    assert (opened.eos_token, opened.eos_token_id, opened.bos_token_id) == (END_OF_TEXT, 0, 0)
    assert opened.model_max_length == 77 and len(opened) == 290


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<eos>"])
def test_other_names_of_the_end_of_text_are_known(name: str) -> None:
    assert end_of_text_id(Tokenizer(models.WordLevel({"a": 0, "b": 1, name: 2}, unk_token="a"))) == 2


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(KalmaGroveError, match=r"none of the end-of-text tokens <\|endoftext\|>, </s>"):
        end_of_text_id(words)
    with pytest.raises(KalmaGroveError, match="none of the end-of-text tokens"):
        save_tokenizer(words, tmp_path, context_length=None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match=r"the folder .* holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    for missing in (str(tmp_path / "gone"), "gone.json", "./gone", ""):
        with pytest.raises(KalmaGroveError, match=f"there is no tokenizer at '{missing}'"):
            load_tokenizer(missing)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(KalmaGroveError, match=r"bad\.json is not a sound tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_a_hub_name_is_fetched_and_its_failure_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(str(tmp_path / "cached.json"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(tmp_path / "cached.json"))
    assert load_tokenizer("owner/name").get_vocab_size() == 290

    def fail(name: str, file: str) -> str:
        raise OSError(f"no {file} in {name}\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(KalmaGroveError, match=r"could not be fetched from the Hub: no tokenizer\.json in owner/name$"):
        load_tokenizer("owner/name")
