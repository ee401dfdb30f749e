"""Train, load, save and identify tokenisers; the trained ones are byte-level BPE."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.errors import KalmaGroveError, UsageError, first_line
from kalmagrove.files import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modality.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Of a folder, as far as there are such."""

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 258
"""256 bytes, the end-of-text token and one merge."""

_MOST_BYTES = 1 << 25
"""UTF-8 bytes of the documents that merges are learnt from."""
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|eos|>", "<eos>", "[EOS]")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: any text can be encoded, digits stay single, and token 0 ends a text.

    The same documents give the same tokeniser.

    Args:
        documents: Text to learn merges from; read only as far as needed.
        vocab_size: Largest vocabulary; a short text may give a smaller one.

    Raises:
        UsageError: The vocabulary cannot hold the 256 bytes, the end-of-text token and one merge.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes, the end-of-text token and a merge), "
            f"got {vocab_size}"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(documents), trainer)
    return tokenizer


def load_tokenizer(path_or_name: str) -> Tokenizer:
    """Load a tokeniser from a tokenizer.json, a folder that holds one, or the Hub.

    Args:
        path_or_name: The file, the folder or the Hub name. Truncation and padding set in the file are turned off.

    Raises:
        KalmaGroveError: There is none under that name, or it cannot be read.
    """
    from tokenizers import Tokenizer

    path = local_tokenizer_file(path_or_name) or _download(path_or_name)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises plain Exception for whatever is wrong with the file.
    except Exception as error:
        raise KalmaGroveError(f"{path} is not a sound tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def local_tokenizer_file(path_or_name: str) -> Path | None:
    """The tokenizer.json that a path means, or None where the text is a Hub name.

    Raises:
        KalmaGroveError: The folder holds no tokenizer.json, or the text can only be a path and nothing is there.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    if path_or_name and path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise KalmaGroveError(f"the folder {path_or_name} holds no tokenizer.json; name one that does")
        return path / "tokenizer.json"
    if path.suffix == ".json" or path_or_name[:1] in ("", ".", "/", "~") or path_or_name.count("/") > 1:
        raise KalmaGroveError(
            f"there is no tokenizer at {path_or_name!r}; name a tokenizer.json, its folder or a Hub name"
        )
    return None


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of a tokeniser's serialised form."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, context_length: int | None) -> None:
    """Write the tokeniser files that ``transformers.AutoTokenizer.from_pretrained`` opens.

    Args:
        tokenizer: Has a token that ends a text; it becomes the first and last token of transformers.
        folder: Receives tokenizer.json and tokenizer_config.json; must exist.
        context_length: Longest input of the model in tokens; None where there is no model yet.

    Raises:
        KalmaGroveError: The tokeniser has no token that ends a text.
    """
    name, _ = _end_of_text(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
    }
    if context_length is not None:
        config["model_max_length"] = context_length
    write_text_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_json_atomic(folder / "tokenizer_config.json", config)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token, the added ones among them."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The token that stands after each document.

    Raises:
        KalmaGroveError: The tokeniser has no token of a usual name for it.
    """
    return _end_of_text(tokenizer)[1]


def _end_of_text(tokenizer: Tokenizer) -> tuple[str, int]:
    for name in _END_OF_TEXT_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return name, token
    raise KalmaGroveError(
        f"the tokenizer has none of the end-of-text tokens {', '.join(_END_OF_TEXT_NAMES)}; add one or use another"
    )


def _first_bytes(documents: Iterable[str]) -> Iterator[str]:
    left = _MOST_BYTES
    for document in documents:
        text = document.encode()[:left]
        left -= len(text)
        yield text.decode(errors="ignore")
        if left == 0:
            return


def _download(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    # Network, permission and naming errors have no common base.
    except Exception as error:
        reason = first_line(error)
        raise KalmaGroveError(
            f"the tokenizer {name} is no file or folder here and could not be fetched from the Hub: {reason}"
        ) from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokeniser, as far as the source has them.

    Raises:
        OSError: They cannot be read or written.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
