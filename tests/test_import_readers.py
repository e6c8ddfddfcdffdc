"""The readers behind `perce-lite import`: mailboxes, chats, tables, Markdown, encodings, hostile ZIPs."""

import io
import json
import zipfile
from datetime import date, datetime
from email.message import EmailMessage
from pathlib import Path

import pytest
import writing_fixtures as planted
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_fixtures import mail, mbox, prose

from perce_lite import unpacking
from perce_lite.chats import answers, chats_in, whatsapp
from perce_lite.errors import DataError
from perce_lite.mails import own_words, plain_text, read_mail, split_mbox
from perce_lite.reading import Reader
from perce_lite.texts import from_markdown, from_records, table
from perce_lite.unpacking import decoded, files_of
from perce_lite.writings import Notes, Writing, count_words, date_of, first_words, last_words, pieces, tidy


def read(folder: Path, *me: str, senders: tuple[str, ...] = ()) -> tuple[list[Writing], Notes]:
    """All that `me` wrote in the files of a folder or a ZIP."""
    notes = Notes()
    reader = Reader(notes)
    reader.read(files_of(folder))
    return reader.of(senders, me), notes


# Mailboxes.


def of_mail(message: EmailMessage) -> Writing | None:
    found = read_mail(message.as_bytes(), "m", Notes())
    return None if found is None else found[2]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_mailbox_is_cut_between_mails_and_nowhere_else(line_end):
    body = f"{prose(1)}\n\nFrom here on it is quiet.\nFrom the sea no sound."
    content = mbox(mail("Ann <ann@x.org>", "A", body), mail("ann@x.org", "B", prose(2)), line_end=line_end)
    mails = [read_mail(one, "m", Notes()) for one in split_mbox(io.BytesIO(content))]
    assert [one and one[2].text for one in mails] == [body, prose(2)]
    assert [(one[0], one[1]) for one in mails if one] == [("ann@x.org", "Ann"), ("ann@x.org", "")]


def test_as_the_standard_library_cuts_it(tmp_path):
    import mailbox

    content = mbox(*(mail("ann@x.org", f"S{number}", prose(number)) for number in range(5)))
    (tmp_path / "m").write_bytes(content)
    theirs = [bytes(one) for one in mailbox.mbox(tmp_path / "m")]
    assert [one.strip() for one in split_mbox(io.BytesIO(content))] == [one.strip() for one in theirs]


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", "koi8-r", "iso-2022-jp"])
@pytest.mark.parametrize("cte", ["base64", "quoted-printable"])
def test_encodings_of_mails(charset, cte):
    text = {"koi8-r": "Сегодня снег и ветер", "iso-2022-jp": "今日は雪です"}.get(charset, "Grüße aus Köln, voilà")
    found = of_mail(mail("Jürgen <j@x.org>", f"Re: AW: {text}", text, charset=charset, cte=cte))
    assert found is not None
    assert (found.text, found.title, found.date) == (text, text, "2024-05-01T10:15:00")


@pytest.mark.parametrize("charset", ["no-such-charset", "us-ascii"])
def test_a_charset_that_is_a_lie(charset):
    raw = f"From: a@x.org\nContent-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: 8bit\n\n".encode()
    found = read_mail(raw + "Grüße und Küsse".encode("cp1252"), "m", Notes())
    assert found is not None
    assert found[2].text == "Grüße und Küsse"


def test_broken_headers_are_no_end():
    raw = b"From: =?utf-8?b?AAA?= <a@x.org\nSubject: =?xx?q?=ff?=\nDate: someday\n\n" + prose(1).encode()
    found = read_mail(raw, "m", Notes())
    assert found is not None
    assert (found[2].text, found[2].date) == (prose(1), None)


def test_the_plain_part_counts_and_attachments_do_not():
    message = mail("a@x.org", "S", prose(1), html=f"<p>{prose(2)}</p>")
    message.add_attachment("Attached words that somebody else may have written", filename="x.txt")
    message.add_attachment(mail("b@x.org", "Fwd", prose(3)))
    found = of_mail(message)
    assert found is not None
    assert found.text == prose(1)


def test_html_alone_is_read_without_markup_and_quotes():
    html = (
        "<html><head><title>No</title><style>p {}</style></head><body><p>Caf&eacute; &amp; rain<br>again</p>"
        "<div>Yours</div><blockquote>Old <blockquote>older</blockquote> words</blockquote>"
        '<div class="gmail_quote">On Friday Bob wrote: <div>old</div> still old</div><p>PS: done</p></body></html>'
    )
    found = of_mail(mail("a@x.org", "S", "", html=html))
    assert found is not None
    assert found.text.split() == "Café & rain again Yours PS: done".split()
    assert plain_text("a<script>b</script>c<p>d") == "ac\n\nd"


