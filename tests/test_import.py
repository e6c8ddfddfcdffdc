"""`perce-lite import`: planted writing of every kind becomes rows that check and train take."""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import writing_fixtures as planted
from cli_fixtures import figures, recipe, run, toy  # noqa: F401
from writing_fixtures import mail, mbox, prose

from perce_lite.cli import importing as cli_import
from perce_lite.data.importers import importing
from perce_lite.data.importers.writings import Notes, count_words

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Writes planted files to in/, a__txt as a.txt; everything happens in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    return lambda **named: planted.write(Path("in"), {name.replace("__", "."): one for name, one in named.items()})


@pytest.fixture
def imported(run, put):  # noqa: F811
    """Imports planted files as ann's; gives the rows that were written."""

    def call(*words: str, **named) -> list[dict]:
        code, _, err = run("import", put(**named), "--user", "ann", "--yes", "--force", *words)
        assert code == 0, err
        return rows()

    return call


@pytest.fixture
def refused(run, put):  # noqa: F811
    """Imports planted files, which must fail with one clear line; gives it."""

    def call(*words: str, path: str = "in", **named) -> str:
        put(**named)
        code, _, err = run("import", path, "--user", "ann", "--yes", *words)
        assert (code, "Traceback" in err, Path("texts.jsonl").exists()) == (2, False, False)
        return err

    return call


