"""Reading: every shape of file becomes the rows it tells of."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import toys

from perce_lite.data import retrieval
from perce_lite.data.readers import RowsByUser, read_rows, user_texts
from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Row, spread_over_users
from perce_lite.errors import DataError
from perce_lite.recipe import Profile, Recipe

ALL = {"select": "all"}


@pytest.fixture
def recipe(tmp_path):
    """Writes records to a file and gives a recipe for it."""

    def make(records: list, name: str = "data.jsonl", data: dict | None = None, **more) -> Recipe:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(records), encoding="utf-8")
        else:
            path.write_text("\n\n".join(json.dumps(one) for one in records), encoding="utf-8")
        made = Recipe.model_validate({"data": {"path": name, **(data or {})}, **more})
        made._source = str(tmp_path / "recipe.yaml")
        return made

    return make


@pytest.fixture
def rows(recipe):
    return lambda *args, **more: read_rows(recipe(*args, **more))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


TEXTS = {"user": "ann", "profile": " She sails. ", "prompt": "Say hi.", "completion": "Ahoy!", "cohort": 7}
SYSTEM = {"role": "system", "content": "Be short."}
ITEMS = [
    {"title": "Old", "text": "a"},
    "b",
    {"title": None, "text": "c"},
    {"title": "New", "text": "d "},
    {"text": " "},
]
DIALOGUE = [SYSTEM, user("Hi."), answer("Ahoy!"), user("And?"), answer("Aye.")]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("data.jsonl", "line 1", "line 3"),
        ("data.ndjson", "line 1", "line 3"),
        ("data.json", "record 0", "record 1"),
        ("data.parquet", "row 0", "row 1"),
    ],
)
def test_rows_of_texts(rows, name, first, second):
    read = rows([TEXTS, {**TEXTS, "completion": "Bye!"}], name)
    assert read[0] == Row(f"{name}, {first}", "ann", "She sails.", (user("Say hi."),), (answer("Ahoy!"),), "train", "7")
    assert (read[1].completion, read[1].query) == ((answer("Bye!"),), "Say hi.")
    assert read[1].where == f"{name}, {second}"


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_rows_of_messages(rows, name):
    record = {"profile": "p", "prompt": [SYSTEM, user("Hi.")], "completion": [answer("Ahoy!")]}
    (row,) = rows([record], name)
    assert (row.user, row.prompt, row.completion) == ("all", (SYSTEM, user("Hi.")), (answer("Ahoy!"),))


def test_a_dialogue_is_cut_ahead_of_its_first_answer(rows):
    (row,) = rows([{"user": 5, "profile": "p", "messages": DIALOGUE}])
    assert (row.user, row.prompt, row.query) == ("5", tuple(DIALOGUE[:2]), "Hi.")
    assert row.completion == tuple(DIALOGUE[2:])


def test_items_of_a_profile_are_chosen_and_ordered(rows):
    items = [Item("Old", "a"), Item("", "b"), Item("", "c"), Item("New", "d")]
    record = {**TEXTS, "profile": ITEMS, "prompt": "something old"}
    assert rows([record], profile=ALL)[0].profile == tuple(reversed(items))
    assert rows([record], profile={"select": "recency", "top_k": 2})[0].profile == (items[3], items[2])
    assert rows([record], profile={"select": "bm25", "top_k": 2})[0].profile == (items[0], items[3])


def test_a_byte_order_mark_and_any_script_are_read(tmp_path, recipe):
    made = recipe([])
    line = json.dumps({**TEXTS, "completion": "Grüße\u2028さようなら 🎉"}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text("\ufeff" + line + "\r\n", encoding="utf-8")
    assert read_rows(made)[0].completion[0]["content"] == "Grüße\u2028さようなら 🎉"


# Documents


def test_a_document_sees_the_same_users_earlier_ones_only(rows):
    documents = toys.toy_documents(3, 6)
    mixed = random.Random(0).sample(documents, len(documents))
    found = {(row.user, row.completion[0]["content"]): row for row in rows(mixed, profile=ALL)}
    assert len(found) == len(documents)
    for one in documents:
        row = found[one["user"], one["text"]]
        earlier = [other for other in documents if other["user"] == one["user"] and other["idx"] < one["idx"]]
        assert row.profile == tuple(Item(other["title"], other["text"]) for other in reversed(earlier))
        assert (row.prompt, row.query) == ((user(one["query"]),), one["query"])


@pytest.mark.parametrize("key", ["idx", "date"])
def test_documents_stand_in_the_order_of_their_idx_or_date(rows, key):
    order = {"idx": [11, 9, 100], "date": ["2024-02-01", "2023-12-31", "2024-10-01"]}[key]
    read = rows([{"title": f"t{i}", "text": f"x{i}", key: one} for i, one in enumerate(order)], profile=ALL)
    assert {row.query: [item.text for item in row.profile] for row in read} == {
        "t1": [],
        "t0": ["x1"],
        "t2": ["x0", "x1"],
    }


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("document", ["", "0", "01", "012"]), ("month", ["", "0", "0", "012"]), ("year", ["", "0", "0", "0"])],
)
def test_earlier_by(rows, unit, expected):
    dates = ["2023-12-31", "2024-01-01", "2024-01-31", "2024-02-01"]
    documents = [{"title": "t", "text": str(i), "date": one} for i, one in enumerate(dates)]
    read = rows(documents, profile={**ALL, "earlier_by": unit})
    assert ["".join(item.text for item in reversed(row.profile)) for row in read] == expected


@pytest.mark.parametrize("key", ["split", "temporal_split"])
def test_documents_keep_their_split(rows, key):
    names = ["train", "dev", "test", "validation", "val"]
    read = rows([{"title": "t", "text": str(i), "idx": i, key: name} for i, name in enumerate(names)])
    assert [row.split for row in read] == ["train", "validation", "test", "validation", "validation"]


def test_documents_without_a_split_hold_out_the_last_of_each_user(rows):
    read = rows(toys.toy_documents(2, 10), split={"validation": 0.2, "test": 0.1})
    for name in ("user0", "user1"):
        assert [row.split for row in read if row.user == name] == ["train"] * 7 + ["validation"] * 2 + ["test"]


# LaMP and LongLaMP


@pytest.mark.parametrize(
    ("profile", "item"),
    [
        ({"id": "1", "title": "A paper", "abstract": "We show."}, Item("A paper", "We show.")),  # LaMP-1 and 5
        ({"id": "1", "tag": "sci-fi", "description": "A ship."}, Item("tag sci-fi", "A ship.")),  # LaMP-2
        ({"id": "1", "title": "T", "text": "N", "category": "food"}, Item("T | category food", "N")),  # LaMP-2 news
        ({"id": "1", "text": "Good.", "score": "5"}, Item("score 5", "Good.")),  # LaMP-3
        ({"id": "1", "text": "Bad.", "score": 0}, Item("score 0", "Bad.")),
        ({"id": "1", "text": "An article.", "title": "Headline"}, Item("Headline", "An article.")),  # LaMP-4
        ({"id": "1", "text": "a tweet"}, Item("", "a tweet")),  # LaMP-7
    ],
)
def test_lamp(rows, tmp_path, profile, item):
    golds = [{"id": "112", "output": "second"}, {"id": "111", "output": "first"}]
    for split in ("train", "dev"):
        (tmp_path / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": golds}))
        questions = [{"id": one, "input": f"q{one}", "profile": [profile]} for one in ("111", "112")]
        read = rows(questions, f"{split}_questions.json")
    assert [row.split for row in read] == ["validation"] * 2
    both = rows([], "unread.jsonl", data={"path": "."})
    assert [row.split for row in both] == ["validation"] * 2 + ["train"] * 2
    assert [row.completion[0]["content"] for row in both] == ["first", "second"] * 2
    assert both[0] == Row(both[0].where, "111", (item,), (user("q111"),), (answer("first"),), "validation")
    assert "dev_questions.json" in both[0].where
    assert "111" in both[0].where


@pytest.mark.parametrize(
    ("who", "profile", "item"),
    [
        ("name", {"title": "A paper", "abstract": "We show.", "id": "1", "year": 2020}, Item("A paper", "We show.")),
        ("reviewerId", {"reviewText": "Fine.", "overall": "4", "summary": "Ok"}, Item("Ok | overall 4", "Fine.")),
        ("author", {"content": "My cat.", "summary": "Cat", "author": "x", "id": "1"}, Item("Cat", "My cat.")),
    ],
)
def test_longlamp(rows, who, profile, item):
    (row,) = rows([{who: "Jo", "input": "Write.", "output": "Text.", "profile": [profile]}])
    assert row == Row("data.jsonl, line 1", "Jo", (item,), (user("Write."),), (answer("Text."),), "train")


# Choice of columns, users, rows


def test_columns_are_renamed(rows):
    renamed = {"completion": "reply", "prompt": "ask", "user": "who", "profile": "past"}
    record = {"reply": "Ahoy!", "ask": "Say hi.", "who": "ann", "past": "She sails."}
    (row,) = rows([record], data={"columns": renamed})
    assert (row.user, row.profile, row.query) == ("ann", "She sails.", "Say hi.")
    assert row.completion == (answer("Ahoy!"),)


def test_only_the_users_asked_for(rows):
    read = rows(toys.toy_rows(3, 4), data={"users": ["user2", "user0"]})
    assert {row.user for row in read} == {"user0", "user2"}
    assert len(read) == 8


def test_max_rows_are_of_each_split_spread_over_users_and_have_a_profile(rows):
    names = "aaaaabbc"
    records = [
        {"user": name, "profile": "" if i == 1 else "p", "prompt": "q", "completion": f"{name}{i}", "split": split}
        for split in ("train", "test")
        for i, name in enumerate(names)
    ]
    read = rows(records, data={"max_rows": 5})
    assert [row.completion[0]["content"] for row in read] == ["a0", "b5", "c7", "a2", "b6"] * 2
    assert [row.split for row in read] == ["train"] * 5 + ["test"] * 5
    assert spread_over_users(read, 2) == read[:2]


def test_a_split_of_the_data_is_kept(rows):
    records = [{**TEXTS, "split": name} for name in ("test", "val", None)]
    assert [row.split for row in rows(records)] == ["test", "validation", "train"]
    assert {row.split for row in rows(records, split={"by": "row", "test": 0, "validation": 0})} == {"train"}


def test_history_is_all_of_a_user(recipe):
    documents = toys.toy_documents(2, 3)
    expected = [Item(one["title"], one["text"]) for one in documents if one["user"] == "user1"]
    assert list(user_texts(recipe(documents[::-1]), "user1").history.items) == expected
    a, b = ({"title": name, "text": "x"} for name in "ab")
    made = recipe([{**TEXTS, "profile": [a]}, {**TEXTS, "profile": [a, b]}, {**TEXTS, "user": "bob", "profile": []}])
    assert user_texts(made, "ann").history.items == (Item("a", "x"), Item("b", "x"))
    assert user_texts(recipe([TEXTS]), "ann").text == "She sails."
    with pytest.raises(DataError, match="user zoe: the data knows no such user; it has user0, user1"):
        user_texts(recipe(documents), "zoe")


def test_a_profile_never_holds_the_answer(recipe, monkeypatch):
    documents = toys.toy_documents(2, 6)
    made = recipe(documents)
    texts = user_texts(made, "user1")
    built = []
    real = retrieval.Bm25Index.__init__
    monkeypatch.setattr(
        retrieval.Bm25Index, "__init__", lambda self, texts: (built.append(len(texts)), real(self, texts))[1]
    )
    for document in documents[6:9]:
        chosen = texts.profile_for(document["query"], made.profile)
        assert chosen
        assert document["text"] not in {item.text for item in chosen}
    assert built == [6], "one index for all questions"


def _parts() -> list[dict]:
    """Four whole texts of ann's and, last, one that was cut into five parts."""
    whole = [{"user": "ann", "query": f"q{n}", "text": f"text {n}", "idx": n} for n in range(4)]
    return whole + [
        {"user": "ann", "query": f"p{n}", "text": f"part {n}", "idx": 4 + n, "part_of": "long"} for n in range(5)
    ]


def test_a_part_of_a_text_never_stands_in_the_profile_of_another(rows):
    read = rows(_parts(), profile=ALL)
    of_parts = [row for row in read if row.part_of]
    assert len(of_parts) == 5
    assert all({item.text for item in row.profile} <= {f"text {n}" for n in range(4)} for row in of_parts)
    assert all(row.profile for row in of_parts)


def test_the_parts_of_a_text_are_held_out_together(recipe):
    made = recipe(_parts(), split={"by": "time", "test": 0.2, "validation": 0.2})
    rows = read_rows(made)
    assert {row.split for row in rows if row.part_of} == {"test"}
    assert [row.split for row in rows if not row.part_of] == ["train", "train", "train", "validation"]
    with RowsByUser(made) as by_user:
        assert [row.split for row in by_user.rows_of("ann")] == [row.split for row in rows]


def test_a_prompt_that_a_part_answers_is_asked_without_the_other_parts(recipe):
    texts = user_texts(recipe(_parts(), split={"test": 0, "validation": 0}), "ann")
    rule = Profile(select="all")
    assert {item.text for item in texts.profile_for("p2", rule)} == {f"text {n}" for n in range(4)}
    assert len(texts.profile_for("another", rule)) == 9
