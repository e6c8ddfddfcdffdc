"""Tables, Markdown, encodings, dates and the cutting of long texts."""

import json
from datetime import date, datetime

import pytest
import writing_fixtures as planted
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_fixtures import prose, read

from perce_lite.data.importers.archives import files_of
from perce_lite.data.importers.charsets import decoded
from perce_lite.data.importers.reading import Reader
from perce_lite.data.importers.texts import from_markdown, from_records, table
from perce_lite.data.importers.writings import Notes, count_words, date_of, first_words, last_words, pieces, tidy


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
        ("---\nno: [yaml\n---\nIt rains.", "", "2023-01-02", "It rains."),
        ("---\ntitle: Rain: x\ndate: 2024-05-31\n\ttags: [\n---\nIt rains.", "Rain: x", "2024-05-31", "It rains."),
        ("---\ntitle: Rain\ntags:\n- a\n\nIt rains.", "Rain", "2023-01-02", "It rains."),
        ("---\nIt rains.\n---\nMore.", "", "2023-01-02", "---\nIt rains.\n---\nMore."),
        ("+++\ntitle = 'Rain'\ndate = 2024-05-31T10:15:00Z\n+++\nYes.", "Rain", "2024-05-31T10:15:00", "Yes."),
        ("+++\ntitle = Rain\ndate = 2024-05-31\n+++\nIt rains.", "Rain", "2024-05-31", "It rains."),
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
