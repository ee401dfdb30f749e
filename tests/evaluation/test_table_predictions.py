"""A model that has learnt a table predicts its columns, fills its gaps and is scored."""

import copy
import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from table_models import COLUMNS, LearntTable, table_text

from kalmagrove.data.tables.codec import Value
from kalmagrove.data.tables.columns import NumberColumn
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.table_imputation import impute, relative_entropy
from kalmagrove.evaluation.table_predictions import PredictionTerms, describe, predict_column
from kalmagrove.evaluation.table_scores import area_under_curve, score_numbers, score_predictions, score_table

TERMS = PredictionTerms(orders=3, batch_size=64)


@pytest.fixture(scope="module")
def rows(learnt: LearntTable) -> list[dict[int, Value]]:
    table = csv.DictReader(io.StringIO(table_text(80, seed=9)))
    return [learnt.values(**{name: cell or None for name, cell in row.items()}) for row in table]


def probabilities(
    learnt: LearntTable, rows: list[dict[int, Value]], name: str, terms: PredictionTerms = TERMS
) -> np.ndarray:
    found = predict_column(learnt.model, learnt.codec, rows, learnt.place(name), terms)
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("name", ["side", "x", "y", "day", "flag"])
def test_probabilities_sum_to_one(learnt: LearntTable, rows: list[dict[int, Value]], name: str) -> None:
    found = probabilities(learnt, rows, name)
    assert found.shape[0] == 80 and (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_every_column_is_predicted_from_the_others(learnt: LearntTable, rows: list[dict[int, Value]]) -> None:
    scores = {name: score_table(learnt.model, learnt.codec, rows, learnt.place(name), TERMS) for name in COLUMNS}
    assert scores["side"]["rows"] == 80 and scores["y"]["rows"] < 80
    assert scores["side"]["accuracy"] > 0.95 and scores["side"]["auc"] > 0.98 and scores["side"]["log_loss"] < 0.2
    assert scores["flag"]["accuracy"] > 0.95 and scores["flag"]["auc"] > 0.98
    assert all(scores[name]["r2"] > 0.95 for name in ("x", "y", "day"))
    assert scores["day"]["mae"] < 1, "in days"
    assert 0 < scores["x"]["nats"] < np.log(16)


def test_the_target_itself_is_not_looked_at(learnt: LearntTable, rows: list[dict[int, Value]]) -> None:
    other = [{**row, learnt.place("side"): 0} for row in rows]
    without = [{place: value for place, value in row.items() if place != learnt.place("side")} for row in rows]
    found = [probabilities(learnt, own, "side") for own in (rows, other, without)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_row_is_predicted_alike_alone_and_among_others(learnt: LearntTable, rows: list[dict[int, Value]]) -> None:
    together = probabilities(learnt, rows, "x")
    alone = np.concatenate([probabilities(learnt, [row], "x", replace(TERMS, batch_size=2)) for row in rows[:7]])
    np.testing.assert_allclose(together[:7], alone, atol=1e-5)


def test_orders_are_averaged(learnt: LearntTable, rows: list[dict[int, Value]]) -> None:
    single = [probabilities(learnt, rows, "x", PredictionTerms(orders=1, seed=seed)) for seed in (0, 1)]
    assert not np.allclose(single[0], single[1], atol=1e-4)
    # The first of several orders is that of one.
    two = probabilities(learnt, rows, "x", PredictionTerms(orders=2, seed=0))
    second = 2 * two - single[0]
    assert (second > -1e-6).all() and np.allclose(second.sum(axis=1), 1, atol=1e-5)


def test_a_missing_value_says_something_where_the_model_has_seen_it(learnt: LearntTable) -> None:
    known = learnt.values(x="7.00", note="500+")
    found = [probabilities(learnt, [known | extra], "day") for extra in ({}, {learnt.place("y"): None})]
    assert not np.array_equal(found[0], found[1])
    # No training row lacked its side: there a missing value is as if the column were not there.
    found = [probabilities(learnt, [known | extra], "day") for extra in ({}, {learnt.place("side"): None})]
    np.testing.assert_array_equal(found[0], found[1])


def test_descriptions_are_in_the_terms_of_the_column(learnt: LearntTable) -> None:
    values = [learnt.values(x="7.00", y="14.00", side="high")]

    def described(name: str, *quantiles: float) -> dict[str, object]:
        found = predict_column(learnt.model, learnt.codec, values, learnt.place(name), TERMS)
        (only,) = describe(learnt.codec, learnt.place(name), found, quantiles)
        return only

    side = described("side")
    assert side["prediction"] == "high" and list(side["probabilities"]) == ["high", "low"]  # type: ignore[call-overload]
    x = described("x", 0.1, 0.5, 0.9)
    levels = x["quantiles"]
    assert isinstance(levels, dict) and list(levels) == ["0.1", "0.5", "0.9"]
    assert list(levels.values()) == sorted(levels.values()) and levels["0.5"] == x["prediction"] == pytest.approx(
        7, abs=1
    )
    assert x["prediction"] == round(x["prediction"], 2)  # type: ignore[call-overload]
    day = described("day", 0.25)
    assert str(day["prediction"])[:9] == "2024-01-1" and str(day["mean"])[:9] == "2024-01-1"
    flag = described("flag")
    assert flag["prediction"] == 1 and flag["probabilities"]["1"] > 0.9  # type: ignore[index]
    assert list(flag["probabilities"]) == ["0", "1"]  # type: ignore[call-overload]


def test_a_text_is_written_to_its_end(learnt: LearntTable, rows: list[dict[int, Value]]) -> None:
    found = predict_column(learnt.model, learnt.codec, rows, learnt.place("note"), TERMS)
    assert isinstance(found, list) and all(1 <= len(text) <= 6 for text in found)
    right = [text.endswith("+" if row[learnt.place("flag")] else "-") for text, row in zip(found, rows, strict=True)]
    assert np.mean(right) > 0.9
    again = predict_column(learnt.model, learnt.codec, rows[:5], learnt.place("note"), replace(TERMS, batch_size=3))
    assert again == found[:5]
    assert score_predictions(learnt.codec, learnt.place("note"), found, rows)["accuracy"] < 0.5


def test_a_text_does_not_depend_on_the_rows_beside_it(
    learnt: LearntTable, rows: list[dict[int, Value]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, flag = learnt.place("note"), learnt.place("flag")
    long, short = rows[0], {flag: rows[1][flag]}
    others = [own for own in long if own != place]
    prompt = 2 + sum(len(learnt.codec.part(own, long[own]).tokens) for own in others)
    monkeypatch.setattr(learnt.model.config, "max_position_embeddings", prompt + 1)
    alone = predict_column(learnt.model, learnt.codec, [short], place, TERMS)
    both = predict_column(learnt.model, learnt.codec, [long, short], place, TERMS)
    assert isinstance(alone, list) and both[1] == alone[0] and len(both[0]) < len(alone[0])
    monkeypatch.setattr(learnt.model.config, "max_position_embeddings", prompt)
    with pytest.raises(KalmaGroveError, match="row 2 leaves no room in the model's context"):
        predict_column(learnt.model, learnt.codec, [short, long], place, TERMS)


def test_gaps_are_filled_and_agree_with_each_other(learnt: LearntTable) -> None:
    rows = [learnt.values(x="8.00"), learnt.values(side="low", y=None), {}]
    every = set(range(len(COLUMNS)))
    wanted = [every - {learnt.place("x")}, {learnt.place("x"), learnt.place("y")}, every]
    filled = impute(learnt.model, learnt.codec, rows, wanted, TERMS)
    assert [set(row) for row in filled] == [every, {learnt.place(name) for name in ("x", "y", "side")}, every]
    assert filled[0][learnt.place("x")] == 8.0 and filled[0][learnt.place("flag")] == 1
    assert str(filled[0][learnt.place("note")]).endswith("+")
    for row in filled:
        x, y = (float(row[learnt.place(name)]) for name in ("x", "y"))  # type: ignore[arg-type]
        assert abs(y - 2 * x) < 3
        assert row[learnt.place("side")] == (0 if x > 5 else 1)
        column = learnt.codec.columns[learnt.place("y")]
        assert isinstance(column, NumberColumn) and round(y, 2) == y


def test_the_most_certain_cell_is_filled_first(learnt: LearntTable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, frozenset[int]]] = []
    import kalmagrove.evaluation.table_imputation as imputation

    def watched(*arguments: object) -> np.ndarray | list[str]:
        rows, place = arguments[2], arguments[3]
        assert isinstance(rows, list) and isinstance(place, int)
        asked.append((place, frozenset(rows[0])))
        return predict_column(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(imputation, "predict_column", watched)
    impute(learnt.model, learnt.codec, [learnt.values(x="9.50")], [{1, 2, 4}], TERMS)
    # The side is certain, y is not quite; the text comes last, when all else is known.
    assert asked == [(1, frozenset({0})), (2, frozenset({0})), (1, frozenset({0, 2})), (4, frozenset({0, 1, 2}))]


def test_predictions_that_are_no_numbers_are_refused(learnt: LearntTable) -> None:
    broken = copy.deepcopy(learnt.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(KalmaGroveError, match="predictions of side are no numbers; train the model again"):
        impute(broken, learnt.codec, [learnt.values(x="9.50")], [{learnt.place("side")}], TERMS)


def test_a_row_that_is_longer_than_the_context_is_refused(learnt: LearntTable) -> None:
    with pytest.raises(KalmaGroveError, match=r"a row has \d+ tokens, the model's context is"):
        probabilities(learnt, [learnt.values(note="long " * 50)], "side")


def test_predicting_leaves_the_model_as_it_was(learnt: LearntTable, rows: list[dict[int, Value]]) -> None:
    before = {name: value.clone() for name, value in learnt.model.state_dict().items()}
    learnt.model.train()
    probabilities(learnt, rows[:2], "x")
    assert learnt.model.training
    learnt.model.eval()
    assert all(torch.equal(value, before[name]) for name, value in learnt.model.state_dict().items())
    assert probabilities(learnt, [], "x").shape == (0, 16)


def test_scores_of_numbers_and_the_area_under_the_curve() -> None:
    scores = score_numbers(np.array([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 3.0]))
    assert scores == pytest.approx({"rmse": (4 / 3) ** 0.5, "mae": 2 / 3, "r2": 1 - 2})
    assert score_numbers(np.ones(3), np.ones(3))["r2"] == 0
    assert area_under_curve(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert area_under_curve(np.array([0.5, 0.5]), np.array([0, 1])) == 0.5


def test_entropy_is_relative_to_the_largest() -> None:
    found = relative_entropy(np.array([[0.25] * 4, [1, 0, 0, 0]]))
    assert found.tolist() == pytest.approx([1, 0])
    assert relative_entropy(np.ones((1, 1))).tolist() == [0]
