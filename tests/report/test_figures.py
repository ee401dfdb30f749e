"""Charts are plain, repeatable elements that a page may hold several of."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from kalmagrove.errors import KalmaGroveError
from kalmagrove.report.figures import loss_chart, ratio_chart, save_png
from kalmagrove.report.results import Results

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def results(make_results: Make) -> Results:
    return Results.from_dict(make_results(ours=(27.0, 27.5), llama=(30.0, 31.0), others={"slim": (28.0, 29.0)}))


def texts(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def loss_ticks(svg: str) -> list[float]:
    return [float(text) for text in texts(svg) if re.fullmatch(r"\d+(\.\d+)?", text)]


def test_lines_are_named_in_real_text(results: Results) -> None:
    shown = texts(loss_chart(results, "tokens"))
    assert {"llama", "slim", "ours", "training tokens"} <= set(shown)
    assert "seconds of training steps" in texts(loss_chart(results, "seconds"))


def test_the_ratio_chart_names_costs_and_the_score(results: Results) -> None:
    shown = texts(ratio_chart(results))
    assert {"parameters", "FLOPs a token", "time a step", "training memory", "test perplexity"} <= set(shown)
    assert shown.count("0.50\u00d7") == 2
    assert "0.60\u00d7" in shown


def test_what_is_not_known_is_left_out_of_the_ratio_chart(make_results: Make) -> None:
    record = make_results(ours=(None,)) | {"paired_time": []}
    record["models"][0]["peak_memory_bytes"] = None
    shown = texts(ratio_chart(Results.from_dict(record)))
    assert {"parameters", "FLOPs a token"} <= set(shown)
    assert not {"time a step", "training memory", "test perplexity"} & set(shown)


def test_a_chart_is_an_element_without_addresses_in_the_colour_of_the_page(results: Results) -> None:
    for chart in (loss_chart(results, "tokens"), ratio_chart(results)):
        assert chart.startswith("<svg viewBox=") and chart.endswith("</svg>")
        assert "http" not in chart and "xmlns" not in chart and "<metadata" not in chart
        assert "currentColor" in chart and "#123456" not in chart
        assert "DejaVu" not in chart


def test_ids_are_used_once_and_references_have_a_target(results: Results) -> None:
    page = loss_chart(results, "tokens") + loss_chart(results, "seconds") + ratio_chart(results)
    ids = re.findall(r'\sid="([^"]+)"', page)
    targets = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert len(ids) == len(set(ids))
    assert targets and set(targets) <= set(ids)


def test_a_chart_has_a_title_and_says_its_numbers_in_words(results: Results) -> None:
    svg = ElementTree.fromstring(loss_chart(results, "tokens").replace("xlink:", ""))
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-labelledby"] == "loss-tokens-title loss-tokens-description"
    assert svg.findtext("title") == "Training loss against training tokens"
    assert "llama ends at" in (svg.findtext("desc") or "")


def test_the_same_results_draw_the_same_bytes_whatever_the_users_style_is(results: Results) -> None:
    before = loss_chart(results, "tokens")
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "svg.fonttype": "path"}):
        assert loss_chart(results, "tokens") == before
        assert matplotlib.rcParams["font.size"] == 30.0


def test_the_first_losses_do_not_squash_the_rest(make_results: Make) -> None:
    record = make_results()
    for model in record["models"]:
        model["runs"][0]["curve"]["tokens"][0] = 100
        model["runs"][0]["curve"]["loss"][0] = 5000.0
    assert max(loss_ticks(loss_chart(Results.from_dict(record), "tokens"))) < 10


def test_names_with_markup_and_mathematics_are_text(make_results: Make) -> None:
    record = make_results() | {"candidate": "<b>$x_1$"}
    record["models"][1]["name"] = "<b>$x_1$"
    chart = loss_chart(Results.from_dict(record), "tokens")
    assert "&lt;b&gt;$x_1$" in texts(chart)
    assert "<b>" not in chart


def test_nothing_is_drawn_before_the_first_steps(make_results: Make, tmp_path: Path) -> None:
    record = make_results(ours=(None,), llama=(None,))
    for model in record["models"]:
        model["runs"][0]["curve"] = {"tokens": [], "seconds": [], "loss": []}
        model["runs"][0]["valid_curve"] = {"tokens": [], "loss": []}
    assert loss_chart(Results.from_dict(record), "seconds") == ""
    with pytest.raises(KalmaGroveError, match=r"a\.png cannot be drawn: the comparison has no training steps yet"):
        save_png(Results.from_dict(record), tmp_path / "a.png")


def test_a_run_of_a_second_has_ticks_that_differ(make_results: Make) -> None:
    record = make_results()
    for model in record["models"]:
        curve = model["runs"][0]["curve"]
        curve["seconds"] = [seconds / 10 for seconds in curve["seconds"]]
    assert {"0", "0.25", "0.75"} <= set(texts(loss_chart(Results.from_dict(record), "seconds")))


def test_the_picture_is_a_repeatable_png(results: Results, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    save_png(results, first)
    save_png(results, second)
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() == second.read_bytes()
