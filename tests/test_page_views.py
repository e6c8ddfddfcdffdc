"""Pages and verdicts for few rows and narrow screens."""

from pathlib import Path

import pytest

from perce_lite.cli.views.compare_sections import comparison_sentences
from perce_lite.cli.views.page import folds, write_figures
from perce_lite.cli.views.sections import Point, Section, caution, interval_note


def figure(value: float, low: float | None, high: float | None) -> dict:
    return {"value": value, "low": low, "high": high}


def compared(rows: int = 40, users: int = 8) -> dict:
    """Two arms against `uniform`: one more personal and worse on all tokens, one like it."""
    worth = {name: {"all": figure(0.2, 0.1, 0.3)} for name in ("other user's", "topical match")}
    same = {name: {"all": figure(0.0, -0.1, 0.1)} for name in worth}
    differences = [
        {"arm": "base", "against": "uniform", "worth": worth, "all": figure(0.1, 0.05, 0.2), "by words": None},
        {"arm": "mixed", "against": "uniform", "worth": same, "all": figure(-0.2, -0.3, -0.1), "by words": None},
    ]
    change = {"masked_style": figure(0.1, 0.05, 0.2), "content": figure(0.0, -0.1, 0.1)}
    texts = {"differences": [{"arm": "base", "against": "uniform", "change": change, "sampled": True}]}
    split = {"rows": rows, "users": users, "differences": differences}
    return {"splits": {"test": split}, "texts": texts, "arms": [{"arm": "base", "at_edge": True}]}


def test_what_a_comparison_says_is_grouped_and_short():
    said = comparison_sentences(compared(users=4))
    assert len(said) < 6
    better, worse, same, edge, few = said
    assert better.startswith(
        "Better, test, against uniform: the own profile's worth over another user's: base (+0.200)"
    )
    assert "loss on all tokens: mixed (-0.200)" in better
    assert "content words masked: base (+0.100)" in better
    assert worse == "Worse, test, against uniform: loss on all tokens: base (+0.100)."
    assert same.startswith("Not told from chance, test, against uniform: ")
    assert "content kept in generated answers: base (+0.000)" in same
    assert "widen --rates" in edge
    assert "intervals are too narrow" in few


@pytest.mark.parametrize(
    ("rows", "users", "told"),
    [
        (3, 2, "3 rows of 2 users are too few for an interval"),
        (1, 1, "1 row of 1 user is too few for an interval"),
        (30, 1, "30 rows of 1 user are too few for an interval"),
    ],
)
def test_no_interval_is_promised_where_there_is_none(rows, users, told):
    split = {"rows": rows, "users": users}
    assert interval_note(split) == told
    assert caution({"test": split}) == [f"test: {told}."]


def test_large_splits_have_intervals_and_no_caution():
    assert "95 % interval" in interval_note({"rows": 30, "users": 9})
    assert caution({"test": {"rows": 30, "users": 9}}) == []
    assert "too narrow" in caution({"test": {"rows": 30, "users": 3}})[0]


def test_short_tables_fold_into_cards_and_long_ones_scroll(tmp_path):
    head = ("arm", "state", "rows", "over base")
    short = Section("Short", "", head, [("a-name-of-some-length", "in service", "3", "+0.1")])
    long = Section("Long", "", head, [("one", "in service", "3", "+0.1")] * 30)
    two = Section("Two columns", "", ("figure", "value"), [("rate", "1")])
    chart = Section("Chart", "", head, [("one", "x", "3", "+0.1")], (Point("row", "arm", 1.0, 0.5, 1.5),), "nats")
    assert [folds(section) for section in (short, long, two, chart)] == [True, False, False, True]
    page = tmp_path / "page.html"
    write_figures("Title", "lead", ["sentence"], [short, long, two, chart], page)
    html = page.read_text("utf-8")
    assert html.count('class="wide fold"') == 2
    assert '<td data-name="over base">+0.1</td>' in html
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org", "")


def test_words_of_a_chart_are_text_of_a_size_to_read(tmp_path):
    page = tmp_path / "page.html"
    points = (Point("over none", "arm", 1.0, 0.5, 1.5), Point("over none", "other arm", 1.0, None, None))
    write_figures("Title", "lead", [], [Section("Chart", "", ("arm",), [("one",)], points, "nats a token")], page)
    html = Path(page).read_text("utf-8")
    assert "<text" in html
    assert "font: 11px" in html
    assert not [size for size in ("font: 7px", "font: 8px", "font: 9px") if size in html]
