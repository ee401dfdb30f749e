"""Wrong configurations are refused with the option's name; presets and sizes are what they claim."""

from typing import Any

import pytest

from kalmagrove.errors import UsageError
from kalmagrove.models.accounting import build_empty, count_parameters
from kalmagrove.models.build import model_config
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.presets import SIZES, preset_names, preset_options, split_preset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batchnorm"}, "norm must be one of rmsnorm, layernorm; got 'batchnorm'"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a positive integer, got 2.5"),
        ({"rank": 129}, "rank 129 must be between 1 and 128"),
        ({"attention": "arnold"}, "attention = arnold needs resolutions"),
        (
            {
                "attention": "arnold",
                "positions": "learned",
                "resolutions": [{"num_heads": 1, "head_dim": 4, "stride": 4}],
            },
            "a group of resolutions has num_heads, head_dim and scales: .*'stride'",
        ),
        ({"resolutions": [{"num_heads": 1, "head_dim": 4}]}, "resolutions need attention = arnold"),
        ({"embedding_rank": 129}, "embedding_rank 129 must be between 1 and hidden_size 128"),
        ({"grove_parts": "heads"}, "grove_parts must be one of all, attention, feed_forward; got 'heads'"),
        ({"short_conv": 1}, "short_conv must be 0"),
        ({"bias": True, "projections": "grove"}, "bias is for dense projections"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"projections": "grove", "sharing": "band", "group_size": 3}, "sharing = band cuts sizes 128, 344 into"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KalmaGroveConfig(**options)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown preset 'kalmgrove-tiny'; did you mean 'kalmagrove-tiny'"):
        split_preset("kalmgrove-tiny")


def test_a_wrong_override_of_a_preset_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="model: rank 4096 must be between 1 and"):
        model_config("kalmagrove-tiny", {"rank": 4096})


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_configuration(name: str) -> None:
    model_config(name)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("gpt2-base", 124.4),
        ("gpt2-large", 354.8),
        ("llama-base", 123.6),
        ("llama-large", 353.9),
        ("kalmagrove-base", 74.1),
        ("kalmagrove-large", 177.5),
    ],
)
def test_the_papers_four_sizes(preset: str, millions: float) -> None:
    total = count_parameters(build_empty(model_config(preset))).total
    assert total / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("size", list(SIZES))
def test_the_slim_control_is_as_large_as_kalmagrove(size: str) -> None:
    ours, slim = (
        count_parameters(build_empty(model_config(f"{family}-{size}"))).total for family in ("kalmagrove", "slim")
    )
    assert 0.97 * ours <= slim <= 1.03 * ours


def test_sizes_are_ordered() -> None:
    totals = [count_parameters(build_empty(model_config(f"llama-{size}"))).total for size in SIZES]
    assert totals == sorted(totals)


def test_a_part_is_put_into_another_family_as_kalmagrove_has_it() -> None:
    plain, ours = model_config("llama-small"), model_config("kalmagrove-small")
    grove = model_config("llama-small+grove")
    assert (grove.projections, grove.grove_parts, grove.sharing) == (ours.projections, ours.grove_parts, ours.sharing)
    assert grove.attention == plain.attention and grove.intermediate_size == plain.intermediate_size
    arnold = model_config("llama-small+arnold")
    assert arnold.resolutions[0]["scales"] == ours.resolutions[0]["scales"]
    assert arnold.resolutions[0]["num_heads"] == plain.num_attention_heads and arnold.projections == plain.projections
    both = model_config("llama-small+grove+arnold")
    assert (both.projections, both.attention) == ("grove", "arnold")
    assert not model_config("gpt2-tiny+grove").bias


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama+forest", "unknown part 'forest' of llama"),
        ("llama+grove+grove", "llama names a part twice"),
        ("kalmagrove+arnold", "kalmagrove has arnold already"),
    ],
)
def test_a_part_that_cannot_be_put_in_is_named(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_config(name)


def test_full_attention_instead_of_arnolds_keeps_the_heads() -> None:
    ours, full = model_config("kalmagrove-small"), model_config("kalmagrove-small", {"attention": "full"})
    assert full.attention == "full" and full.resolutions is None
    assert full.num_attention_heads == ours.num_attention_heads
    llama = model_config("llama-small", {"attention": "full"})
    assert llama.num_attention_heads == model_config("llama-small").num_attention_heads


def test_heads_of_full_attention_are_not_taken_for_arnolds() -> None:
    with pytest.raises(UsageError, match="kalmagrove-mini has Arnold's groups of heads"):
        preset_options("kalmagrove-mini", {"num_attention_heads": 8})
    assert preset_options("kalmagrove-mini", {"num_attention_heads": 8, "attention": "full"})["resolutions"] is None
