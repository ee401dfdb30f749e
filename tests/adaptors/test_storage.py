"""An adaptor's folder: exact, small, for one base only, and refused when it is damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted_models import fill, grove, logits_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kalmagrove.adaptors import Adaptors, load_adaptor, model_fingerprint, read_adaptor, save_adaptor
from kalmagrove.adaptors.gradients import text_bases
from kalmagrove.errors import KalmaGroveError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adaptors = Adaptors(grove())
    adaptors.add_adaptor("legal", 3)
    fill(adaptors, "legal", 0)
    save_adaptor(adaptors, "legal", tmp_path / "legal", facts={"steps": 7})
    return tmp_path / "legal"


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_cores(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """With a hash that agrees, so that only the content can be what is refused."""
    import hashlib

    cores = load_file(folder / "adaptor.safetensors")
    change(cores)
    save_file(cores, folder / "adaptor.safetensors")
    digest = hashlib.sha256((folder / "adaptor.safetensors").read_bytes()).hexdigest()
    rewrite(folder / "adaptor.json", lambda content: content.update(sha256=digest))


def test_a_saved_adaptor_computes_the_same_bits_over_another_copy(
    model: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    adaptors = Adaptors(model)
    adaptors.add_adaptor("legal", 4)
    fill(adaptors, "legal", 0)
    adaptors.set_adaptor("legal")
    expected = logits_of(model, tokens)
    save_adaptor(adaptors, "legal", tmp_path / "legal")
    adaptors.detach()
    other = Adaptors(model)
    assert load_adaptor(other, tmp_path / "legal") == "legal"
    assert load_adaptor(other, tmp_path / "legal", name="again") == "again"
    other.set_adaptor("again")
    assert torch.equal(logits_of(model, tokens), expected)


def test_the_folder_holds_the_cores_and_little_else(folder: Path) -> None:
    stored = read_adaptor(folder)
    assert (stored.name, stored.rank, stored.facts) == ("legal", 3, {"steps": 7})
    assert stored.parameters == 12 * 3 * 3
    assert sorted(path.name for path in folder.iterdir()) == ["adaptor.json", "adaptor.safetensors"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * stored.parameters + 2500


def test_bases_of_its_own_are_kept_in_two_bytes_a_number(tokens: Tensor, tmp_path: Path) -> None:
    model = grove()
    adaptors = Adaptors(model)
    bases = text_bases(model, adaptors.layers, [tokens], lambda t: model.token_loss_sum(t[:, :-1], t[:, 1:]), 3)
    adaptors.add_adaptor("legal", core="diagonal", bases=bases)
    fill(adaptors, "legal", 0)
    adaptors.set_adaptor("legal")
    expected = logits_of(model, tokens)
    save_adaptor(adaptors, "legal", tmp_path / "legal")
    adaptors.detach()
    other = Adaptors(model)
    other.set_adaptor(load_adaptor(other, tmp_path / "legal"))
    assert torch.equal(logits_of(model, tokens), expected)
    numbers = sum(basis.numel() for pair in bases.values() for basis in pair)
    assert (tmp_path / "legal" / "adaptor.safetensors").stat().st_size < 2 * numbers + 4 * 4 * 12 + 5000
    rewrite_cores(tmp_path / "legal", lambda tensors: tensors.pop(min(tensors, key=len).replace("core", "left")))
    with pytest.raises(KalmaGroveError, match=r"adaptor\.safetensors lacks tensors of an adaptor"):
        read_adaptor(tmp_path / "legal")


def test_an_adaptor_of_another_base_is_refused(folder: Path) -> None:
    model = grove()
    with torch.no_grad():
        next(model.parameters()).flatten()[0].add_(1e-3)
    adaptors = Adaptors(model)
    with pytest.raises(KalmaGroveError, match="was trained over another base model"):
        load_adaptor(adaptors, folder)
    assert adaptors.names == []


def test_the_fingerprint_is_of_names_shapes_and_values() -> None:
    model = grove()
    first = model_fingerprint(model)
    assert first == model_fingerprint(grove()) == model_fingerprint(grove().to(torch.float64))
    assert first != model_fingerprint(grove(short_conv=0))
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 2] += 1e-4
    assert first != model_fingerprint(model)


def test_a_name_that_is_taken_is_refused(folder: Path) -> None:
    adaptors = Adaptors(grove())
    load_adaptor(adaptors, folder)
    with pytest.raises(UsageError, match="'legal' exists already"):
        load_adaptor(adaptors, folder)


def test_numbers_that_are_not_finite_are_neither_written_nor_read(folder: Path, tmp_path: Path) -> None:
    adaptors = Adaptors(grove())
    cores = adaptors.add_adaptor("broken", 3)
    with torch.no_grad():
        next(iter(cores.values()))[0, 1] = float("nan")
    with pytest.raises(KalmaGroveError, match="'broken' has numbers that are not finite"):
        save_adaptor(adaptors, "broken", tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    rewrite_cores(folder, lambda cores: next(iter(cores.values())).fill_(float("inf")))
    with pytest.raises(KalmaGroveError, match="holds numbers that are not finite"):
        load_adaptor(Adaptors(grove()), folder)


def test_a_merged_adaptor_is_not_saved(tmp_path: Path) -> None:
    adaptors = Adaptors(grove())
    adaptors.add_adaptor("legal", 3)
    adaptors.set_adaptor("legal")
    adaptors.merge()
    with pytest.raises(UsageError, match="unmerge it first"):
        save_adaptor(adaptors, "legal", tmp_path / "legal")


DESCRIPTION_DAMAGE = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "no json": lambda path: path.write_bytes(b"\xff{"),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "huge": lambda path: path.write_bytes(b" " * (2 << 20)),
    "no hash": lambda path: rewrite(path, lambda content: content.pop("sha256")),
    "a number for a name": lambda path: rewrite(path, lambda content: content.update(name=7)),
    "a path for a name": lambda path: rewrite(path, lambda content: content.update(name="../x")),
    "no rank": lambda path: rewrite(path, lambda content: content.update(rank=True)),
    "another rank": lambda path: rewrite(path, lambda content: content.update(rank=10**9)),
    "a later format": lambda path: rewrite(path, lambda content: content.update(format_version=2)),
    "another hash": lambda path: rewrite(path, lambda content: content.update(sha256="0" * 64)),
    "facts that are none": lambda path: rewrite(path, lambda content: content.update(facts=[])),
}


@pytest.mark.parametrize("damage", DESCRIPTION_DAMAGE)
def test_a_damaged_description_is_one_clear_error(damage: str, folder: Path) -> None:
    DESCRIPTION_DAMAGE[damage](folder / "adaptor.json")
    adaptors = Adaptors(grove())
    with pytest.raises(KalmaGroveError) as caught:
        load_adaptor(adaptors, folder)
    assert "\n" not in str(caught.value) and adaptors.names == []


CORE_DAMAGE = {
    "gone": lambda folder: (folder / "adaptor.safetensors").unlink(),
    "cut": lambda folder: (folder / "adaptor.safetensors").write_bytes(
        (folder / "adaptor.safetensors").read_bytes()[:-9]
    ),
    "a layer too few": lambda folder: rewrite_cores(folder, lambda cores: cores.pop(next(iter(cores)))),
    "a layer too many": lambda folder: rewrite_cores(folder, lambda cores: cores.update({"x.core": torch.zeros(3, 3)})),
    "not square": lambda folder: rewrite_cores(folder, lambda cores: cores.update({min(cores): torch.zeros(3, 2)})),
    "a vector": lambda folder: rewrite_cores(folder, lambda cores: cores.update({min(cores): torch.zeros(3)})),
    "a smaller core": lambda folder: rewrite_cores(folder, lambda cores: cores.update({min(cores): torch.zeros(2, 2)})),
    "none": lambda folder: rewrite_cores(folder, lambda cores: cores.clear()),
}


@pytest.mark.parametrize("damage", CORE_DAMAGE)
def test_damaged_cores_are_one_clear_error(damage: str, folder: Path) -> None:
    CORE_DAMAGE[damage](folder)
    adaptors = Adaptors(grove())
    with pytest.raises(KalmaGroveError, match=r"adaptor\.safetensors") as caught:
        load_adaptor(adaptors, folder)
    assert "\n" not in str(caught.value) and adaptors.names == []


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    path = folder / "adaptor.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(KalmaGroveError, match="has changed since it was written"):
        read_adaptor(folder)
