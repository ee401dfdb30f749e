"""What a compression looks at is what a training would learn from."""

from pathlib import Path

from kalmagrove.compression.calibration import read_calibration_text
from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import save_tokenizer


def test_held_out_splits_are_not_looked_at(packed: PackedText, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("".join(f"{split} line {number}\n" for number in range(400)))
    tokenizer = packed.load_tokenizer()
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(tokenizer, tmp_path / "tokenizer", context_length=64)
    text = read_calibration_text(
        str(tmp_path / "text"),
        str(tmp_path / "tokenizer"),
        tokens=1024,
        context_length=64,
        vocab_size=packed.vocab_size,
    )
    for windows in (text.train, text.valid):
        read = tokenizer.decode(windows.flatten().tolist())
        assert "train line" in read and "test line" not in read and "valid line" not in read
