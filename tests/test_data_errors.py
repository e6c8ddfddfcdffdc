"""Data that cannot be read: one error that names the file, the line and the way to mend it."""

import json
from pathlib import Path

import datasets
import pytest

from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, to_records
from perce_lite.errors import DataError
from perce_lite.recipe import Recipe

ROW = {"user": "ann", "profile": "She sails.", "prompt": "Say hi.", "completion": "Ahoy!"}
DOCUMENT = {"user": "ann", "title": "Sea", "text": "Blue.", "date": "2024-01-31"}
GOLDS = json.dumps({"task": "LaMP_4", "golds": [{"id": "1", "output": "x"}]})
QUESTION = {"id": "1", "input": "q", "profile": [{"text": "t"}]}


def lines(*records) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


@pytest.fixture
def rows(tmp_path: Path):
    """Reads files (name: content, the first one is the data) with a recipe."""

    def read(files: dict[str, str | bytes], data: dict | None = None, **more) -> list[Row]:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        first = {"path": next(iter(files), "absent.jsonl")}
        recipe = Recipe.model_validate({"data": {**first, **(data or {})}, **more})
        recipe._source = str(tmp_path / "recipe.yaml")
        return read_rows(recipe)

    return read


BAD = {
    "no such file": ({}, {}, ["absent.jsonl", "no such file", "the recipe's own folder"]),
    "unknown ending": ({"a.csv": "x"}, {}, ["a.csv", ".csv", ".jsonl", ".parquet"]),
    "no ending": ({"data": "x"}, {}, ["data", "no ending", ".jsonl"]),
    "folder": ({"a.jsonl": ""}, {"data": {"path": "."}}, ["questions.json", "name a JSONL or parquet file"]),
    "nothing in it": ({"a.jsonl": "\n \n"}, {}, ["a.jsonl", "no records"]),
    "broken line": ({"a.jsonl": lines(ROW) + "\n{bad\n"}, {}, ["a.jsonl, line 3", "not JSON", "column 2"]),
    "half a line": ({"a.jsonl": lines(ROW, ROW)[:-9]}, {}, ["a.jsonl, line 2", "not JSON"]),
    "not UTF-8": ({"a.jsonl": lines(ROW).encode() + b'"\xe9"\n'}, {}, ["a.jsonl", "UTF-8"]),
    "UTF-16": ({"a.jsonl": lines(ROW).encode("utf-16")}, {}, ["a.jsonl", "UTF-8"]),
    "no object": ({"a.jsonl": lines(ROW, [1])}, {}, ["a.jsonl, line 2", "object with named fields", "list"]),
    "null": ({"a.jsonl": lines(None)}, {}, ["a.jsonl, line 1", "object with named fields", "NoneType"]),
    "no object in an array": ({"a.json": '[{"text": "x"}, 5]'}, {}, ["a.json, record 1", "object with named fields"]),
    "no array": ({"a.json": json.dumps(ROW)}, {}, ["a.json", "list of records", ".jsonl"]),
    "broken array": ({"a.json": "[{]"}, {}, ["a.json", "not JSON"]),
    "no parquet": ({"a.parquet": "x"}, {}, ["a.parquet", "not a parquet file"]),
    "no completion": (
        {"a.jsonl": lines(ROW, {"prompt": "q", "profile": "p"})},
        {},
        ["a.jsonl, line 2", "no completion", "data.columns.completion=YOUR_COLUMN"],
    ),
    "no prompt": (
        {"a.jsonl": lines({"completion": "c", "profile": "p"})},
        {},
        ["a.jsonl, line 1", "no prompt", "data.columns.prompt=YOUR_COLUMN"],
    ),
    "prompt of a wrong type": ({"a.jsonl": lines({**ROW, "prompt": 5})}, {}, ["line 1", "prompt is a text", "'5'"]),
    "message without content": (
        {"a.jsonl": lines({"profile": "p", "messages": [{"role": "user", "content": None}]})},
        {},
        ["a.jsonl, line 1", "messages", "{role: user, content: a text}"],
    ),
    "dialogue that opens with an answer": (
        {"a.jsonl": lines({"profile": "p", "messages": [{"role": "assistant", "content": "x"}]})},
        {},
        ["a.jsonl, line 1", "no prompt", "ahead of the response"],
    ),
    "profile of a wrong type": (
        {"a.jsonl": lines(ROW, {**ROW, "profile": {"a": 1}})},
        {},
        ["a.jsonl, line 2", "profile is a text or a list of items", "dict"],
    ),
    "item of a wrong type": (
        {"a.jsonl": lines({**ROW, "profile": ["x", 5]})},
        {},
        ["a.jsonl, line 1", "profile item is a text or an object with title and text", "5"],
    ),
    "profile empty everywhere": (
        {"a.jsonl": lines(*({**ROW, "profile": empty} for empty in ("", " \n", [], [{"text": " "}], None)))},
        {},
        ["a.jsonl", "profile is empty in every one of 5 rows", "--set data.columns.profile=YOUR_COLUMN"],
    ),
    "unknown shape": (
        {"a.jsonl": lines({"foo": 1, "bar": 2})},
        {},
        ["bar, foo", "prompt and completion", "data.columns"],
    ),
    "unknown user": ({"a.jsonl": lines(ROW)}, {"data": {"users": ["bob"]}}, ["data.users", "bob", "a.jsonl"]),
    "no split given": ({"a.jsonl": lines(ROW)}, {"split": {"by": "given"}}, ["split.by", "row, user or time"]),
    "held-out documents in profiles": (
        {"a.jsonl": lines(DOCUMENT, DOCUMENT, DOCUMENT)},
        {"split": {"by": "row"}},
        ["split.by: row", "documents", "stand in the profiles", "Use time", "or user"],
    ),
    "no text": (
        {"a.jsonl": lines(DOCUMENT, {"title": "x"})},
        {},
        ["a.jsonl, line 2", "no text", "data.columns.text=YOUR_COLUMN"],
    ),
    "no query": ({"a.jsonl": lines(DOCUMENT, {"text": "x"})}, {}, ["a.jsonl, line 2", "neither query nor title"]),
    "no date": (
        {"a.jsonl": lines(DOCUMENT, {"title": "t", "text": "x"})},
        {"profile": {"earlier_by": "month"}},
        ["profile.earlier_by", "month", "2024-05-31", "every document"],
    ),
    "no answers": (
        {"train_questions.json": json.dumps([QUESTION])},
        {},
        ["train_questions.json", "answers are missing", "train_outputs.json"],
    ),
    "an answer is missing": (
        {"train_questions.json": json.dumps([QUESTION, {**QUESTION, "id": "2"}]), "train_outputs.json": GOLDS},
        {},
        ["train_questions.json, id 2", "train_outputs.json has no answer"],
    ),
    "no such hub data set": (
        {},
        {"data": {"path": None, "hub": "no-such-owner/no-such-data"}},
        ["data.hub", "no-such-owner/no-such-data", "Check the name and the network", "data.path"],
    ),
}


