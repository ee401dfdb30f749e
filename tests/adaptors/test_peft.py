"""The ``peft`` library: plain LoRA on our models, and task cores as one of its methods."""

from pathlib import Path

import pytest
import torch
from adapted_models import fill, grove, logits_of
from torch import Tensor, nn

from kalmagrove.adaptors import Adaptors
from kalmagrove.models.merging import merge
from kalmagrove.nn.grove import GroveLinear

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'kalmagrove[peft]'")

from kalmagrove.adaptors.peft_method import TaskCoreConfig, TaskCoreLayer  # noqa: E402

# peft asks transformers for a property under its older name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def draw(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kalmagrove_core" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("dense", [False, True], ids=["grove", "merged"])
def test_plain_lora_works_on_our_models(dense: bool, tokens: Tensor) -> None:
    model = merge(grove()) if dense else grove()
    base = logits_of(model, tokens)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits_of(adapted, tokens), base)
    loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    # Grove's layers are not torch's: LoRA reaches attention where they are merged.
    assert any("q_proj" in name for name in trained) is dense and any("up_proj" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.5 * parameter.grad
    assert adapted(input_ids=tokens, labels=tokens).loss < loss


def test_task_cores_are_the_same_function_as_our_adaptors(model: nn.Module, tokens: Tensor) -> None:
    base = logits_of(model, tokens)
    adaptors = Adaptors(model)
    adaptors.add_adaptor("legal", 3)
    fill(adaptors, "legal", 0)
    adaptors.set_adaptor("legal")
    expected = logits_of(model, tokens)
    cores = {name: core.detach() for name, core in adaptors.cores("legal").items()}
    adaptors.detach()
    adapted = peft.get_peft_model(model, TaskCoreConfig(r=3))
    assert torch.equal(logits_of(adapted, tokens), base)
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, TaskCoreLayer)}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.kalmagrove_core["default"].copy_(cores[name.removeprefix("base_model.model.")])
    assert torch.allclose(logits_of(adapted, tokens), expected, atol=1e-6)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 9 * len(layers)


def test_only_the_cores_are_trained_saved_and_loaded(model: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    base = logits_of(model, tokens)
    adapted = peft.get_peft_model(model, TaskCoreConfig(r=3, task_type="CAUSAL_LM"))
    draw(adapted)
    expected = logits_of(adapted, tokens)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, tokens), base)
    adapted.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert 4 * trained < size < 4 * trained + 6000
    draw(adapted, seed=1)
    other = logits_of(adapted, tokens)
    adapted.load_adapter(str(tmp_path), adapter_name="legal")
    adapted.set_adapter("legal")
    assert torch.equal(logits_of(adapted, tokens), expected)
    adapted.set_adapter("default")
    assert torch.equal(logits_of(adapted, tokens), other)
    opened = peft.PeftModel.from_pretrained(adapted.unload(), str(tmp_path))
    assert torch.equal(logits_of(opened, tokens), expected)


def test_merging_and_unloading_gives_a_plain_model(model: nn.Module, tokens: Tensor) -> None:
    adapted = peft.get_peft_model(model, TaskCoreConfig(r=3))
    draw(adapted)
    expected = logits_of(adapted, tokens)
    adapted.merge_adapter()
    assert torch.allclose(logits_of(adapted, tokens), expected, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(logits_of(adapted, tokens), expected)
    plain = adapted.merge_and_unload()
    assert type(plain) is type(model)
    assert not any(isinstance(module, TaskCoreLayer | GroveLinear) for module in plain.modules())
    assert torch.allclose(logits_of(plain, tokens), expected, atol=1e-5)


def test_an_adapter_that_is_added_while_one_is_merged_leaves_it_as_it_is(model: nn.Module, tokens: Tensor) -> None:
    adapted = peft.get_peft_model(model, TaskCoreConfig(r=3))
    draw(adapted)
    expected = logits_of(adapted, tokens)
    adapted.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        adapted.add_adapter("second", TaskCoreConfig(r=6))
    adapted.unmerge_adapter()
    assert torch.equal(logits_of(adapted, tokens), expected)


def test_what_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="task cores need linear layers"):
        peft.get_peft_model(grove(), TaskCoreConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="r must be at least 1"):
        TaskCoreConfig(r=0)
