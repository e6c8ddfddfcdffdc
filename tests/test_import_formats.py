"""DOCX, HTML, PDF, X's archive, Obsidian's vaults and Google Chat; and what is refused by its name."""

import io
import json
import re

import docx
import pytest
import writing_fixtures as planted
from docx.oxml import OxmlElement
from fpdf import FPDF
from writing_fixtures import mail, mbox, prose, read

from perce_lite.data.importers.formatted import unwrapped
from perce_lite.data.importers.reading import KINDS


def word(*paragraphs: tuple[str, str]) -> bytes:
    document = docx.Document()
    for style, text in paragraphs:
        document.add_paragraph(text, style)
    document.add_table(1, 1).cell(0, 0).text = "a cell of a table with many words in it"
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def pdf(*pages: str, password: str = "", head: str = "My diary") -> bytes:
    document = FPDF()
    document.set_font("helvetica", size=12)
    if password:
        document.set_encryption(owner_password=password, user_password=password)
    for number, text in enumerate(pages, 1):
        document.add_page()
        document.cell(0, 10, head, new_x="LMARGIN", new_y="NEXT")
        document.multi_cell(0, 8, text)
        document.set_y(-30)
        document.cell(0, 10, f"- {number} -")
    return bytes(document.output())


def test_docx(tmp_path):
    files = {"a.docx": word(("Title", "A day"), ("Normal", prose(1)), ("Normal", prose(2))), "b.docx": b"PK\3\4torn"}
    (writing,), notes = read(planted.write(tmp_path, files))
    assert (writing.title, writing.text, writing.source) == ("A day", f"{prose(1)}\n\n{prose(2)}", "a.docx")
    assert notes.skipped["a table in a DOCX"] == ["a.docx"]
    assert [where.split(" ")[0] for where in notes.skipped["a DOCX that cannot be read"]] == ["b.docx"]


def test_what_a_reviewer_put_into_a_docx_is_counted(tmp_path):
    document = docx.Document()
    paragraph = document.add_paragraph(prose(1))
    inserted = OxmlElement("w:ins")
    inserted.append(document.add_paragraph("words of a reviewer").runs[0]._r)
    paragraph._p.append(inserted)
    document.save(tmp_path / "a.docx")
    (writing,), notes = read(tmp_path)
    assert (writing.text, list(notes.skipped)) == (
        prose(1),
        ["a tracked insertion in a DOCX; accept the changes in it first"],
    )


def test_html(tmp_path):
    page = (
        f"<html><head><title>Site</title><meta property='article:published_time' content='2024-05-31T10:15:00'>"
        f"<style>p {{}}</style></head><body><nav>Home | About | Much more of it here</nav><article><h1>Rain</h1>"
        f"<p>{prose(1)} <b>Indeed</b>.</p><blockquote>{prose(2)}</blockquote><p>{prose(3)}</p>"
        f"<script>alert('x')</script></article><footer>(c) somebody or other in the year</footer></body></html>"
    )
    (writing,), notes = read(planted.write(tmp_path, {"a.html": page}))
    assert (writing.title, writing.date) == ("Rain", "2024-05-31T10:15:00")
    assert writing.text == f"{prose(1)} Indeed.\n\n{prose(3)}"
    assert notes.skipped == {"a quote in HTML": ["a.html"]}


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ('<div class="page_wrap"><div class="message default clearfix">', "Telegram's chats as HTML; export them"),
        ('<main class="_a706"><div class="_3-95 _a6-g">', "Meta's pages as HTML; ask for JSON instead"),
        ("<!DOCTYPE NETSCAPE-Bookmark-file-1>", "bookmarks"),
    ],
)  # fmt: skip
def test_pages_of_exports_are_no_prose(tmp_path, page, reason):
    found, notes = read(planted.write(tmp_path, {"a.html": f"{page}<p>{prose(1)}</p>"}))
    assert (found, [name.startswith(reason) for name in notes.skipped]) == ([], [True])


