"""Chats: the shapes of many exports, turns and who said them."""

import json

import pytest
import writing_fixtures as planted
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_fixtures import prose, read

from perce_lite.data.importers.archives import files_of
from perce_lite.data.importers.chat_exports import chats_in
from perce_lite.data.importers.chat_texts import chat_of_text
from perce_lite.data.importers.chats import answers
from perce_lite.data.importers.reading import Reader
from perce_lite.data.importers.writings import Notes


def test_chatgpt_the_branch_that_was_left_standing(tmp_path):
    found, notes = read(planted.write(tmp_path, {"conversations.json": planted.chatgpt(turns=3)}))
    assert [(one.query, one.text) for one in found] == [
        ("", prose(0)),
        (prose(1), prose(2)),
        (prose(3), prose(4)),
    ]
    assert found[0].date == "2023-11-14T22:13:20"
    assert notes.read == {"chats": 1}


def test_a_tree_that_turns_in_a_circle():
    [conversation] = planted.chatgpt(turns=1)
    conversation["mapping"]["root"]["parent"] = "n1"
    assert len([one for chat in chats_in([conversation], "c") for one in chat.messages]) >= 2


@pytest.mark.parametrize(
    "export",
    [
        [{"role": "assistant", "content": prose(1)}, {"role": "user", "content": prose(2)}],
        {"messages": [
            {"role": "assistant", "content": [{"type": "text", "text": prose(1)}]},
            {"role": "user", "content": prose(2)},
        ]},
        [{"conversations": [{"from": "gpt", "value": prose(1)}, {"from": "human", "value": prose(2)}]}],
        [{"chat_messages": [{"sender": "assistant", "text": prose(1)}, {"sender": "human", "text": prose(2)}]}],
        {"messages": [  # the newest first
            {"sender_name": "user", "timestamp_ms": 1700000100000, "content": prose(2)},
            {"sender_name": "bot", "timestamp_ms": 1700000000000, "content": prose(1)},
        ]},
    ],
)  # fmt: skip
def test_shapes_of_exports(tmp_path, export):
    whole, _ = read(planted.write(tmp_path / "a", {"c.json": export}))
    lines = "\n".join(map(json.dumps, export if isinstance(export, list) else [export]))
    by_line, notes = read(planted.write(tmp_path / "b", {"c.jsonl": lines + "\nnot JSON\n"}))
    assert [(one.query, one.text) for one in whole] == [(prose(1), prose(2))]
    assert [(one.query, one.text) for one in by_line] == [(prose(1), prose(2))]
    assert list(notes.skipped) == ["not JSON"]


def test_two_assistants_call_the_person_by_two_names(tmp_path):
    ours = [{"role": role, "content": prose(number)} for number, role in enumerate(("user", "assistant"))]
    theirs = [{"sender": role, "text": prose(number + 2)} for number, role in enumerate(("human", "assistant"))]
    found, _ = read(planted.write(tmp_path, {"a.json": ours, "b.json": {"chat_messages": theirs}}))
    assert [one.text for one in found] == [prose(0), prose(2)]


def test_turns_of_several_people():
    said = [("Bob", "One"), ("Cy", "Two"), ("Ann", "Three"), ("Ann", "Four"), ("Bob", "x " * 99), ("Ann", "Five")]
    [chat] = chats_in([{"from": who, "text": text} for who, text in said], "c")
    found = answers([chat], ["ANN"], Notes())
    assert [(one.query, one.text) for one in found] == [
        ("Bob: One\nCy: Two", "Three\nFour"),
        ("... " + " ".join(["x"] * 40), "Five"),
    ]


def test_messages_a_day_apart_are_two():
    days = [("2024-05-01T10:00:00", "One"), ("2024-05-01T10:30:00", "Two"), ("2024-05-03T10:00:00", "Three")]
    messages = [{"from": "Ann", "text": text, "date": day} for day, text in days]
    [chat] = chats_in([*messages, {"from": "Bob", "text": "Yes", "date": "2024-05-04"}], "c")
    assert [one.text for one in answers([chat], ["Ann"], Notes())] == ["One\nTwo", "Three"]


@pytest.mark.parametrize(
    ("dates", "form", "first"),
    [
        (["12/30/20", "12/31/20", "1/1/21"], "{date}, 10:15 - {who}: {text}", "2020-12-31T10:15:00"),
        (["1/2/24", "2/2/24", "3/2/24"], "{date}, 10:15 PM - {who}: {text}", "2024-02-02T22:15:00"),
        (["30.12.20", "31.12.20", "01.01.21"], "{date}, 10:15 - {who}: {text}", "2020-12-31T10:15:00"),
        (["2020-12-30", "2020-12-31", "2021-01-01"], "[{date}, 10:15:07] {who}: {text}", "2020-12-31T10:15:07"),
        (["30/12/2020", "31/12/2020", "01/01/2021"], "[{date}, 12:15:07\u202fAM] {who}: {text}", "2020-12-31T00:15:07"),
    ],
)
def test_whatsapp_in_the_dates_of_many_countries(dates, form, first):
    text = (
        planted.whatsapp(dates, form)
        + "\nand a second: line\n"
        + form.format(date=dates[2], who="Ann", text="<Media omitted>")
    )
    chat = chat_of_text(text, "c").chat
    assert chat is not None
    assert [(one.author, one.text) for one in chat.messages] == [
        ("Bob", prose(0)),
        ("Ann", prose(1)),
        ("Bob", f"{prose(2)}\nand a second: line"),
    ]
    assert chat.messages[1].date == first


def test_a_diary_with_dates_is_no_chat():
    assert chat_of_text("31.12.2020, 10:15 - Snow: all day.\nNothing else happened.", "d").chat is None
    assert chat_of_text(prose(1), "d").chat is None


FIELDS = ["from", "text", "messages", "mapping", "role", "content", "date", "parent", "message", "author"]
LEAVES = st.none() | st.text(max_size=9) | st.floats()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner))


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_no_json_breaks_a_reader(tmp_path_factory, value):
    folder = planted.write(tmp_path_factory.mktemp("in"), {"a.json": json.dumps(value)})
    Reader(Notes()).read(files_of(folder))


def test_json_that_is_nested_too_deeply_is_left_out(tmp_path):
    files = {"a.json": "[" * 900 + '{"text": "x"}' + "]" * 900, "b.json": "[" * 9**5, "c.txt": prose(1)}
    found, _ = read(planted.write(tmp_path, files))
    assert [one.text for one in found] == [prose(1)]


@pytest.mark.parametrize("odd", [["n0"], {"n0": 1}, 7, None])
def test_a_tree_with_odd_links(odd):
    [conversation] = planted.chatgpt(turns=2)
    conversation["current_node"] = conversation["mapping"]["n1"]["parent"] = odd
    said = [one.text for chat in chats_in([conversation], "c") for one in chat.messages]
    assert set(said) <= {prose(number) for number in range(4)} | {"A question that was put otherwise later on"}
