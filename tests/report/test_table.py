"""The table shows human numbers, ratios to the baseline, and what is missing."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from kalmagrove.report.page import render_page
from kalmagrove.report.results import Results
from kalmagrove.report.table import (
    Cell,
    Table,
    build_table,
    format_bytes,
    format_count,
    format_flops,
    format_score,
    format_seconds,
    to_markdown,
    to_rich,
)

Make = Callable[..., dict[str, Any]]


def table_of(record: dict[str, Any]) -> Table:
    return build_table(Results.from_dict(record))


def cells_of(table: Table, label: str) -> tuple[Cell, ...]:
    return next(row.cells for row in table.rows if row.label == label)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (format_count(1_690_000), "1.69 M"),
        (format_count(999_999), "1.00 M"),
        (format_count(99_960), "100 k"),
        (format_count(852), "852"),
        (format_flops(12_345_678), "12.3 MFLOPs"),
        (format_flops(2.5e9), "2.50 GFLOPs"),
        (format_bytes(184_000_000), "184 MB"),
        (format_bytes(1_230_000_000), "1.23 GB"),
        (format_seconds(0.0842), "84.2 ms"),
        (format_seconds(1.5), "1.50 s"),
        (format_seconds(0.0004), "0.400 ms"),
        (format_score(27.654), "27.65"),
        (format_score(958.88), "958.9"),
        (format_score(1234.4), "1,234"),
    ],
)
def test_numbers_are_short(shown: str, text: str) -> None:
    assert shown == text


def test_costs_have_ratios_to_the_baseline(make_results: Make) -> None:
    baseline, ours = cells_of(table_of(make_results()), "Parameters")
    assert (baseline.text, ours.text) == ("2.00 k", "1.00 k, 0.50x")
    assert ours.ratio is not None and ours.ratio.tone == "better"


def test_time_has_the_median_of_the_paired_ratios_and_their_spread(make_results: Make) -> None:
    record = make_results(time_ratios=(0.5, 0.6, 0.7))
    assert cells_of(table_of(record), "Time a step, paired")[1].text == "80.0 ms, 0.60x (10-90 %: 0.52-0.68)"


def test_time_without_pairs_has_no_ratio(make_results: Make) -> None:
    assert cells_of(table_of(make_results() | {"paired_time": []}), "Time a step, paired")[1].text == "80.0 ms"


def test_one_seed_has_a_ratio_without_an_interval(make_results: Make) -> None:
    baseline, ours = cells_of(table_of(make_results(ours=(33.0,), llama=(30.0,))), "Test perplexity")
    assert (baseline.text, ours.text) == ("30.00", "33.00, 1.100x")
    assert ours.ratio is not None and ours.ratio.tone == "worse"


def test_three_seeds_have_intervals(make_results: Make) -> None:
    table = table_of(make_results(ours=(27.0, 27.9, 28.8), llama=(30.0, 31.0, 32.0)))
    baseline, ours = cells_of(table, "Test perplexity")
    assert baseline.text == "31.00 +/- 2.48"
    assert ours.text == "27.90 +/- 2.24, 0.900x (95 %: 0.900-0.900)"
    assert "3 seeds (0, 1, 2): means with 95 % intervals; ratios are paired by seed" in table.notes


def test_a_ratio_whose_interval_includes_one_is_the_same(make_results: Make) -> None:
    ours = cells_of(table_of(make_results(ours=(29.0, 31.0, 29.5), llama=(30.0,) * 3)), "Test perplexity")[1]
    assert ours.ratio is not None and ours.ratio.value < 1
    assert ours.ratio.tone == "same"


def test_the_notes_say_seeds_tuning_and_length(make_results: Make) -> None:
    assert table_of(make_results()).notes == (
        "less is better in every row; ratios are to llama",
        "1 seed (0): no interval, so a small difference may be chance",
        "learning rates not tuned: preset defaults",
        "10.0 k training tokens, 5.0 tokens a parameter of llama: screening, fewer than 20; long training may rank the "
        "models differently",
    )


def test_long_tuned_training_is_no_screening(make_results: Make) -> None:
    record = make_results() | {"trials": 3}
    record["budget"]["tokens"] = 40_000
    notes = table_of(record).notes
    assert "learning rates tuned on the validation split with seed 0, which is scored too: 3 trials a model" in notes
    assert "40.0 k training tokens, 20 tokens a parameter of llama" in notes
    record["trial_tokens"] = 10_000
    assert table_of(record).notes[2].endswith("3 trials a model of 10.0 k tokens")


def test_missing_and_diverged_runs_are_said(make_results: Make) -> None:
    record = make_results(ours=(27.0, None), llama=(None, None))
    for run in record["models"][0]["runs"]:
        run["diverged"] = True
    table = table_of(record)
    baseline, ours = cells_of(table, "Test perplexity")
    assert (baseline.text, ours.text) == ("diverged", "27.00 (1 of 2 runs)")
    assert table.notes[-2:] == ("diverged: llama seed 0, llama seed 1", "not finished: ours seed 1")


def test_runs_of_several_versions_are_told(make_results: Make) -> None:
    record = make_results(ours=(27.0, 27.1), llama=(30.0, 30.1))
    for model in record["models"]:
        for run in model["runs"]:
            run["source"] = "aaaaaaaaaaaa"
    assert "versions" not in build_table(Results.from_dict(record)).notes[-1]
    record["models"][0]["runs"][0]["source"] = None
    note = build_table(Results.from_dict(record)).notes[-1]
    assert note == "runs by several versions of the package: 1 by unknown, 3 by aaaaaaaaaaaa"


def test_a_perplexity_that_overflows_is_too_large(make_results: Make) -> None:
    record = make_results()
    record["models"][1]["runs"][0]["test"]["word_perplexity"] = None
    assert cells_of(table_of(record), "Test word perplexity")[1].text == "too large"


def test_markdown_has_a_column_a_model_and_escapes_names(make_results: Make) -> None:
    record = make_results() | {"candidate": "a|<b>"}
    record["models"][1]["name"] = "a|<b>"
    lines = to_markdown(table_of(record)).splitlines()
    assert lines[0] == r"|  | llama (baseline) | a\|\<b\> (candidate) |"
    assert lines[1] == "| :-- | --: | --: |"
    assert "| **Test perplexity** | 30.00 | 27.00, 0.900x |" in lines
    assert "- learning rates not tuned: preset defaults" in lines


def test_the_terminal_table_has_the_same_cells_and_takes_names_as_they_are(make_results: Make) -> None:
    record = make_results() | {"candidate": "[red]ours"}
    record["models"][1]["name"] = "[red]ours"
    console = Console(file=io.StringIO(), width=120)
    console.print(to_rich(table_of(record)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "[red]ours" in text
    assert "27.00, 0.900x" in text
    assert "learning rates not tuned: preset defaults" in text


def test_a_table_of_data_has_values_where_a_text_has_words(make_results: Callable[..., dict[str, Any]]) -> None:
    record = make_results()
    labels = [row.label for row in build_table(Results.from_dict(record)).rows]
    assert "Test word perplexity" in labels
    record["data"]["modality"] = "table"
    results = Results.from_dict(record)
    labels = [row.label for row in build_table(results).rows]
    assert "Test perplexity a value" in labels and not any("word" in label for label in labels)
    page = render_page(results)
    assert ">Rows<" in page and "Words" not in page and "ord perplexity" not in page
