"""Rows: splits, controls, the choice of a profile, and the way through a TRL data set."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perce_lite.data.retrieval import Bm25Index, History, Item, tokens_of, word_spans
from perce_lite.data.rows import Row, from_columns, split_rows, swap_profiles, to_records
from perce_lite.errors import DataError
from perce_lite.recipe import Split


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


ROWS = [Row(f"w{i}", f"u{i % 10}", f"p{i % 10}", (user("q"),), (answer(str(i)),)) for i in range(50)]


def splits(read: list[Row]) -> list[str | None]:
    assert [(row.where, row.user) for row in read] == [(row.where, row.user) for row in ROWS]
    return [row.split for row in read]


@pytest.mark.parametrize("by", ["user", "time"])
def test_splits_have_the_size_asked_for_and_repeat(by):
    asked = Split(by=by, validation=0.2, test=0.4, seed=3)
    found = splits(split_rows(ROWS, asked))
    assert [found.count(name) for name in ("train", "validation", "test")] == [20, 10, 20]
    assert splits(split_rows(ROWS, asked)) == found
    if by != "time":
        assert splits(split_rows(ROWS, asked.model_copy(update={"seed": 4}))) != found
    users = [{row.user for row, name in zip(ROWS, found, strict=True) if name == one} for one in set(found)]
    assert (sum(map(len, users)) == 10) is (by == "user")
    if by == "time":
        assert found == ["train"] * 20 + ["validation"] * 10 + ["test"] * 20


def test_rows_are_split_each_by_itself_in_about_the_shares_asked_for():
    rows = [Row(f"w{i}", f"u{i % 10}", "p", (user("q"),), (answer(str(i)),)) for i in range(5000)]
    asked = Split(by="row", validation=0.2, test=0.4, seed=3)
    found = [row.split for row in split_rows(rows, asked)]
    for name, share in (("train", 0.4), ("validation", 0.2), ("test", 0.4)):
        assert found.count(name) == pytest.approx(5000 * share, abs=3 * (5000 * share * (1 - share)) ** 0.5)
    assert [row.split for row in split_rows(rows, asked)] == found
    assert [row.split for row in split_rows(rows, asked.model_copy(update={"seed": 4}))] != found


def test_new_rows_move_no_other_row():
    asked = Split(by="row", validation=0.2, test=0.2, seed=3)
    before = {row.where: row.split for row in split_rows(ROWS, asked)}
    more = [replace(ROWS[0], where=f"new{i}", completion=(answer(f"new{i}"),)) for i in range(30)]
    after = {row.where: row.split for row in split_rows([*more, *ROWS], asked)}
    assert {where: after[where] for where in before} == before


def test_few_rows_still_hold_out_one():
    rows = ROWS[:6]
    found = [row.split for row in split_rows(rows, Split(by="row", validation=0.1, test=0.1, seed=5))]
    assert sorted(found) == ["test", *["train"] * 4, "validation"]


def test_swapped_profiles_are_another_users():
    own = {row.user: row.profile for row in ROWS}
    swapped = swap_profiles(ROWS, seed=1)
    assert [(row.where, row.user, row.completion) for row in swapped] == [(r.where, r.user, r.completion) for r in ROWS]
    assert all(row.profile != own[row.user] and row.profile in own.values() for row in swapped)
    assert swap_profiles(ROWS, seed=1) == swapped != swap_profiles(ROWS, seed=2)
    assert swap_profiles([row for row in ROWS if row.user == "u3"]) == []


def choose(items, query, select, top_k):
    return History(items).choose(query, select, top_k)


def test_bm25_picks_what_the_query_is_about():
    cat, boat, bread = (
        Item("Cats", "the cat sleeps"),
        Item("Sea", "the boat sails at dawn"),
        Item("", "bread and the oven"),
    )
    assert choose([boat, cat, bread], "when does the boat sail?", "bm25", 1) == [boat]
    assert choose([cat, boat, bread], "an OVEN for my cats", "bm25", 2) == [bread, cat]
    assert choose([cat, boat, bread], "zebra", "bm25", 2) == [bread, boat]  # nothing fits: the newest
    old, new = Item("old", "cat"), Item("new", "cat")
    assert choose([old, boat, new, bread], "cat", "bm25", 2) == [new, old]
    assert Bm25Index(["", "..."]).scores("cat") == [0.0, 0.0]
    assert History([cat, boat, bread]).choose("the cat", "bm25", 1, among=[1, 2]) == [bread], (
        "a later text is not chosen"
    )
    assert choose([], "cat", "bm25", 2) == choose([], "cat", "all", 1) == []
    assert choose([old, new, cat], "boat", "all", 1) == [cat, new, old]
    assert choose([old, new, cat], "boat", "recency", 2) == [cat, new]


@pytest.mark.parametrize(
    ("texts", "query", "nearest"),
    [
        (["今天天气很好，我们去公园", "我喜欢写代码和看书", "昨天晚上下雨了"], "周末在公园散步，天气好", 0),
        (["昨日は図書館で本を読んだ", "猫が庭で寝ている", "電車が遅れた"], "図書館の本について書いて", 0),
        (["เมื่อวานฝนตกหนักมาก", "ฉันชอบอ่านหนังสือในห้องสมุด", "แมวนอนอยู่"], "หนังสือห้องสมุด", 1),
        (["ບ້ານຂອງຂ້ອຍ", "ຂ້ອຍມັກອ່ານປຶ້ມ"], "ອ່ານປຶ້ມ", 1),
    ],
)
def test_scripts_without_spaces_are_searched_too(texts, query, nearest):
    scores = Bm25Index(texts).scores(query)
    assert max(range(len(texts)), key=scores.__getitem__) == nearest
    assert scores[nearest] > 0
    assert choose([Item("", text) for text in texts], query, "bm25", 1) == [Item("", texts[nearest])]


def test_tokens():
    assert tokens_of("The CAT's 2 boats, naïve_word x 東京タワー 雨") == [
        "the", "cat", "boats", "naïve_word", "東京", "京タ", "タワ", "ワー", "雨",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["A_b 12 c's --x9, THE end\n(of) all", "".join(map(chr, range(128))), ""])
def test_plain_text_is_split_as_all_text_is(text):
    assert text.isascii()
    assert tokens_of(text) == [word for word, _, _ in word_spans(text)]


# Through JSON records

text = st.text(st.characters(codec="utf-8"), max_size=12)
item = st.builds(Item, text.map(str.strip), text.map(str.strip)).filter(lambda one: bool(one.title or one.text))
messages = st.lists(st.fixed_dictionaries({"role": text, "content": text}), min_size=1, max_size=3).map(tuple)
profiles = text.map(str.strip) | st.lists(item, max_size=3).map(tuple)
row = st.builds(Row, st.text(st.characters(codec="utf-8"), min_size=1), text, profiles, messages, messages)


@settings(max_examples=60, deadline=None)
@given(st.lists(row, min_size=1, max_size=4))
def test_rows_survive_json_records(drawn):
    read = [from_columns(record, "elsewhere") for record in json.loads(json.dumps(to_records(drawn)))]
    assert [(row.where, row.user, row.profile, row.prompt, row.completion) for row in drawn] == [
        (row.where, row.user, row.profile, row.prompt, row.completion) for row in read
    ], "a text profile stays a text, beside rows whose profile is a list too"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"profile": "p", "prompt": "q"}, "no completion"),
        ({"profile": 5, "prompt": "q", "completion": "c"}, "profile is a text or a list of items"),
        ({"profile": "p", "prompt": "q", "completion": "c", "messages": 5}, "messages is a text, or a list"),
    ],
)
def test_bad_columns_are_named(record, told):
    with pytest.raises(DataError, match=f"train row 7: {told}"):
        from_columns(record, "train row 7")