def rows(path: str = "texts.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def notes(count: int) -> dict[str, str]:
    return {f"note{number}__txt": prose(number) for number in range(count)}


def test_texts_in_the_order_of_their_names(imported):
    found = imported(a10__txt=prose(1), a9__txt=prose(2))
    assert [(row["text"], row["idx"], row["source"]) for row in found] == [
        (prose(2), 0, "a9.txt"),
        (prose(1), 1, "a10.txt"),
    ]
    assert found[0]["query"] == f"Write a text that begins: {' '.join(prose(2).split()[:6])} ..."
    assert [sorted(row) for row in found] == [["idx", "query", "source", "text", "user"]] * 2


def test_every_kind_at_once_oldest_first(imported):
    found = imported(
        "--from", "ANN@example.org", "--me", "ann",
        plain__txt=prose(30),
        post__md=f"---\ntitle: Day\ndate: 2024-02-01\n---\n{prose(40)}",
        all__csv=f"title,body,date\nOne,{prose(51)},2024-03-01\nTwo,{prose(52)},2024-01-01\n",
        mails__mbox=mbox(mail("Ann <Ann@Example.org>", "Re: Rain", prose(60), day=9)),
        chat__json=planted.telegram(first=70),
    )  # fmt: skip
    assert [(row.get("date"), row["text"], row["query"]) for row in found] == [
        (None, prose(30), f"Write a text that begins: {' '.join(prose(30).split()[:6])} ..."),
        ("2024-01-01", prose(52), 'Write a text with the title "Two".'),
        ("2024-02-01", prose(40), 'Write a text with the title "Day".'),
        ("2024-03-01", prose(51), 'Write a text with the title "One".'),
        ("2024-05-01T11:00:00", prose(71), f"{prose(70)} Indeed."),
        ("2024-05-01T13:00:00", f"{prose(73)} Indeed.", prose(72)),
        ("2024-05-01T15:00:00", prose(75), prose(74)),
        ("2024-05-01T17:00:00", prose(77), f"{prose(76)} Indeed."),
        ("2024-05-09T10:15:00", prose(60), 'Write a mail with the subject "Rain".'),
    ]


def test_what_is_left_out_is_named_with_its_reason(figures, put):  # noqa: F811
    plain = dict(ok__txt=prose(1), ok2__txt=prose(2), same__txt=prose(1).upper().replace(" ", "\n"))
    odd = dict(short__txt="Too short.", empty__txt="", data__txt=b"a\0b" * 9, book__docx=b"PK", _DS_Store="x")
    put(**plain, **odd)
    Path("in/.hidden.txt").write_text(prose(9))
    told = figures("import", "in", "--user", "ann", "--yes")
    assert {reason: one["count"] for reason, one in told["skipped"].items()} == {
        "a duplicate": 1,
        "fewer than 5 words": 2,
        "binary, or text in an encoding that is not known": 1,
        "a DOCX that cannot be read": 1,
        "not a kind that is read: no ending": 1,
        "hidden file": 1,
    }
    assert told["skipped"]["a duplicate"]["such_as"] == "same.txt"
    assert (told["read"], told["new"], told["written"], told["users"]) == ({"texts": 5}, 2, True, {"ann": 2})


def test_long_texts_are_cut_at_paragraphs(imported):
    paragraphs = [prose(number, 30) for number in range(5)]
    found = imported("--max-words", "70", long__md="# Diary\n\n" + "\r\n\r\n".join(paragraphs))
    assert [row["text"] for row in found] == ["\n\n".join(paragraphs[part : part + 2]) for part in (0, 2, 4)]
    assert [row["query"] for row in found][1:] == [
        f'Write part {part} of a text with the title "Diary".' for part in (2, 3)
    ]
    assert found[2]["source"] == "long.md, part 3 of 3"


def test_a_paragraph_that_is_too_long_is_cut_at_sentences_then_words(imported):
    sentences = [prose(number, 15) for number in range(4)]
    endless = " ".join(planted.WORDS * 10)
    found = imported("--max-words", "40", a__txt=" ".join(sentences), b__txt=endless)
    assert [row["text"] for row in found[:2]] == [" ".join(sentences[:2]), " ".join(sentences[2:])]
    assert " ".join(row["text"] for row in found[2:]) == endless
    assert max(count_words(row["text"]) for row in found) == 40


def test_a_heading_does_not_stand_alone(imported):
    text = f"Part one\n\n{prose(1, 30)}\n\nThe end."
    assert [row["text"] for row in imported("--max-words", "30", a__txt=text, b__txt=prose(2))] == [text, prose(2)]


def test_a_last_sentence_stays_in_its_paragraph(imported):
    text = f"{prose(1, 25)} {prose(2, 25)} That was it."
    assert [row["text"] for row in imported("--max-words", "50", a__txt=text, b__txt=prose(2))] == [text, prose(2)]


def test_a_look_writes_nothing(run, put):  # noqa: F811
    code, out, err = run("import", put(**notes(5)), "--user", "ann")
    assert (code, Path("texts.jsonl").exists()) == (0, False)
    assert all(prose(number)[:30] in out for number in range(3))
    assert "... and 2 more." in out
    assert "Nothing was written: this was a look" in err
    assert "5 texts of ann are few" in err


@pytest.mark.parametrize(("answer", "written"), [("y", True), ("n", False)])
def test_on_a_terminal_it_asks(run, put, monkeypatch, answer, written):  # noqa: F811
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli_import.typer, "confirm", lambda text, err: asked.append(text) or answer == "y")
    assert run("import", put(**notes(3)), "--user", "ann")[0] == 0
    assert asked == ["Write 3 rows to texts.jsonl?"]
    assert Path("texts.jsonl").exists() is written


def test_a_file_that_is_there_is_added_to_or_replaced_by_word_alone(run, imported):  # noqa: F811
    imported(**notes(3))
    before = Path("texts.jsonl").read_bytes()
    code, _, err = run("import", "in", "--user", "ann", "--yes")
    assert (code, Path("texts.jsonl").read_bytes()) == (2, before)
    assert "Add to it with --append, or replace it with --force" in err
    assert run("import", "in", "--user", "ann", "--yes", "--append", "--force")[0] == 2
    assert run("import", "in", "--user", "bo", "--yes", "--append")[0] == 0
    assert [(row["user"], row["idx"]) for row in rows()] == [(user, idx) for user in ("ann", "bo") for idx in range(3)]