def test_a_mail_without_text_is_noted():
    message = EmailMessage()
    message["From"] = "a@x.org"
    message.add_attachment(b"\0\1", maintype="image", subtype="png")
    notes = Notes()
    assert read_mail(message.as_bytes(), "m", notes) is None
    assert notes.skipped == {"a mail without text": ["m"]}


@pytest.mark.parametrize(
    "below",
    [
        "\n\nOn Fri, 3 May 2024 at 10:15, Bob <bob@x.org> wrote:\n> old\n>> older\n",
        "\n\nOn Friday the third of May 2024 at a quarter past ten,\nBob <bob@x.org> wrote:\n\n> old",
        "\n\nAm 03.05.2024 um 10:15 schrieb Bob Bell <bob@x.org>:\n> old",
        "\n\nLe 3 mai 2024 à 10:15, Bob a écrit :\n> old",
        "\n\nBob wrote:\n> old",
        "\n\nOn Fri, 3 May 2024, Bob wrote:\n",
        "\n-- \nAnn Bell\nLighthouse 4",
        "\n--\nAnn",
        "\n\n-----Original Message-----\nFrom: Bob\nSubject: x\n\nold",
        "\n\nFrom: Bob <b@x.org>\nSent: Friday\nTo: Ann\n\nold",
        "\n\nSent from my iPhone",
        "\n\n-- \nAnn\n\nOn Fri, Bob wrote:\n> old",
    ],
)
def test_what_is_quoted_or_signed_is_cut(below):
    said = "Thanks, I read it twice.\n\nFrom Monday on I am at sea -- really."
    assert own_words(said + below) == said
    assert own_words((said + below).replace("\n", "\r\n")) == said


def test_answers_between_quotes_stay_and_so_does_what_only_looks_like_one():
    body = "Hello,\n\nOn the 3rd I sailed.\n\nBob wrote:\n> First?\nYes.\n\n> Second?\nNo. He wrote:\nnothing at all."
    assert own_words(body) == "Hello,\n\nOn the 3rd I sailed.\n\nYes.\n\nNo. He wrote:\nnothing at all."
    assert own_words("This is what he wrote:") == "This is what he wrote:"


def test_lines_that_flow_are_joined():
    message = mail("a@x.org", "S", "x")
    message.set_content("One line that \ngoes on. \nHere.\nNext.\n\n-- \nAnn\n")
    message.set_param("format", "flowed")
    found = of_mail(message)
    assert found is not None
    assert found.text == "One line that goes on. Here.\nNext."


# Chats.


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
    chat = whatsapp(text, "c")
    assert chat is not None
    assert [(one.author, one.text) for one in chat.messages] == [
        ("Bob", prose(0)),
        ("Ann", prose(1)),
        ("Bob", f"{prose(2)}\nand a second: line"),
    ]
    assert chat.messages[1].date == first


def test_a_diary_with_dates_is_no_chat():
    assert whatsapp("31.12.2020, 10:15 - Snow: all day.\nNothing else happened.", "d") is None
    assert whatsapp(prose(1), "d") is None


# Tables, Markdown, text.


@pytest.mark.parametrize("between", [",", ";", "\t", "|"])
def test_tables(between):
    cells = [
        ["id", "Title", "Body", "published"],
        ["1", "One", f'"{prose(1)}\r\n""so""{between} he said"', "31.5.2024"],
    ]
    text = "\r\n".join(between.join(row) for row in cells) + "\r\n"
    [found] = from_records(table(text, "t.csv"), "t.csv", None, Notes())
    assert (found.title, found.date, found.source) == ("One", "2024-05-31", "t.csv, row 1")
    assert found.text == f'{prose(1)}\n"so"{between} he said'


def test_the_column_of_texts():
    records = [{"message": "ok", "remarks": prose(1), "other": prose(2, 6)}, {"message": "no", "remarks": ""}]
    notes = Notes()
    assert [one.text for one in from_records(records, "t", None, notes)] == [prose(1)]
    assert notes.skipped == {"empty": ["t, row 2"]}
    assert [one.text for one in from_records(records, "t", "other", Notes())] == [prose(2, 6)]


def test_a_table_of_several_authors_is_a_chat_unless_its_column_is_named(tmp_path):
    planted.write(tmp_path, {"c.csv": f"Author,Date,Content\nBob,2024-01-01,{prose(1)}\nAnn,2024-01-02,{prose(2)}\n"})
    found, _ = read(tmp_path, "Ann")
    assert [(one.query, one.text) for one in found] == [(prose(1), prose(2))]
    reader = Reader(Notes(), "Content")
    reader.read(files_of(tmp_path))
    assert [one.text for one in reader.of((), ())] == [prose(1), prose(2)]


