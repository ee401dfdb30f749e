"""Results are read strictly, and written as they were read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.errors import KalmaGroveError
from kalmagrove.report.results import Results, load_results

Make = Callable[..., dict[str, Any]]


def test_reading_and_writing_gives_the_same_record(make_results: Make) -> None:
    record = make_results(ours=(27.0, None), llama=(30.0, 31.0))
    written = Results.from_dict(record).to_dict()
    known = written["environment"]
    written["environment"] = {key: known[key] for key in record["environment"]}
    assert written == json.loads(json.dumps(record))


def test_a_missing_field_is_named_with_its_place(make_results: Make) -> None:
    record = make_results()
    del record["models"][1]["runs"][0]["curve"]["seconds"]
    with pytest.raises(KalmaGroveError) as caught:
        Results.from_dict(record, where="runs/demo/results.json")
    assert str(caught.value) == (
        "runs/demo/results.json: field 'models', item 1: field 'runs', item 0: field 'curve': "
        "field 'seconds' is missing"
    )


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("trials", "three", "field 'trials' must be a whole number, got 'three'"),
        ("trials", True, "field 'trials' must be a whole number, got True"),
        ("seeds", 3, "field 'seeds' must be a list, got 3"),
        ("title", None, "field 'title' must be a text, got None"),
        ("data", [], r"field 'data' must be an object, got \[\]"),
    ],
)
def test_a_wrong_value_is_named(make_results: Make, field: str, value: object, text: str) -> None:
    with pytest.raises(KalmaGroveError, match=text):
        Results.from_dict(make_results() | {field: value})


def test_a_baseline_that_is_no_model_is_refused(make_results: Make) -> None:
    with pytest.raises(KalmaGroveError, match="field 'baseline' names 'gpt3', which is not among the models"):
        Results.from_dict(make_results() | {"baseline": "gpt3"})


def test_two_models_of_one_name_are_refused(make_results: Make) -> None:
    record = make_results()
    record["models"].append(record["models"][0])
    with pytest.raises(KalmaGroveError, match="two models of the same name"):
        Results.from_dict(record)


def test_a_comparison_without_a_seed_is_refused(make_results: Make) -> None:
    with pytest.raises(KalmaGroveError, match="field 'seeds' names none"):
        Results.from_dict(make_results() | {"seeds": []})


def test_a_curve_of_unequal_lists_is_refused(make_results: Make) -> None:
    record = make_results()
    record["models"][0]["runs"][0]["curve"]["loss"].pop()
    with pytest.raises(KalmaGroveError, match="a curve of 'llama' has lists of different lengths"):
        Results.from_dict(record)


def test_a_later_format_is_refused_before_its_fields_are_looked_at() -> None:
    with pytest.raises(KalmaGroveError, match="has format 2, but this version reads format 1"):
        Results.from_dict({"format": 2})


def test_results_load_from_a_folder_and_from_the_file(make_results: Make, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(make_results()), encoding="utf-8")
    assert load_results(tmp_path) == load_results(file) == Results.from_dict(make_results())


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError) as caught:
        load_results(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'results.json'} does not exist; give the folder of a comparison"


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"format": 1,', encoding="utf-8")
    with pytest.raises(KalmaGroveError, match=r"results\.json cannot be read as JSON"):
        load_results(tmp_path)


def test_scores_that_overflow_are_not_among_the_values_by_seed(make_results: Make) -> None:
    record = make_results(ours=(27.0, 28.0), llama=(30.0, 31.0))
    record["models"][1]["runs"][0]["test"]["word_perplexity"] = None
    ours = Results.from_dict(record).model("ours")
    assert ours.by_seed("test", "word_perplexity") == {1: 28.0**2}
    assert ours.by_seed("test", "perplexity") == {0: 27.0, 1: 28.0}