def test_a_chat_saved_as_a_page_is_a_chat(tmp_path):
    lines = planted.whatsapp(["1/5/24", "2/5/24", "3/5/24", "4/5/24"]).split("\n")
    page = "".join(f"<p>{line}</p>" for line in lines)
    found, _ = read(planted.write(tmp_path, {"a.html": f"<html><body>{page}</body></html>"}), "Ann")
    assert [writing.text for writing in found] == [prose(1), prose(3)]


def test_pdf(tmp_path):
    said = [" ".join(prose(10 * page + number) for number in range(6)) for page in range(3)]
    files = {
        "a.pdf": pdf(*said),
        "scan.pdf": pdf("", head=""),
        "locked.pdf": pdf("secret", password="x"),
        "torn.pdf": b"%PDF-1",
    }
    files["scan.pdf"] = _without_text()
    (writing,), notes = read(planted.write(tmp_path, files))
    assert " ".join(writing.text.split()) == " ".join(said)
    assert {re.split("[,;]", reason)[0]: places[0].split(" ")[0] for reason, places in notes.skipped.items()} == {
        "a PDF without text": "scan.pdf",
        "a PDF with a password": "locked.pdf",
        "a PDF that cannot be read": "torn.pdf",
    }  # fmt: skip


def _without_text() -> bytes:
    document = FPDF()
    document.add_page()
    document.rect(10, 10, 50, 50)
    return bytes(document.output())


def test_lines_of_a_page_become_paragraphs():
    lines = [
        "It rained all of the day and the har-",
        "bour was as grey as a kettle in the",
        "rain.",
        "Then it stopped, as it does, and the",
        "sun came out.",
    ]
    assert unwrapped(lines) == (
        "It rained all of the day and the harbour was as grey as a kettle in the rain.\n\n"
        "Then it stopped, as it does, and the sun came out."
    )  # fmt: skip


def tweet(text: str, **more) -> dict:
    return {"tweet": {"full_text": text, "created_at": "Wed Oct 10 20:19:24 +0000 2018", **more}}


def test_an_archive_of_x_gives_own_posts_alone(tmp_path):
    links = {"urls": [{"url": "https://t.co/a", "expanded_url": "https://example.org/x"}]}
    tweets = [
        tweet(f"{prose(1)} &amp; https://t.co/a", entities=links),
        tweet(f"RT @bob: {prose(2)}"),
        tweet(f"@bob @cy {prose(3)}", in_reply_to_status_id_str="7"),
        tweet(f"{prose(4)} and so on… https://t.co/b"),
        tweet(f"{prose(5)} https://t.co/c", entities={"media": [{"url": "https://t.co/c"}]}),
    ]
    parts = {
        "tweets": tweets,
        "direct-messages": [],
        "like": [{"like": {"fullText": prose(6)}}],
        "note-tweet": [{"noteTweet": {"core": {"text": prose(7)}, "createdAt": "2023-05-01T10:00:00.000Z"}}],
    }
    files = {
        f"data/{name}.js": f"window.YTD.{name.replace('-', '_')}.part0 = {json.dumps(records)}"
        for name, records in parts.items()
    }
    found, notes = read(
        planted.write(
            tmp_path,
            {
                **files,
                "data/manifest.js": "window.__THAR_CONFIG = {}",
                "data/torn.js": "window.YTD.tweets.part1 = [{",
                "app.js": "var x = 1",
            },
        )
    )
    assert [(writing.text, writing.date) for writing in found] == [
        (prose(7), "2023-05-01T10:00:00"),
        (f"{prose(1)} & https://example.org/x", "2018-10-10T20:19:24"),
        (prose(3), "2018-10-10T20:19:24"),
        (prose(5), "2018-10-10T20:19:24"),
    ]
    assert {reason: len(where) for reason, where in notes.skipped.items()} == {
        "not a kind that is read: .js": 1,
        "direct messages of an X archive, which are not read": 1,
        "a file of an X archive that holds no posts of one's own": 2,
        "a script of an X archive that is torn": 1,
        "a repost on X": 1,
        "a long post on X that is cut short; the whole of it is in note-tweet.js": 1,
    }  # fmt: skip