@pytest.mark.parametrize(
    ("text", "title", "date", "body"),
    [
        ("---\ntitle: 'Rain: x'\ndate: 2024-05-31\ntags: [a]\n---\nIt rains.", "Rain: x", "2024-05-31", "It rains."),
        ("---\r\ntitle: Rain\r\n---\r\n# Rain\r\n\r\nIt rains.", "Rain", "2023-01-02", "It rains."),
        ("---\ntitle: Rain\n---\n# Other\nIt rains.", "Rain", "2023-01-02", "# Other\nIt rains."),
        ("# Rain #\nIt rains.\n\n# More\nYes.", "Rain", "2023-01-02", "It rains.\n\n# More\nYes."),
        ("---\nno: [yaml\n---\nIt rains.", "", "2023-01-02", "---\nno: [yaml\n---\nIt rains."),
        ("---\ndate: 2024-13-45\n---\nIt rains.", "", "2023-01-02", "It rains."),
        ("It rains.", "", "2023-01-02", "It rains."),
    ],
)  # fmt: skip
def test_markdown(text, title, date, body):
    found = from_markdown(text, "posts/2023-01-02-rain.md")
    assert (found.title, found.date, found.text) == (title, date, body)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("latin-1", b""),
    ],
)
def test_encodings(encoding, mark):
    text = "Grüße, naïve café\r\nÜber “uns”" if encoding != "latin-1" else "Grüße, naïve café\r\nÜber uns"
    found = decoded(mark + text.encode(encoding))
    assert found is not None
    assert tidy(found) == text.replace("\r\n", "\n")


def test_what_is_no_text():
    assert decoded(b"ab\0cd") is None
    assert decoded(b"\xff\xfea") is None
    assert decoded(b"\x81\x8d\x8f") is None


@pytest.mark.parametrize(
    ("given", "iso"),
    [
        (date(2024, 5, 31), "2024-05-31"), (datetime(2024, 5, 31, 10, 15), "2024-05-31T10:15:00"),
        ("2024-05-31", "2024-05-31"), ("2024/5/31 10:15", "2024-05-31T10:15:00"),
        ("2024-05-31T10:15:30.25Z", "2024-05-31T10:15:30"), ("31.5.2024", "2024-05-31"),
        ("Fri, 31 May 2024 23:15:00 -0500", "2024-05-31T23:15:00"), (1717150500, "2024-05-31T10:15:00"),
        ("1717150500000", "2024-05-31T10:15:00"), ("31/5/2024", None), ("2024-02-30", None), (True, None),
        (2024, None), (None, None), ("soon", None), (float("nan"), None), (1e300, None), ([1], None),
    ],
)  # fmt: skip
def test_dates(given, iso):
    assert date_of(given) == iso


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab. \n!。雪é\t\r\u2028"), max_size=200), st.integers(1, 9))
def test_cutting_loses_nothing_but_space(text, limit):
    parts = pieces(tidy(text), limit)
    assert "".join("".join(parts).split()) == "".join(text.split())
    whole = max([count_words(one) for one in text.replace("。", "。 ").split()], default=0)
    assert all(count_words(part) <= max(limit, whole) for part in parts)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(1, 9))
def test_ends_of_texts(text, count):
    assert count_words(first_words(text, count).removesuffix(" ...")) <= count
    assert count_words(last_words(text, count).removeprefix("... ")) <= count
    assert tidy(tidy(text)) == tidy(text)
    json.dumps(tidy(text)).encode("utf-8")


# Folders and ZIPs.


def zipped(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_reads_as_the_folder_does(tmp_path):
    files = {
        "b/2.txt": prose(1),
        "b/10.txt": prose(2),
        "chat.txt": planted.whatsapp(["1/1/21", "1/2/21"]),
        "Inbox": mbox(mail("a@x.org", "S", prose(3))),
    }
    folder = planted.write(tmp_path / "f", files)
    archive = zipped(tmp_path / "f.zip", {name: (folder / name).read_bytes() for name in files})
    there = read(folder, "Ann")[0]
    assert [one.text for one in there] == [prose(1), prose(2), prose(3), prose(1)]
    assert read(archive, "Ann")[0] == there


def test_names_that_lead_out_of_a_zip_write_nothing(tmp_path):
    (tmp_path / "deep").mkdir()
    names = ["../../out.txt", "/tmp/abs.txt", "a/../../../b.txt", "C:\\x.txt", "__MACOSX/._a.txt"]
    archive = zipped(tmp_path / "deep/z.zip", {name: prose(number).encode() for number, name in enumerate(names)})
    before = sorted(tmp_path.rglob("*"))
    found, notes = read(archive)
    assert {one.text for one in found} == {prose(number) for number in range(4)}
    assert notes.skipped == {"hidden file": ["__MACOSX/._a.txt"]}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_bomb_is_stopped_by_what_comes_out_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "LARGEST_ZIP", 2**20)
    archive = zipped(tmp_path / "bomb.zip", {f"{number}.txt": b"a " * 2**18 for number in range(4)})
    assert archive.stat().st_size < 2**14
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        read(archive)