def test_more_of_the_same_user_takes_its_place_in_time(run, imported, put):  # noqa: F811
    posts = {number: f"---\ndate: 2024-0{number}-01\n---\n{prose(number)}" for number in range(1, 6)}
    imported(b__md=posts[2], d__md=posts[4])
    put(a__md=posts[1], c__md=posts[3])
    code, out, _ = run("import", "in", "--user", "ann", "--yes", "--append")
    assert (code, "left out: in texts.jsonl" in out) == (0, True)
    assert [(row["idx"], row["date"]) for row in rows()] == [(n, f"2024-0{n + 1}-01") for n in range(4)]
    code, _, err = run("import", "in", "--user", "ann", "--yes", "--append")
    assert (code, "Nothing is new" in err, len(rows())) == (0, True, 4)


def test_what_was_written_is_not_read_again(run, imported):  # noqa: F811
    imported(**notes(3))
    Path("in/texts.jsonl").write_bytes(Path("texts.jsonl").read_bytes())
    code, out, _ = run("import", "in", "--user", "ann", "--yes", "--append", "--out", "in/texts.jsonl")
    assert (code, "tables" in out, len(rows("in/texts.jsonl"))) == (0, False, 3)


def test_what_is_read_is_never_written_over(run, imported):  # noqa: F811
    imported(**notes(3))
    before = Path("texts.jsonl").read_bytes()
    for word in ("--force", "--append"):
        code, _, err = run("import", "texts.jsonl", "--user", "bo", "--yes", word)
        assert (code, Path("texts.jsonl").read_bytes()) == (2, before)
        assert "is what is read, and would be lost" in err


def test_what_no_file_can_hold_is_taken_out_of_titles_and_names(imported):
    chat = [{"from": name, "text": prose(number)} for number, name in enumerate(["Bo\ud83d", "C\x1b[2J", "Ann"] * 2)]
    post = f'---\ntitle: "Rain\\x1b[2J"\n---\n{prose(9)}'
    found = imported("--me", "ann", chat__json={"messages": chat}, a__md=post)
    assert {one["query"].partition(":")[0] for one in found} == {"Bo?", 'Write a text with the title "Rain[2J".'}
    assert "C[2J: " in found[1]["query"]


def test_only_documents_are_added_to(run, put):  # noqa: F811
    other = '{"user": "ann", "prompt": "x", "completion": "y"}\n'
    put(**notes(2))
    Path("texts.jsonl").write_text(other)
    code, _, err = run("import", "in", "--user", "ann", "--yes", "--append")
    assert (code, Path("texts.jsonl").read_text()) == (2, other)
    assert "texts.jsonl, line 1: not a document" in err


def test_nothing_to_import(refused, tmp_path):
    assert "there is no such file or folder" in refused(path="nowhere")
    assert "there are no files in it" in refused()
    told = refused(book__docx=b"PK", short__txt="Hi.")
    assert "no writing was found in it. What is read: .txt, .md" in told
    assert "fewer than 5 words (1, such as short.txt)" in told
    assert "end the name with .jsonl" in refused("--out", "texts.csv")
    assert "a name that is not empty" in refused("--user", " ")


def test_one_text_is_written_to_be_added_to_and_said_to_be_too_few(run, put):  # noqa: F811
    code, _, err = run("import", put(one__txt=prose(1)), "--user", "ann", "--yes")
    assert (code, len(rows())) == (0, 1)
    assert "it takes two or more to train" in err
    assert "--append" in err


def test_who_wrote_it_must_be_known(refused):
    told = refused(a__mbox=mbox(mail("Ann <a@x.org>", "S", prose(1)), mail("b@x.org", "S", prose(2))))
    assert "senders, with their mails: a@x.org (1), b@x.org (1)" in told
    assert "--from c@x.org: wrote none of these mails" in refused("--from", "c@x.org")
    Path("in/a.mbox").unlink()
    assert "in them, with their messages: Bob (4), Ann (4)" in refused(c__json=planted.telegram())
    assert "--me Zoe: wrote nothing in these chats" in refused("--me", "Zoe")
    Path("in/c.json").unlink()
    assert "in them, with their messages: nobody" in refused("--me", "Ann", **notes(3)), "no chat was found to be one"
    assert "senders, with their mails: none" in refused("--from", "a@x.org")