@pytest.mark.parametrize(("files", "more", "told"), BAD.values(), ids=BAD)
def test_bad_data_is_one_clear_error(rows, files, more, told):
    with pytest.raises(DataError) as caught:
        rows(files, **more)
    assert [part for part in told if part not in str(caught.value)] == []


# Bugs


@pytest.mark.parametrize("name", ["unknown shape", "no date", "no split given"])
def test_every_error_names_the_file(rows, name):
    files, more, _ = BAD[name]
    with pytest.raises(DataError, match=r"a\.jsonl"):
        rows(files, **more)


@pytest.mark.parametrize(
    ("questions", "outputs"),
    [
        ('{"a": 1}', GOLDS),
        ('["a"]', GOLDS),
        (json.dumps([QUESTION]), '{"task": "x"}'),
        (json.dumps([QUESTION]), '{"golds": [{"id": "1"}]}'),
    ],
)
def test_lamp_files_of_another_shape(rows, questions, outputs):
    with pytest.raises(DataError, match="train_"):
        rows({"train_questions.json": questions, "train_outputs.json": outputs})


@pytest.mark.parametrize("name", ["valid", "Test", "held-out", "eval"])
def test_held_out_rows_are_never_trained_on(rows, name):
    files = {"a.jsonl": lines({**ROW, "split": "train"}, {**ROW, "split": name})}
    try:
        found = rows(files)[1].split
    except DataError as error:
        found = "refused" if name in str(error) else str(error)
    assert found in ("validation", "test", "refused")


def test_a_review_of_longlamp_is_what_the_user_wrote(rows):
    review = {"overall": "4", "summary": "Nice", "description": "A red kettle.", "reviewText": "I adore it."}
    (row,) = rows({"a.jsonl": lines({"reviewerId": "R", "input": "i", "output": "o", "profile": [review]})})
    assert row.profile[0].text == "I adore it."


def test_an_empty_query_is_not_the_word_none(rows):
    documents = [{"text": "a", "query": ""}, {"text": "b", "query": ""}]
    try:
        read = rows({"a.jsonl": lines(*documents)})
    except DataError:
        return
    assert [row.query for row in read] == ["", ""]


def test_a_null_user_is_nobody_in_documents_as_in_rows(rows):
    nobody = {"user": None, "title": "t", "text": "x"}
    assert {row.user for row in rows({"a.jsonl": lines(nobody, nobody)})} == {"all"}


@pytest.mark.parametrize("key", ["date", "idx"])
def test_no_later_document_slips_into_a_profile(rows, key):
    order = {"date": ["2/1/2024", "1/15/2024", "12/1/2023"], "idx": ["10", "9", "8"]}[key]
    documents = [{"title": "t", "text": f"x{age}", key: one} for age, one in zip((2, 1, 0), order, strict=True)]
    try:
        read = rows({"a.jsonl": lines(*documents)}, profile={"select": "all"})
    except DataError:
        return
    earlier = {row.completion[0]["content"]: [item.text for item in row.profile] for row in read}
    assert earlier == {"x0": [], "x1": ["x0"], "x2": ["x1", "x0"]}


def test_a_renamed_column_takes_the_place_of_its_namesake(rows):
    record = {"user": "ann", "profile": "p", "prompt": "q", "answer": "mine", "completion": "another model's"}
    (row,) = rows({"a.jsonl": lines(record)}, data={"columns": {"completion": "answer"}})
    assert row.completion[0]["content"] == "mine"


def test_user_number_0_of_lamp_is_a_user(rows):
    (row,) = rows({"a.jsonl": lines({**QUESTION, "user_id": 0, "output": "o"})})
    assert row.user == "0"


@pytest.mark.parametrize("field", ["prompt", "completion", "profile", "user"])
def test_a_lone_surrogate_reaches_the_data_set(rows, field):
    read = rows({"a.jsonl": lines({**ROW, field: "a\ud800b"})})
    assert len(datasets.Dataset.from_list(to_records(read))) == 1
