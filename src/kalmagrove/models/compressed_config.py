"""CompressedConfig: a model of any architecture, and which of its matrices are factors of what rank."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class CompressedConfig(PretrainedConfig):
    """Configuration of :class:`~kalmagrove.models.compressed.CompressedForCausalLM`.

    Args:
        text_config: Configuration of the dense model, or what ``to_dict`` makes of it.
        bases: Rank and width of each shared basis by its name, (rank, in_features).
        factors: The basis that each factorised layer reads, by the layer's name in the dense model.
        sizes: Inputs and outputs of each layer that has fewer than in the dense model, by its name there.

    Raises:
        ValueError: The dense configuration is missing, or a layer names a basis that is not there.
    """

    model_type = "kalmagrove_compressed"

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        bases: dict[str, list[int]] | None = None,
        factors: dict[str, str] | None = None,
        sizes: dict[str, list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers compares with the defaults of an empty configuration when it writes one.
        given = {"model_type": "llama"} if text_config is None else text_config
        self.text_config: Any = _config_of(given) if isinstance(given, dict) else given
        self.bases = {name: [int(rank), int(width)] for name, (rank, width) in (bases or {}).items()}
        self.factors = dict(factors or {})
        self.sizes = {name: [int(inputs), int(outputs)] for name, (inputs, outputs) in (sizes or {}).items()}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)
        self._check()

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return int(self.text_config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence in tokens."""
        return int(self.text_config.max_position_embeddings)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config.hidden_size)

    def _check(self) -> None:
        both = sorted(self.sizes.keys() & self.factors.keys())
        if both:
            raise ValueError(f"the layer {both[0]} has both factors and a size; give one")
        unknown = sorted(set(self.factors.values()) - self.bases.keys())
        if unknown:
            raise ValueError(f"factors name the basis {unknown[0]}, which bases does not hold")
        for name, (rank, width) in self.bases.items():
            if not 1 <= rank <= width:
                raise ValueError(f"the basis {name} has rank {rank}; it must be between 1 and its width {width}")


def _config_of(values: dict[str, Any]) -> PretrainedConfig:
    options = dict(values)
    model_type = options.pop("model_type", None)
    if model_type is None or model_type == CompressedConfig.model_type:
        raise ValueError(f"text_config.model_type must be a dense architecture's, got {model_type!r}")
    # Imported here: the end of the module's own import registers this one.
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.for_model(model_type, **options)
    return config