def test_a_size_that_is_a_lie_is_not_believed(tmp_path, monkeypatch):
    """The directory says ten bytes; what comes out is counted all the same, or is no good."""
    monkeypatch.setattr(unpacking, "LARGEST_FILE", 2**10)
    archive = zipped(tmp_path / "lie.zip", {"a.txt": b"a " * 2**14, "b.txt": prose(1).encode()})
    content = archive.read_bytes().replace((2**15).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(content)
    found, notes = read(archive)
    assert [one.text for one in found] == [prose(1)]
    assert [where for where in notes.skipped.values() if where[0].startswith("a.txt")]


def test_a_file_that_is_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "LARGEST_FILE", 2**10)
    found, notes = read(planted.write(tmp_path, {"a.txt": "a " * 2**10, "b.txt": prose(1)}))
    assert ([one.text for one in found], list(notes.skipped.values())) == ([prose(1)], [["a.txt"]])


def test_torn_locked_and_nested_zips(tmp_path):
    archive = zipped(tmp_path / "z.zip", {"a.txt": prose(1).encode() * 50, "b.txt": prose(2).encode()})
    content = bytearray(archive.read_bytes())
    content[60] ^= 0xFF  # within a.txt
    archive.write_bytes(content)
    found, notes = read(archive)
    assert [one.text for one in found] == [prose(2)]
    assert notes.skipped["cannot be read"][0].startswith("a.txt (")
    locked = zipped(tmp_path / "l.zip", {"a.txt": prose(1).encode()}, zipfile.ZIP_STORED)
    content = bytearray(locked.read_bytes())
    content[6] |= 1  # encrypted, says its own head
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # and the directory's
    locked.write_bytes(content)
    assert "password" in read(locked)[1].skipped["cannot be read"][0]
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 nothing more")
    with pytest.raises(DataError, match="not a ZIP that can be read"):
        files_of(tmp_path / "broken.zip")
    nested = zipped(tmp_path / "n.zip", {"in.zip": archive.read_bytes()})
    assert read(nested)[1].skipped == {"not a kind that is read: .zip": ["in.zip"]}


def test_a_file_without_rights_and_a_link_in_a_circle(tmp_path):
    planted.write(tmp_path, {"a.txt": prose(1), "sub/b.txt": prose(2)})
    (tmp_path / "sub/round").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert [one.name for one in files_of(tmp_path)] == ["a.txt", "sub/b.txt"]


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MOST_FILES", 2)
    planted.write(tmp_path, {f"{number}.txt": prose(number) for number in range(3)})
    with pytest.raises(DataError, match="3 files; at most 2 are read"):
        files_of(tmp_path)


HEADS = [
    b"From x\n",
    b"From: a@x.org\n",
    b"Subject: =?utf-8?q?=ff?=\n",
    b"Date: 99\n",
    b"Content-Type: multipart/mixed; boundary=b\n",
    b"Content-Type: text/plain; charset=\xff\n",
    b"Content-Type: text/html; format=flowed\n",
    b"--b\n",
    b"--b--\n",
    b"\n",
    b"Content-Transfer-Encoding: base64\n",
    b"Content-Type: message/rfc822\n",
    b"aGk=\n",
    b"<p>x<head>\n",
    b"> x\n",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(HEADS), max_size=12))
def test_no_mail_breaks_the_reader(lines):
    for content in split_mbox(lines):
        read_mail(content, "m", Notes())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".txt", ".md", ".csv", ".json", ".jsonl", ".eml", ".mbox", ""]))
def test_no_bytes_break_a_reader(tmp_path_factory, content, ending):
    folder = planted.write(tmp_path_factory.mktemp("in"), {f"a{ending}": content})
    reader = Reader(Notes())
    reader.read(files_of(folder))
    assert all(isinstance(one.text, str) for one in reader.texts)


FIELDS = ["from", "text", "messages", "mapping", "role", "content", "date", "parent", "message", "author"]
LEAVES = st.none() | st.text(max_size=9) | st.floats()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner))


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_no_json_breaks_a_reader(tmp_path_factory, value):
    folder = planted.write(tmp_path_factory.mktemp("in"), {"a.json": json.dumps(value)})
    Reader(Notes()).read(files_of(folder))
