"""Exports of messengers and assistants: an author decides whose words they are; what is beside them is nobody's."""

# ruff: noqa: E501 (tables of what programs write, a line each)

import json

import pytest
import writing_fixtures as planted
from writing_fixtures import prose, read

from perce_lite.data.importers import archives, reading
from perce_lite.data.importers.chat_exports import without_mojibake
from perce_lite.data.importers.large_json import TornJsonError, read_large
from perce_lite.errors import DataError

A1, B1, A2 = prose(1), prose(2), prose(3)


def own(tmp_path, *me: str, **files) -> list[str]:
    """What `me` wrote in planted files, a__json as a.json."""
    named = {name.replace("__", "."): content for name, content in files.items()}
    return [one.text for one in read(planted.write(tmp_path, named), *me)[0]]


SHAPES = {
    "Slack": [{"type": "message", "user": "U1", "text": A1, "ts": "1.7e9"}, {"type": "message", "user": "U2", "text": B1, "ts": "1.7e9"}],
    "Discord": {"guild": {"name": "G"}, "messages": [
        {"type": "Default", "content": A1, "author": {"id": "1", "name": "U1", "isBot": False}, "forwardedMessage": None},
        {"type": "Reply", "content": B1, "author": {"id": "2", "name": "bob"}},
        {"type": "GuildMemberJoin", "content": "Joined the server today with us all.", "author": {"name": "U1"}},
    ]},
    "Skype": {"userId": "8:x", "conversations": [{"displayName": "Bob", "MessageList": [
        {"from": "U1", "messagetype": "RichText", "content": A1, "originalarrivaltime": "2024-05-03T10:15:07.1Z"},
        {"from": "8:bob", "messagetype": "Text", "content": B1},
        {"from": "U1", "messagetype": "ThreadActivity/AddMember", "content": "<addmember>of five words and more</addmember>"},
    ]}]},
    "Google Chat": {"messages": [
        {"creator": {"name": "U1", "email": "u1@x.org", "user_type": "Human"}, "created_date": "Friday, May 3", "text": A1},
        {"creator": {"name": "Bob", "email": "b@x.org"}, "text": B1},
    ]},
    "Instagram": {"participants": [{"name": "U1"}, {"name": "Bob"}], "messages": [
        {"sender_name": "U1", "timestamp_ms": 1700000000000, "content": A1},
        {"sender_name": "U1", "timestamp_ms": 1700000001000, "content": "You sent an attachment."},
        {"sender_name": "Bob", "timestamp_ms": 1700000002000, "content": B1},
    ]},
    "Meta, encrypted": {"participants": ["U1", "Bob"], "messages": [
        {"senderName": "U1", "text": A1, "timestamp": 1700000000000, "type": "text", "isUnsent": False},
        {"senderName": "U1", "text": "a text that was taken back later on", "timestamp": 1, "isUnsent": True},
        {"senderName": "Bob", "text": B1, "timestamp": 1700000002000, "type": "text"},
    ]},
    "Telegram, all chats": {"about": "Here is the data you requested from us", "contacts": {"list": [
        {"first_name": "Bob", "last_name": "of the boats", "phone_number": "00", "date": "2024-05-01T10:01:00"}]},
        "chats": {"list": [{"name": "Bob", "type": "personal_chat", "messages": [
            {"type": "message", "from": "U1", "text": [{"type": "bold", "text": A1}]},
            {"type": "message", "from": "U1", "forwarded_from": None, "text": "forwarded from an account that is gone"},
            {"type": "message", "from": "U1", "via_bot": "@b", "text": "a text that some inline bot has made up"},
            {"type": "message", "from": "Bob", "text": B1}]}]}},
    "Matrix": {"messages": [
        {"type": "m.room.message", "sender": "U1", "content": {"msgtype": "m.text", "body": A1}, "origin_server_ts": 1700000000000},
        {"type": "m.room.member", "sender": "U1", "content": {"membership": "join", "body": "U1 has joined this room"}},
        {"type": "m.room.message", "sender": "@bob:x", "content": {"body": f"> <@u1:x> {A1}\n\n{B1}"}},
    ]},
    "Snapchat": {"bob": [{"From": "U1", "Media Type": "TEXT", "Created": "2024-05-03 10:15:07 UTC", "Content": A1},
                         {"From": "bob", "Media Type": "TEXT", "Created": "2024-05-03 10:16:07 UTC", "Content": B1}]},
    "TikTok": {"Direct Messages": {"Chat History": {"ChatHistory": {"Chat History with bob:": [
        {"Date": "2024-05-03 10:15:07", "From": "U1", "Content": A1}, {"Date": "2024-05-03 10:16:07", "From": "bob", "Content": B1}]}}}},
    "X": [{"dmConversation": {"conversationId": "1-2", "messages": [
        {"messageCreate": {"recipientId": "2", "senderId": "U1", "text": A1, "createdAt": "2024-05-03T10:15:07.000Z"}},
        {"messageCreate": {"recipientId": "U1", "senderId": "2", "text": B1}}]}}],
    "Hangouts": {"conversations": [{"events": [
        {"sender_id": {"gaia_id": "U1"}, "timestamp": "1700000000000000",
         "chat_message": {"message_content": {"segment": [{"type": "TEXT", "text": A1}]}}},
        {"sender_id": {"gaia_id": "2"}, "chat_message": {"message_content": {"segment": [{"type": "TEXT", "text": B1}]}}}]}]},
    "Mattermost": [{"type": "post", "post": {"team": "t", "user": "U1", "message": A1}}, {"type": "post", "post": {"user": "bob", "message": B1}}],
    "one author": [{"author": "U1", "text": A1}],
    "names in words": [{"Sender Name": "U1", "Message": A1}, {"Sender Name": "Bob", "Message": B1}],
    "Reddit": [{"author": "U1", "body": A1, "replies": []}, {"author": "bob", "body": B1}],
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_who_wrote_it_decides(tmp_path, name):
    assert own(tmp_path / "a", "U1", c__json=SHAPES[name]) == [A1]
    records = SHAPES[name] if isinstance(SHAPES[name], list) else [SHAPES[name]]
    assert own(tmp_path / "b", "U1", c__jsonl="\n".join(map(json.dumps, records))) == [A1]
    with pytest.raises(DataError, match="--me"):
        own(tmp_path / "c", c__json=SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_large_json_is_read_piece_by_piece_to_the_same_texts(tmp_path, monkeypatch, name):
    monkeypatch.setattr(archives, "LARGEST_FILE", 16)
    assert own(tmp_path, "U1", c__json=json.dumps(SHAPES[name], indent=1)) == [A1]


ASSISTANTS = {
    "ChatGPT": planted.chatgpt(turns=2),
    "Claude": [{"uuid": "1", "name": "Lamps", "account": {"uuid": "2"}, "chat_messages": [
        {"sender": "human", "text": prose(0), "content": [{"type": "text", "text": prose(0)}]},
        {"sender": "assistant", "text": prose(1), "content": [{"type": "text", "text": prose(1)}]},
        {"sender": "human", "text": prose(2), "attachments": [{"extracted_content": "Words of a file that was attached"}]}]}],
    "DeepSeek": [{"id": "1", "title": "Lamps", "mapping": {"root": {"id": "root", "parent": None, "message": None}, **{
        str(n): {"id": str(n), "parent": str(n - 1) if n else "root", "message": {"inserted_at": "2024-05-03T10:15:07",
            "fragments": [{"type": kind, "content": prose(n)}]}} for n, kind in enumerate(("REQUEST", "RESPONSE", "REQUEST"))}}}],
    "Grok": {"conversations": [{"conversation": {"id": "1", "title": "Lamps"}, "responses": [
        {"response": {"sender": who, "message": prose(n), "create_time": {"$date": {"$numberLong": "1700000000000"}}}}
        for n, who in enumerate(("human", "assistant", "human"))]}]},
    "rows": [{"messages": [{"role": role, "content": prose(n)} for n, role in enumerate(("user", "assistant", "user"))]}],
}  # fmt: skip


@pytest.mark.parametrize("name", ASSISTANTS)
@pytest.mark.parametrize("large", [False, True])
def test_chats_with_assistants(tmp_path, monkeypatch, name, large):
    if large:
        monkeypatch.setattr(archives, "LARGEST_FILE", 16)
    assert own(tmp_path, c__json=ASSISTANTS[name]) == [prose(0), prose(2)]


SIDE = {
    "shared_conversations.json": [{"id": "1", "title": "A long poem about the rain and the sea"}],
    "message_feedback.json": [{"id": "1", "rating": "thumbs_up", "content": '{"text": "that was a very good answer"}'}],
    "model_comparisons.json": [{"id": "1", "input": {"text": "some words of the model that was compared here"}}],
    "user.json": {"id": "1", "email": "a@x.org", "about": [{"text": "words about the user of the program"}]},
    "projects.json": [{"uuid": "1", "name": "How to", "description": "Words of a file of a project here", "docs": [{"content": prose(9)}]}],
    "users.json": [{"uuid": "1", "full_name": "Ann Bell of the northern rocks and seas", "email_address": "a@x.org"}],
    "memories.json": [{"conversations_memory": "The person likes the sea and long walks there", "account_uuid": "1"}],
    "channels.json": [{"id": "C1", "name": "general", "purpose": {"value": "All that is to be said by all"}}],
    "integration_logs.json": [{"user_id": "U1", "app_type": "bot", "reason": "an app that was put in by somebody"}],
    "MyActivity.json": [{"header": "Search", "title": "Searched for planks of an old boat", "time": "2024-05-03T10:15:07Z"}],
    "watch-history.json": [{"header": "YouTube", "title": "Watched How to mend the planks of a boat", "titleUrl": "x"}],
    "group_info.json": {"members": [{"name": "Ann Bell", "email": "a@x.org", "user_type": "Human"}]},
    "your_search_history.json": {"searches_v2": [{"timestamp": 1, "data": [{"text": "how to mend an old boat"}], "title": "You searched"}]},
    "ads_information.json": {"history_v2": [{"title": "Boats and ropes and sails for all", "action": "Clicked ad", "timestamp": 1}]},
    "made_up_by_a_new_version.json": [{"id": 1, "summary": "A summary that some program wrote of it all", "note": prose(8)}],
    "nested/deeper/unknown.json": {"a": {"b": [{"description": "five words or more of an app"}]}},
}  # fmt: skip


@pytest.mark.parametrize("name", SIDE)
def test_side_files_of_an_export_are_left_out_by_name(tmp_path, name):
    files = {"conversations.json": planted.chatgpt(turns=1), name: SIDE[name]}
    found, notes = read(planted.write(tmp_path, files))
    assert [one.text for one in found] == [prose(0)]
    assert [name] in notes.skipped.values()


@pytest.mark.parametrize("name", [name for name in SIDE if name not in ("made_up_by_a_new_version.json",)])
def test_side_files_alone_are_no_texts_either(tmp_path, name):
    found, notes = read(planted.write(tmp_path, {name: SIDE[name]}))
    assert (found, [name] in notes.skipped.values()) == ([], True)


def test_slack_ids_are_named_by_users_json(tmp_path):
    users = [
        {
            "id": "U01ANN",
            "name": "ann",
            "profile": {"real_name": "Ann Bell", "display_name": "annb", "title": prose(7)},
        },
        {"id": "U02BOB", "name": "bob", "profile": {"real_name": "Bob"}},
    ]
    day = [
        {
            "type": "message",
            "user": "U02BOB",
            "text": f"<@U01ANN> see <https://x.org|this page> &amp; {B1}",
            "ts": "1700000000.1",
        },
        {"type": "message", "user": "U01ANN", "text": A1, "ts": "1700000001.1"},
        {
            "type": "message",
            "subtype": "channel_join",
            "user": "U01ANN",
            "text": "<@U01ANN> has joined the channel",
            "ts": "1700000002.1",
        },
        {
            "type": "message",
            "subtype": "bot_message",
            "username": "Ann Bell",
            "text": "words that a bot says for her",
            "ts": "1700000003.1",
        },
    ]
    files = planted.write(tmp_path, {"general/2023-11-14.json": day, "users.json": users})
    for me in ("Ann Bell", "ann", "ANNB", "U01ANN"):
        [found] = read(files, me)[0]
        assert (found.text, found.query) == (A1, f"@Ann Bell see this page & {B1}")
    with pytest.raises(DataError, match=r"Bob \(1\), Ann Bell \(1\)|Ann Bell \(1\), Bob \(1\)"):
        read(files, "Zoe")


def meta(text: str) -> str:
    return text.encode().decode("latin-1")


@pytest.mark.parametrize(
    "text",
    ["Café", "I’d love that 😀", "Привет всем", "日本語です", "naïve — “so”", "Zoë", "ąęśćż", "مرحبا", "x² ≤ 3 €"],
)
def test_metas_mojibake_is_mended_in_all_fields(tmp_path, text):
    export = {"participants": [{"name": meta(text)}], "title": meta(text), meta(text): [meta(f"{text}, again")]}
    assert without_mojibake(export) == {"participants": [{"name": text}], "title": text, text: [f"{text}, again"]}
    messages = [
        {
            "sender_name": meta(f"Zoë {text}"),
            "timestamp_ms": 1700000000000,
            "content": meta(f"{text} and four words more"),
        }
    ]
    assert own(tmp_path, f"Zoë {text}", message_1__json={"messages": messages}) == [f"{text} and four words more"]


@pytest.mark.parametrize("text", ["Café", "Привет", "São Paulo", "😀", "naïve “so”", "Ã and ©", "plain"])
def test_what_is_right_is_left_as_it_is(text):
    assert without_mojibake({"a": [text, "Zoë"]}) == {"a": [text, "Zoë"]}


def test_a_torn_letter_at_the_end_of_metas_title_is_dropped():
    assert without_mojibake([meta("Café")[:-1], meta("Zoë")]) == ["Caf", "Zoë"]


def test_posts_and_notes_of_exports(tmp_path):
    posts = [
        {"timestamp": 1700000000, "data": [{"post": meta(f"Café: {A1}")}], "title": "Ann Bell updated her status."}
    ]
    picture = [{"media": [{"uri": "x.jpg", "creation_timestamp": 1700000000, "title": meta(f"Zoë: {A2}")}]}]
    note = {
        "isTrashed": False,
        "isPinned": False,
        "textContent": B1,
        "title": "Lamps",
        "createdTimestampUsec": 1700000000000000,
    }
    trashed = {**note, "isTrashed": True, "textContent": prose(9)}
    shared = {**note, "textContent": prose(8), "sharees": [{"email": "a@x.org"}, {"email": "b@x.org"}]}
    files = {"a/your_posts_1.json": posts, "b/posts_1.json": picture, "c.json": note, "d.json": trashed, "e.json": shared,
             "ads.json": [{"text": "words of some advertiser in this export"}]}  # fmt: skip
    found, notes = read(planted.write(tmp_path, files))
    assert [(one.text, one.date and one.date[:10]) for one in found] == [
        (f"Café: {A1}", "2023-11-14"),
        (f"Zoë: {A2}", "2023-11-14"),
        (B1, "2023-11-14"),
    ]
    assert {"a note in the bin", "a note that several people write"} < set(notes.skipped)


@pytest.mark.parametrize(
    "table",
    [
        "author,text\nBob,{b}\nBob,{b} too\n", "From;Content\nBob;{b}\n", "Sender Name\tMessage\nBob\t{b}\n",
        "user,body,date\nBob,{b},2024-05-03\n", "Absender;Nachricht\nBob;{b}\n", "Отправитель;Сообщение\nБоб;{b}\n",
        "name,comment\nBob,{b}\n", "username|content\nbob|{b}\n", "from_email,body\nb@x.org,{b}\n", "author_name,text\nBob,{b}\n",
        "CONVERSATION ID,FROM,TO,DATE,CONTENT\n1,Bob,Ann,2024-05-03,{b}\n",
    ],
)  # fmt: skip
def test_a_table_of_one_author_is_not_the_persons_unless_it_says_so(tmp_path, table):
    files = planted.write(tmp_path, {"t.csv": table.format(b=B1)})
    with pytest.raises(DataError, match="these chats are of one person"):
        read(files)
    name = table.splitlines()[1]
    bob = next(word for word in ("Bob", "Боб", "b@x.org", "bob") if word in name)
    assert read(files, bob)[0][0].text.startswith(B1)


def test_a_table_without_a_head_is_no_table(tmp_path):
    path = planted.write(tmp_path, {"t.csv": f"2024-05-03 10:15,Ann,{A1}\n2024-05-03 10:16,Bob,{B1}\n"})
    reader = reading.Reader(reading.Notes(), alone=True)
    with pytest.raises(DataError, match="names its columns"):
        reader.read(archives.files_of(path))


def test_names_that_are_titles(tmp_path):
    records = [
        {"name": f"The story of the {word} at sea", "text": prose(n)} for n, word in enumerate(("lamp", "boat", "rope"))
    ]
    assert own(tmp_path, r__json=records) == [prose(0), prose(1), prose(2)]


def test_torn_large_json(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST_FILE", 16)
    whole = "\n".join(json.dumps({"author": "U1", "text": prose(n)}) for n in range(3))
    found, notes = read(planted.write(tmp_path, {"c.jsonl": whole + '\n{"author": "U1", "te'}), "U1")
    assert [one.text for one in found] == ["\n".join(prose(n) for n in range(3))]
    assert list(notes.skipped) == ["JSON that is torn; what stands ahead of that is read"]
    with pytest.raises(TornJsonError), (tmp_path / "c.jsonl").open("rb") as file:
        read_large(file)
