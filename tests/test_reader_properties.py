"""Whatever lies in the files: an import, a reader of rows and a page end well or in one clear error of ours.

A thousand inputs by default; PERCE_LITE_EXAMPLES=1000000 tries as many. `python tests/test_reader_properties.py`
counts them.
"""

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perce_lite.cli.views.page import write_figures
from perce_lite.cli.views.sections import Section
from perce_lite.console import no_bars
from perce_lite.data.chat_template import Chat
from perce_lite.data.importers.importing import Wanted, look
from perce_lite.data.readers import plain_rows
from perce_lite.data.rows import from_columns
from perce_lite.errors import DataError, PerceLiteError
from perce_lite.recipe import Template

EXAMPLES = int(os.environ.get("PERCE_LITE_EXAMPLES", "1000"))
KINDS = ("txt", "md", "csv", "tsv", "json", "jsonl", "mbox", "eml", "html", "")
every = settings(
    max_examples=max(1, EXAMPLES // (len(KINDS) + 4)),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

words = st.sampled_from(
    "one day ann wrote to bo that the garden 抹茶 naïve, 12 eggs; are: here. \ud83e ﷽ \u202e".split()
)
sentences = st.lists(words, min_size=1, max_size=12).map(" ".join)
heads = st.sampled_from(
    [
        "From ann@example.org Thu Jan  4 10:00:00 2024",
        "From: Ann <ann@example.org>",
        "From: =?utf-8?q?Ann?= <ann@example.org",
        "Date: Thu, 4 Jan 2024 10:00:00 +0000",
        "Date: 99 Foo 0000",
        "Subject: =?utf-8?b?4p??=",
        "Subject: Re: the garden",
        "Content-Type: text/plain; charset=klingon",
        "Content-Type: text/html; charset=iso-8859-8-i",
        "Content-Type: multipart/mixed; boundary=x",
        "Content-Type: multipart/mixed",
        "Content-Type: message/rfc822",
        "Content-Transfer-Encoding: base64",
        "Content-Transfer-Encoding: quoted-printable",
        "--x",
        "--x--",
        ">From here",
        "> quoted",
        "On Thu, 4 Jan 2024, Bo wrote:",
        "-----Original Message-----",
        "-- ",
        "",
    ]
)
chat_lines = st.sampled_from(
    [
        "[04.01.24, 10:00:00] Ann: ",
        "1/4/24, 10:00 AM - Bo: ",
        "2024-01-04 10:00 Ann: ",
        "[٤/١/٢٤، ١٠:٠٠] Ann: ",
        "04.01.2024, 25:61 - Bo: ",
        "\u200e[04.01.24, 10:00:00] Ann: \u200e",
        "Ann, [04.01.24 10:00]\n",
        "Ann: ",
        "# ",
        "## Title\n",
        "---\ntitle: x\n",
        "```\n",
        "<p onclick='x'>",
        "</div>",
        "<script>",
        "&#x110000;",
        "user,text,date\n",
        'ann,"',
        "text\tauthor\n",
        ";",
        '"',
        "\x00",
        "\r",
        "\u2028",
        "\ufeff",
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | sentences | st.text(max_size=12)
names = st.sampled_from(
    "user author from sender text content body message messages conversations mapping role parts date timestamp ts "
    "create_time id type title query prompt completion profile instruction input output chats list name sender_name "
    "data post tweet full_text".split()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=12
)


def soup(parts) -> st.SearchStrategy[bytes]:
    """Pieces of a kind one after another, in some encoding, maybe cut."""
    text = st.lists(st.tuples(parts, sentences), max_size=14).map(lambda drawn: "\n".join(map("".join, drawn)))
    encodings = st.sampled_from(["utf-8", "utf-16", "latin-1", "cp1251", "shift_jis", "utf-8-sig"])
    whole = st.tuples(text, encodings).map(lambda drawn: drawn[0].encode(drawn[1], "replace"))
    return st.tuples(whole, st.integers(0, 400)).map(lambda drawn: drawn[0][: drawn[1]] if drawn[1] < 300 else drawn[0])


def contents(kind: str) -> st.SearchStrategy[bytes]:
    if kind in ("json", "jsonl"):
        several = st.lists(values, max_size=6)
        dumped = (
            several.map(json.dumps) if kind == "json" else several.map(lambda all_: "\n".join(map(json.dumps, all_)))
        )
        one = values.map(json.dumps)
        return st.one_of(dumped.map(str.encode), one.map(str.encode), soup(chat_lines), st.binary(max_size=60))
    if kind in ("mbox", "eml"):
        return st.one_of(soup(heads.map(lambda head: f"{head}\n")), soup(heads), st.binary(max_size=60))
    return st.one_of(
        soup(chat_lines),
        soup(heads),
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    )


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` gives, or the one kind of error that it may raise."""
    try:
        return work()
    except PerceLiteError as error:
        return error


def imported(path: Path, kind: str) -> None:
    """Reads it as `perce-lite import` does; what comes out can be written, and every text is somebody's."""
    wanted = Wanted("ann", me=("ann",) if kind == "me" else (), min_words=2)
    with no_bars():
        found = outcome(lambda: look(path, wanted, path.parent / "out.jsonl"))
    if isinstance(found, DataError):
        assert str(found).strip()
        return
    assert found.new
    for record in found.new:
        assert record["user"] == "ann"
        assert record["text"].strip()
        assert record["query"].strip()
    found.write()
    assert [json.loads(line) for line in found.out.read_text("utf-8").split("\n") if line] == found.records
    assert found.figures()["new"] == len(found.new)


@pytest.mark.parametrize("kind", KINDS)
def test_any_file_is_imported_or_refused(kind):
    @every
    @given(st.lists(contents(kind), min_size=1, max_size=2), st.sampled_from(["me", "", "zip"]))
    def holds(files, way):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "in"
            path.mkdir()
            for number, content in enumerate(files):
                (path / f"file{number}{'.' if kind else ''}{kind}").write_bytes(content)
            if way == "zip":
                packed = io.BytesIO()
                with zipfile.ZipFile(packed, "w") as archive:
                    for file in path.iterdir():
                        archive.writestr(file.name, file.read_bytes())
                path = Path(folder) / "in.zip"
                path.write_bytes(packed.getvalue()[: -1 if len(files) > 1 and len(files[0]) % 5 == 0 else None])
            imported(path, way)

    holds()


@every
@given(st.lists(values, max_size=5), st.sampled_from(["json", "jsonl", "parquet"]), st.binary(max_size=40))
def test_any_file_of_rows_is_read_or_refused(records, ending, raw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{ending}"
        text = json.dumps(records) if ending == "json" else "\n".join(map(json.dumps, records))
        path.write_bytes(raw if ending == "parquet" or len(raw) > 35 else text.encode())
        rows = outcome(lambda: plain_rows(path))
        if isinstance(rows, DataError):
            assert path.name in str(rows)
            return
        assert all(row.prompt for row in rows)


@every
@given(st.dictionaries(names, values, max_size=6))
def test_any_record_is_a_row_or_refused(record):
    row = outcome(lambda: from_columns(record, "row 7"))
    if isinstance(row, DataError):
        assert "row 7" in str(row)
        return
    assert row.prompt  # a dialogue without a response is dropped later, and counted


TOKENIZERS = {family: toys.toy_tokenizer(family) for family in toys.TEMPLATES}
ROLES = ("system", "user", "assistant", "tool", "")


@every
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(st.tuples(st.sampled_from(ROLES), sentences | st.text(max_size=20)), min_size=1, max_size=5),
    st.text(max_size=30),
)
def test_any_messages_are_rendered_or_refused(family, turns, profile):
    chat = Chat(TOKENIZERS[family], Template())
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = outcome(lambda: chat.prompt_ids(messages, profile))
    if isinstance(ids, PerceLiteError):
        assert str(ids).strip()
        return
    assert all(isinstance(token, int) for token in ids)


dangerous = st.text(max_size=30) | st.sampled_from(
    ["<script>x()</script>", "</td>", "{{ 7 * 7 }}", "{% raw %}", "&", "'\""]
)


@every
@given(dangerous, st.lists(dangerous, min_size=2, max_size=4), dangerous)
def test_no_text_breaks_out_of_a_page(title, cells, answer):
    told = {"row": answer, "query": answer, "user": answer, "written": answer, "arm": "a", "profile": "own"}
    told |= {"sampled": False, "personal": 0.0, "text": answer}
    section = Section(title, title, tuple(f"head {n}" for n in range(len(cells))), [tuple(cells)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        write_figures(title, title, cells, [section], path, [told])
        page = path.read_text("utf-8")
    assert "<script>x()" not in page
    assert ("{{ 7 * 7 }}" in page) == any("{{ 7 * 7 }}" in text for text in (title, answer, *cells))


if __name__ == "__main__":
    import sys
    import time

    started, count = time.time(), 0
    for kind_ in KINDS:
        test_any_file_is_imported_or_refused(kind_)
    for test in (
        test_any_file_of_rows_is_read_or_refused,
        test_any_record_is_a_row_or_refused,
        test_any_messages_are_rendered_or_refused,
        test_no_text_breaks_out_of_a_page,
    ):
        test()
    inputs = (len(KINDS) + 4) * max(1, EXAMPLES // (len(KINDS) + 4))
    sys.stdout.write(f"{inputs} inputs in {time.time() - started:.0f} s\n")
