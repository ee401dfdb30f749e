"""Who takes part in a comparison, and on what terms."""

import pytest

from kalmagrove.comparison.config import CompareConfig, Rates
from kalmagrove.comparison.plan import planned_steps
from kalmagrove.data.packing import PackedText
from kalmagrove.errors import UsageError
from kalmagrove.training.config import DataConfig, LoopConfig, OptimConfig


def test_plain_transformers_get_adamw_and_the_others_kalma_by_default() -> None:
    contestants = CompareConfig(models="gpt2,llama-tiny,slim,kalmagrove", size="small").contestants()
    assert [(c.name, c.optim) for c in contestants] == [
        ("gpt2-small", "adamw"),
        ("llama-tiny", "adamw"),
        ("slim-small", "kalma"),
        ("kalmagrove-small", "kalma"),
    ]


def test_one_preset_with_two_optimisers_gets_two_names() -> None:
    contestants = CompareConfig(models="llama,llama", optim="adamw,kalma").contestants()
    assert [c.name for c in contestants] == ["llama-mini+adamw", "llama-mini+kalma"]
    with pytest.raises(UsageError, match="the same preset and optimiser twice"):
        CompareConfig(models="llama,llama", optim="kalma")


@pytest.mark.parametrize(
    ("trials", "scales"), [(1, [1.0]), (2, [0.5, 1.0]), (3, [0.5, 1.0, 2.0]), (4, [0.25, 0.5, 1.0, 2.0])]
)
def test_trials_are_powers_of_two_around_one(trials: int, scales: list[float]) -> None:
    assert CompareConfig(trials=trials).scales() == scales


def test_every_side_gets_the_same_data_length_and_seed() -> None:
    config = CompareConfig(data=DataConfig(vocab_size=300), loop=LoopConfig(batch_size=4, context_length=24))
    ours, theirs = (config.train_config(c, rates=Rates(2.0), seed=7, steps=11) for c in config.contestants())
    assert ours.data == theirs.data and ours.loop == theirs.loop
    assert ours.loop.total_steps == 11 and ours.loop.seed == 7
    assert ours.optim.weight_decay == theirs.optim.weight_decay
    assert ours.optim.lr_scale == theirs.optim.lr_scale == 2.0


def test_without_a_budget_the_tokens_decide(packed: PackedText) -> None:
    config = CompareConfig(size="tiny", loop=LoopConfig(tokens="8k", batch_size=4, context_length=100))
    assert planned_steps(config, packed, say=print) == 20


def test_a_vocabulary_that_is_asked_for_is_given_whatever_is_usual() -> None:
    table = DataConfig("t.csv", modality="table", vocab_size=4096)
    assert table.modality_options()["text_vocab_size"] == 4096
    assert DataConfig("t.csv", modality="table").modality_options()["text_vocab_size"] == 1024
    assert DataConfig().vocab_size == 4096


def test_learning_rates_and_warm_up_have_defaults_for_each_optimiser() -> None:
    assert OptimConfig(name="adamw").peak_rates()["lr"] == 1.5e-3
    assert OptimConfig(name="muon").peak_rates()["lr"] == 1e-2
    scaled = OptimConfig(name="adamw", lr=0.01, lr_scale=0.5).peak_rates()
    assert scaled == {"lr": 0.005, "auxiliary_lr": 0.01, "core_lr": 0.001}
    assert OptimConfig(name="kalma").warmup_part > OptimConfig(name="muon").warmup_part


def test_a_model_names_its_parts_and_its_optimiser() -> None:
    contestants = CompareConfig(models="llama,llama+kalma,llama+grove,llama-small+grove+arnold+muon").contestants()
    assert [(c.name, c.preset, c.optim) for c in contestants] == [
        ("llama-mini+adamw", "llama-mini", "adamw"),
        ("llama-mini+kalma", "llama-mini", "kalma"),
        ("llama-mini+grove", "llama-mini+grove", "adamw"),
        ("llama-small+grove+arnold", "llama-small+grove+arnold", "muon"),
    ]
    mixed = CompareConfig(models="llama+adamw,kalmagrove", optim="muon").contestants()
    assert [c.optim for c in mixed] == ["adamw", "muon"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "llama,llama+adam"}, "'adam' in llama.adam is neither a part nor an optimiser"),
        ({"models": "llama,llama+adamw+kalma"}, "names more than one optimiser"),
        ({"models": "llama+kalma,slim", "optim": "adamw,kalma"}, "optim may name one for the others but no list"),
    ],
)
def test_a_wrong_model_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompareConfig(**options)