def test_mails_of_one_sender_are_the_users_only_where_the_name_says_so(refused, run):  # noqa: F811
    told = refused(a__mbox=mbox(mail("Bob <b@x.org>", "S", prose(1)), mail("b@x.org", "S", prose(2))))
    assert "these mails are all from b@x.org, and it is not clear that this is ann" in told
    assert run("import", "in", "--user", "ann", "--from", "b@x.org", "--yes")[0] == 0


def test_a_table_without_texts_names_its_columns(refused):
    told = refused(path="in/a.csv", a__csv="id,price\n1,20\n2,30\n")
    assert "its columns are id, price; none of them looks like texts. Say which it is with --text-column" in told
    assert "--text-column body is none of them" in refused("--text-column", "body", path="in/a.csv")


@pytest.mark.parametrize(("months", "told"), [(range(1, 10), False), ([1] * 9, True), ([1] * 3 + [2] * 6, True)])
def test_the_next_command_leaves_texts_a_profile(months, told):
    """The recipe takes texts of earlier months: where that would leave many without a profile, the command says so."""
    records = [{"user": "ann", "text": "x", "date": f"2024-{month:02d}-05"} for month in months]
    found = importing.Imported(Path("a b.jsonl"), "ann", records, records, Notes())
    assert ["profile.earlier_by=document" in command for command in found.commands()] == [told, told, False]
    undated = importing.Imported(Path("a.jsonl"), "ann", records, [*records, {"user": "bo", "text": "y"}], Notes())
    assert "profile.earlier_by=document" in undated.commands()[0]


def test_the_commands_that_it_prints_lead_to_a_chat(run, figures, imported, toy, monkeypatch):  # noqa: F811
    """From a folder of mails and notes to a chat with an adapter, with the very commands that are printed."""
    mails = [mail("ann@example.org", f"Day {number}", prose(number), number) for number in range(1, 13)]
    imported(mails__mbox=mbox(*mails), **{name: f"{text} #1: yes" for name, text in notes(8).items()})
    target = "odd: name #1.jsonl"  # what YAML would read as something else
    out = run("import", "in", "--user", "ann", "--yes", "--out", target)[1]
    commands = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("perce-lite ")]
    assert [command[0] for command in commands] == ["check", "train", "chat"]
    tiny = ["--set", f"model={toy}", "--set", "device=cpu", "--set", "dtype=float32", "--set", "quantization=none"]
    short = ["--set", "train.max_steps=1", "--set", "evaluation.max_new_tokens=2"]
    (tmp := Path("recipes")).mkdir()
    (tmp / "documents.yaml").write_text((ROOT / "recipes/documents.yaml").read_text())
    splits = figures(*commands[0], *tiny)["splits"]
    assert {name: split["kept"] for name, split in splits.items()} == {
        "train": 15,
        "validation": 2,
        "test": 2,
        "unseen": 0,
    }, "all of 20, less the first, which has no profile"
    trained = figures(*commands[1], *tiny, *short)
    assert trained["losses"]
    assert Path(trained["adapter"]) == Path("runs/odd: name #1/adapter")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
    code, _, err = run(*commands[2], "--max-new-tokens", "3")
    assert code == 0, err


def test_a_long_note_does_not_swamp_the_rest(imported, figures):  # noqa: F811
    """At most ten parts of it are taken, from all of it, and the others are counted."""
    long = "\n\n".join(prose(number, 60) for number in range(30))
    found = imported(long__txt=long, **notes(3))
    parts = [row for row in found if "part" in row["source"]]
    assert (len(found), len(parts), len({row["part_of"] for row in parts})) == (13, 10, 1)
    assert [row["source"] for row in parts][::9] == ["long.txt, part 1 of 30", "long.txt, part 28 of 30"]
    told = figures("import", "in", "--user", "ann", "--yes", "--force", "--max-parts", "28")
    assert told["skipped"]["more than 28 parts of one text; --max-parts takes more"]["count"] == 2


def test_parts_of_one_text_alone_are_too_few(run, put):  # noqa: F811
    code, _, err = run("import", put(long__txt="\n\n".join(prose(n, 60) for n in range(3))), "--user", "ann")
    assert (code, "one text of ann (in 3 parts, none of which stands in the profile of another)" in err) == (0, True)
