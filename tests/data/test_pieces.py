"""Texts that are tokenised piece by piece have the tokens that they have as a whole."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kalmagrove.data import pieces
from kalmagrove.data.pieces import PieceEncoder, make_encoder, splits_before_white_space
from kalmagrove.data.tokenizer import train_tokenizer

STORED = np.dtype("<u2")
LETTERS = [
    *"aab 1 \n\t  .,'s'll<|>_-\r\x0b\x0c\x1c\x1d\x1e\x1f\x00",
    *"\x85\u00a0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff",
    *"\u00e9\u65e5\u672c\U0001f600\u00b2\u2167\u0663e\u0301",
    "<|endoftext|>",
    " the",
    "it's",
]


def texts(number: int, longest: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choice(LETTERS) for _ in range(chance.randrange(longest))) for _ in range(number)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(texts(400, 60, seed=0), 600)


def changed(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def whole(tokenizer: Tokenizer, many: list[str]) -> list[list[int]]:
    plain = changed(tokenizer)
    plain.encode_special_tokens = True
    return [plain.encode(text, add_special_tokens=False).ids for text in many]


def by_encoder(tokenizer: Tokenizer, many: list[str]) -> list[list[int]]:
    return [np.frombuffer(stored, STORED).tolist() for stored in make_encoder(tokenizer, STORED)(many)]


def test_pieces_have_the_tokens_of_the_whole_text(trained: Tokenizer) -> None:
    assert splits_before_white_space(trained)
    many = [*texts(5000, 40, seed=1), "", " ", "\n\n"]
    assert by_encoder(trained, many) == whole(trained, many)


def test_gpt2s_pattern_without_digits_is_split_alike(trained: Tokenizer) -> None:
    gpt2 = changed(trained)
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert splits_before_white_space(gpt2)
    many = texts(3000, 40, seed=2)
    assert by_encoder(gpt2, many) == whole(gpt2, many) != whole(trained, many)


def with_prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_one_word(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def without_splitting(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])


def with_normalizer(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Strip()


def with_token_of_spaces(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("a b", normalized=False)])


@pytest.mark.parametrize(
    "change", [with_prefix_space, with_one_word, without_splitting, with_normalizer, with_token_of_spaces]
)
def test_other_tokenizers_get_the_whole_text(trained: Tokenizer, change: Callable[[Tokenizer], None]) -> None:
    other = changed(trained)
    change(other)
    assert not splits_before_white_space(other)
    many = texts(500, 40, seed=3)
    assert by_encoder(other, many) == whole(other, many)


def test_a_model_of_another_kind_gets_the_whole_text() -> None:
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unigram.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), unk_token="<unk>"
    )
    unigram.train_from_iterator(texts(200, 60, seed=0), trainer)
    assert not splits_before_white_space(unigram)


def test_what_is_remembered_is_bounded_and_forgetting_changes_nothing(
    trained: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_REMEMBERED_BYTES", 20_000)
    encoder = make_encoder(trained, STORED)
    assert isinstance(encoder, PieceEncoder)
    many = texts(2000, 40, seed=4)
    sizes = []
    for start in range(0, len(many), 50):
        part = many[start : start + 50]
        stored = [np.frombuffer(tokens, STORED).tolist() for tokens in encoder(part)]
        assert stored == whole(trained, part)
        sizes.append(len(encoder._known))
    assert max(sizes) < 1000 < len({piece for text in many for piece in pieces._PIECE.findall(text)})


def test_a_piece_that_comes_again_is_encoded_once() -> None:
    asked: list[str] = []

    def encode(many: list[str]) -> list[bytes]:
        asked.extend(many)
        return [text.encode() for text in many]

    encoder = PieceEncoder(encode)
    assert encoder(["a b a b\n", "b a"]) == [b"a b a b\n", b"b a"]
    assert encoder([" b a c"]) == [b" b a c"]
    assert asked == ["a", " b", " a", "\n", "b", " c"]
