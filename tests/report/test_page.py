"""The page stands alone, shows what is known, and takes every text as text."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from kalmagrove.report.page import render_page, write_report
from kalmagrove.report.results import Results

Make = Callable[..., dict[str, Any]]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Balance(HTMLParser):
    """Counts elements, and notes those that are closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def page_of(record: dict[str, Any]) -> str:
    return render_page(Results.from_dict(record))


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_page_needs_nothing_else(make_results: Make) -> None:
    page = page_of(make_results())
    assert "<script" not in page and "<link" not in page and "@import" not in page and "<img" not in page
    assert "http://" not in page and "https://" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)


def test_elements_are_closed_in_turn_and_headings_have_one_top(make_results: Make) -> None:
    balance = Balance()
    balance.feed(page_of(make_results(ours=(27.0, None), llama=(30.0, 31.0))))
    assert (balance.wrong, balance.open) == ([], [])
    assert balance.seen.count("h1") == 1
    assert balance.seen.count("table") == balance.seen.count("caption")
    assert balance.seen.count("svg") == 3


def test_the_verdict_comes_before_the_table_and_the_command_is_exact(make_results: Make) -> None:
    page = page_of(make_results() | {"command": "kalmagrove compare --data 'a & b.txt' --out x"})
    assert page.index("ours reached a test perplexity 10 % lower than llama") < page.index("<table")
    assert "<pre><code>kalmagrove compare --data &#39;a &amp; b.txt&#39; --out x</code></pre>" in page


def test_a_ratio_is_told_by_a_mark_and_in_words_besides_colour(make_results: Make) -> None:
    page = page_of(make_results())
    assert re.search(r'class="better">\u25bc&nbsp;0\.900&times;<span class="hidden"> better than the baseline', page)
    assert "\u25b2&nbsp;" not in page
    assert "\u25b2&nbsp;1.100" in page_of(make_results(ours=(33.0,)))


def test_markup_in_any_text_is_shown_as_text(make_results: Make) -> None:
    record = make_results() | {"title": "<b>title", "command": "<b>command", "candidate": "<b>"}
    record["models"][1] |= {"name": "<b>", "model_config": {"<b>key": "<b>value"}, "optim": "<b>optim"}
    record["data"]["source"] = "<b>source"
    record["environment"]["cpu"] = "<b>cpu"
    page = page_of(record)
    assert "<b>" not in page
    for text in ("title", "command", "key", "value", "optim", "source", "cpu", " reached a test perplexity"):
        assert f"&lt;b&gt;{text}" in page


def test_only_options_that_differ_are_listed(make_results: Make) -> None:
    record = make_results()
    record["models"][1]["model_config"]["rank"] = 16
    record["models"][1]["optim_config"]["lr"] = 0.02
    page = page_of(record)
    words = words_of(page)
    assert "rank default 16" in words
    assert "optim.lr 0.003 0.02" in words
    assert "hidden_size" not in words and "optim.name" not in words


def test_learning_rate_trials_are_shown_with_the_chosen_one(make_results: Make) -> None:
    assert 'id="rates"' not in page_of(make_results())
    record = make_results() | {"trials": 2}
    for model in record["models"]:
        model["lr_trials"] = [{"lr_scale": 0.5, "valid_loss": None}, {"lr_scale": 1.0, "valid_loss": 3.5}]
    words = words_of(page_of(record))
    assert "0.5&times; diverged diverged" in words
    assert "1&times; 3.500 chosen 3.500 chosen" in words


def test_what_is_known_of_the_machine_is_shown(make_results: Make) -> None:
    words = words_of(page_of(make_results()))
    assert "Usable cores 4" in words and "Packages torch 2.11.0 " in words
    assert "numpy" not in words and "Processor" not in words


def test_screening_is_explained_only_where_it_applies(make_results: Make) -> None:
    record = make_results()
    assert "<dt>Screening</dt>" in page_of(record)
    record["budget"]["tokens"] = 10**6
    assert "<dt>Screening</dt>" not in page_of(record)


def test_a_comparison_that_has_not_begun_has_a_page(make_results: Make) -> None:
    record = make_results(ours=(None,), llama=(None,)) | {"environment": {}, "paired_time": []}
    for model in record["models"]:
        model |= {"step_seconds": None, "peak_memory_bytes": None}
        model["runs"][0]["curve"] = {"tokens": [], "seconds": [], "loss": []}
        model["runs"][0]["valid_curve"] = {"tokens": [], "loss": []}
    words = words_of(page_of(record))
    assert "Not finished, so there is no verdict yet" in words
    assert "No training step has been recorded yet." in words
    assert "not finished: llama seed 0, ours seed 0" in words


def test_the_same_results_write_the_same_bytes(make_results: Make, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_report(Results.from_dict(make_results()), tmp_path / "a")
    second = write_report(Results.from_dict(make_results()), tmp_path / "b")
    assert [path.name for path in first] == ["report.html", "table.md"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["report.html", "table.md"]
