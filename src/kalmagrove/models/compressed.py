"""A dense model of any architecture of transformers, some of whose linear layers are factors over shared bases."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kalmagrove.models.compressed_config import CompressedConfig
from kalmagrove.models.merging import dense_weight
from kalmagrove.nn.compact import CompactBasis, CompactLinear
from kalmagrove.nn.grove import composed_weights


class CompressedForCausalLM(PreTrainedModel, GenerationMixin):
    """The dense model ``decoder`` with its own forward, cache and generation, and its matrices' shared bases.

    Keeping the source's architecture keeps all of it exact: grouped queries, biases, norms of heads, scaled rotary
    positions, sliding windows.
    """

    config_class = CompressedConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__(config)
        self.decoder = new_model(config.text_config)
        for name, (in_features, out_features) in config.sizes.items():
            self.decoder.set_submodule(name, resized(self.decoder.get_submodule(name), in_features, out_features))
        self.bases = nn.ModuleDict({name: CompactBasis(*sizes) for name, sizes in config.bases.items()})
        for name, basis_name in config.factors.items():
            basis = self.bases[basis_name]
            assert isinstance(basis, CompactBasis)
            dense = self.decoder.get_submodule(name)
            in_features, out_features = matrix_sizes(dense)
            layer = CompactLinear(in_features, out_features, basis, bias=has_bias(dense))
            self.decoder.set_submodule(name, layer)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CompactBasis | CompactLinear):
            module.reset_parameters()
        else:
            self.decoder._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.decoder.get_output_embeddings()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss can be reckoned over several batches, which transformers' trainer asks."""
        return bool(getattr(self.decoder, "accepts_loss_kwargs", True))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the dense model's."""
        return self.decoder(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Not here.

        Raises:
            NotImplementedError: Always; a call that asks for the size as it is, with no number, is the decoder's.
        """
        if args or kwargs:
            raise NotImplementedError(
                "a compressed model keeps its vocabulary; write it as a dense one (kalmagrove compress --dense_out) "
                "and resize that"
            )
        return self.get_input_embeddings()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense model's."""
        self.decoder.generation_config = self.generation_config
        with composed_weights(self):
            return self.decoder.generate(*args, **kwargs)


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model of any architecture, with new weights."""
    # Imported here: the end of the module's own import registers this one.
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def matrix_sizes(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, also of GPT-2's transposed one."""
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def resized(layer: nn.Module, in_features: int, out_features: int) -> nn.Module:
    """A linear layer of the same kind with fewer inputs or outputs.

    Raises:
        ValueError: It would have more.
    """
    most = matrix_sizes(layer)
    if not (1 <= in_features <= most[0] and 1 <= out_features <= most[1]):
        raise ValueError(f"a layer of {most} cannot be cut to {in_features} inputs and {out_features} outputs")
    with torch.random.fork_rng(devices=[]):
        if isinstance(layer, Conv1D):
            return Conv1D(out_features, in_features)
        return nn.Linear(in_features, out_features, bias=has_bias(layer))


def has_bias(layer: nn.Module) -> bool:
    """Whether a linear layer adds a bias."""
    return getattr(layer, "bias", None) is not None


@torch.no_grad()
def to_dense(model: CompressedForCausalLM) -> PreTrainedModel:
    """The same function in the source's own architecture, the factors multiplied out.

    The active adaptor is merged too; the given model stays as it is.
    """
    factors = model.config.factors
    weights = {
        name: tensor.clone()
        for name, tensor in model.decoder.state_dict().items()
        if not name.startswith(tuple(f"{layer}." for layer in factors))
    }
    reference = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        dense = new_model(copy.deepcopy(model.config.text_config))
    for name in factors:
        layer = model.decoder.get_submodule(name)
        # A merged adaptor has put a dense layer there.
        weight = dense_weight(layer)
        is_transposed = isinstance(dense.get_submodule(name), Conv1D)
        weights[f"{name}.weight"] = (weight.T if is_transposed else weight).contiguous()
        if has_bias(layer):
            weights[f"{name}.bias"] = layer.bias.clone()
    for name in model.config.sizes:
        # Units of zeros give nothing, in whatever places they stand.
        for part, whole in dense.get_submodule(name).named_parameters():
            cut = weights[f"{name}.{part}"]
            weights[f"{name}.{part}"] = cut.new_zeros(whole.shape)
            weights[f"{name}.{part}"][tuple(map(slice, cut.shape))] = cut
    dense = dense.to(device=reference.device, dtype=reference.dtype)
    dense.load_state_dict(weights, strict=True)
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.train(model.training)