def test_a_vault_without_its_templates_and_marks(tmp_path):
    note = f"Saw [[Bob Bell|Bob]] and [[Cy]] there. ![[x.png]] {prose(1)} ^abc\n%%secret%%\n```dataview\nLIST\n```"
    files = {
        "v/.obsidian/templates.json": {"folder": "Muster/"},
        "v/.trash/gone.md": prose(8),
        "v/a.md": note,
        "v/Muster/t.md": prose(2),
        "v/Templates/t.md": prose(3),
        "Templates/own.md": f"{prose(4)} [[1]]",
    }
    found, notes = read(planted.write(tmp_path, files))
    assert [writing.text for writing in found] == [f"{prose(4)} [[1]]", f"Saw Bob and Cy there. {prose(1)}"]
    assert {reason: len(where) for reason, where in notes.skipped.items()} == {
        "a template of an Obsidian vault": 2,
        "hidden file": 1,
        "hidden folder": 1,
    }


def test_broken_front_matter_is_counted(tmp_path):
    _, notes = read(planted.write(tmp_path, {"a.md": f"---\ntitle: a: b\n---\n{prose(1)}"}))
    assert notes.skipped == {"front matter that is broken, of which title and date alone are read": ["a.md"]}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("book.epub", b"PK", "an EPUB book; convert it to text (pandoc book.epub -o book.txt)"),
        ("chat.db", b"SQLite format 3\0", "iMessage's database; export the chats as text"),
        ("other.db", b"SQLite format 3\0", "a database; export what it holds as CSV or JSON"),
        ("signal-2024.backup", b"x", "a Signal backup, which is encrypted"),
        ("letter.rtf", b"{\\rtf1}", "an RTF file; save it as DOCX or text"),
        ("letter.txt", b"{\\rtf1 a letter of many a word to a friend}", "an RTF file; save it as DOCX or text"),
        ("letter.odt", b"PK", "an OpenDocument text"),
        ("letter.pages", b"PK", "a Pages document"),
        ("mail.msg", b"\xd0\xcf", "an Outlook message; save it as .eml"),
        ("mail.pst", b"!BDN", "an Outlook mailbox; convert it to mbox"),
        ("mail", b"!BDN", "an Outlook mailbox; convert it to mbox"),
        ("letter.doc", b"\xd0\xcf", "an old Word file"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_its_name(tmp_path, name, content, told):
    found, notes = read(planted.write(tmp_path, {name: content}))
    assert (found, [reason.startswith(told) for reason in notes.skipped]) == ([], [True])


def test_the_kinds_that_are_named_are_read(tmp_path):
    """No kind that is read is among those that are refused by name."""
    for ending in (kind.strip().split(" ")[-1] for kind in KINDS.split(",")):
        planted.write(tmp_path, {f"a{ending}": prose(1)})
    _, notes = read(tmp_path, senders=())
    assert not [reason for reason in notes.skipped if "save it" in reason or "convert it" in reason]


def google(who: str, text: str, topic: str, hour: int) -> dict:
    day = f"Tuesday, January 5, 2021 at {hour}:04:05\u202fPM UTC"
    creator = {"name": who, "email": "x@example.org", "user_type": "Human"}
    return {"creator": creator, "created_date": day, "text": text, "topic_id": topic, "message_id": f"{topic}/{hour}"}


def test_in_google_chat_the_topic_says_what_is_answered(tmp_path):
    said = [("Bob", 1, "t1"), ("Cy", 2, "t2"), ("Ann", 3, "t1"), ("Ann", 4, "t2"), ("Ann", 7, "t3")]
    messages = [google(who, prose(number), topic, number) for who, number, topic in said]
    found, _ = read(planted.write(tmp_path, {"messages.json": {"messages": messages}}), "Ann")
    assert [(writing.query, writing.date) for writing in found] == [
        (prose(1), "2021-01-05T15:04:05"),
        (prose(2), "2021-01-05T16:04:05"),
        ("", "2021-01-05T19:04:05"),
    ]


def test_a_message_that_replies_to_another_has_that_one_as_its_query(tmp_path):
    """Telegram's, Discord's, Slack's and Matrix's ways to say it."""
    telegram = [
        {"id": 1, "from": "Bob", "text": prose(1)},
        {"id": 2, "from": "Cy", "text": prose(2)},
        {"id": 3, "from": "Ann", "text": prose(3), "reply_to_message_id": 1},
    ]
    discord = [
        {"id": "1", "author": {"name": "Bob"}, "content": prose(4)},
        {"id": "2", "author": {"name": "Cy"}, "content": prose(5)},
        {"id": "3", "author": {"name": "Ann"}, "content": prose(6), "type": "Reply", "reference": {"messageId": "1"}},
    ]
    slack = [
        {"type": "message", "user": "Bob", "text": prose(7), "ts": "1.7e9", "thread_ts": "1.7e9"},
        {"type": "message", "user": "Cy", "text": prose(8), "ts": "1.70001e9"},
        {"type": "message", "user": "Ann", "text": prose(9), "ts": "1.70002e9", "thread_ts": "1.7e9"},
    ]
    matrix = [
        {
            "type": "m.room.message",
            "event_id": f"e{n}",
            "sender": who,
            "content": {"msgtype": "m.text", "body": prose(n), **more},
        }
        for n, who, more in [
            (10, "Bob", {}),
            (11, "Cy", {}),
            (12, "Ann", {"m.relates_to": {"m.in_reply_to": {"event_id": "e10"}}}),
        ]
    ]
    files = {"a.json": telegram, "b.json": discord, "c.json": slack, "d.json": matrix}
    found, _ = read(planted.write(tmp_path, files), "Ann")
    assert [(one.query, one.text) for one in found] == [(prose(number), prose(number + 2)) for number in (1, 4, 7, 10)]


def test_messages_in_a_row_that_reply_to_different_ones_are_several_turns(tmp_path):
    said = [("Bob", 1, None), ("Cy", 2, None), ("Ann", 3, 1), ("Ann", 4, None), ("Ann", 5, 2)]
    messages = [{"id": n, "from": who, "text": prose(n), "reply_to_message_id": to} for who, n, to in said]
    found, _ = read(planted.write(tmp_path, {"a.json": {"messages": messages}}), "Ann")
    assert [(one.query, one.text) for one in found] == [(prose(1), f"{prose(3)}\n{prose(4)}"), (prose(2), prose(5))]


def test_a_mail_that_answers_another_has_that_one_as_its_query(tmp_path):
    asked = mail("Bob <bob@example.org>", "Rain", prose(1), 1)
    asked["Message-ID"] = "<1@example.org>"
    answer = mail("ann@example.org", "Re: Rain", f"{prose(2)}\n\n> {prose(3)}", 2)
    answer["In-Reply-To"] = "<1@example.org>"
    absent = mail("ann@example.org", "Re: Snow", f"On Monday Bob wrote:\n> {prose(4)}\n>> {prose(5)}\n\n{prose(6)}", 3)
    forwarded = mail("ann@example.org", "Fwd: Hail", f"{prose(7)}\n> {prose(8)}", 4)
    found, _ = read(
        planted.write(tmp_path, {"a.mbox": mbox(asked, answer, absent, forwarded)}), senders=("ann@example.org",)
    )
    assert [(one.title, one.query) for one in found] == [("Rain", prose(1)), ("Snow", prose(4)), ("Hail", "")]
    assert found[0].text == prose(2)
