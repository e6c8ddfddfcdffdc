"""`perce-lite import --mask`: what is masked, what is not, and that nothing leaks where a text is cut."""

import json
from pathlib import Path

import pytest
import writing_fixtures as planted
from cli_fixtures import figures, run  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_fixtures import mail, mbox, prose

from perce_lite.data.importers.masking import KINDS, Mask, masked_in, placeholder

IBAN, CARD = "DE89 3704 0044 0532 0130 00", "4111 1111 1111 1111"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to ann.bell+x@mail.example.org.", "Write to [mail]."),
        ("See https://example.org/a?b=c, or www.example.org/x.", "See [link], or [link]."),
        ("It is " + IBAN + " OK", "It is [iban] OK"),
        ("It is GB82WEST12345698765432.", "It is [iban]."),
        ("A wrong one: DE88 3704 0044 0532 0130 00X", "A wrong one: DE88 3704 0044 0532 0130 00X"),
        ("Card " + CARD + " thanks", "Card [card] thanks"),
        ("Card 4111-1111-1111-1112 no", "Card 4111-1111-1111-1112 no"),
        ("Call +49 30 901820, please", "Call [phone], please"),
        ("Call 030 / 90 18 20 or (202) 456-1111.", "Call [phone] or [phone]."),
        ("We live in Hauptstraße 12a, Berlin.", "We live in Hauptstraße [street number], Berlin."),
        ("At 221b Baker Street it rains.", "At [street number] Baker Street it rains."),
        ("Au 12 bis, rue de la Paix.", "Au [street number], rue de la Paix."),
        ("En la Calle Mayor, 12 llueve.", "En la Calle Mayor, [street number] llueve."),
        ("Key sk-proj-abcdefghijklmnopqrstuv12 here", "Key [secret] here"),
        ("In 2024 it rained on 31 days, 12.5 mm.", "In 2024 it rained on 31 days, 12.5 mm."),
        ("On 2024-05-31 10:15:00 we left at 7 in the street.", "On 2024-05-31 10:15:00 we left at 7 in the street."),
        ("Bob and bob's Robert met BOB BELL.", "[name] and [name]'s Robert met [name]."),
    ],
)  # fmt: skip
def test_what_is_masked_and_what_is_not(text, masked):
    assert Mask(["Bob", "Bob Bell"])(text) == masked


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab @.:/0123+-DE89 []\nhttps"), max_size=60))
def test_masking_twice_changes_nothing_more(text):
    mask = Mask(["ab"])
    once = mask(mask(text))
    assert mask(once) == once


def test_counts_are_of_what_stands_in_the_texts():
    assert masked_in(["[mail] and [mail]", "[street number]", "no"]) == {"mail": 2, "street number": 1}
    assert len({placeholder(kind) for kind in KINDS}) == len(KINDS)


def test_import_masks_rows_queries_titles_and_sources(figures, run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("# friends\nBob\n\nCy Dee\n", encoding="utf-8")
    ask = f"{prose(1)} My account is {IBAN}."
    chat = [("Bob", ask), ("Cy Dee", prose(2)), ("Ann", f"{prose(3)} Ask bob@example.org")]
    messages = [{"id": number, "from": who, "text": text} for number, (who, text) in enumerate(chat)]
    answer = mail("ann@example.org", "Re: Call 030 / 901820", f"{prose(5)}\n\n> {CARD} it was, {prose(6)}", 2)
    note = f"Call +49 30 901820 now, Bob. {prose(4)}"
    files = {"Bob.json": {"messages": messages}, "m.mbox": mbox(answer), "a.txt": note, "b.txt": prose(7)}
    planted.write(Path("in"), files)
    words = ["import", "in", "--user", "ann", "--me", "ann", "--from", "ann@example.org", "--mask"]
    told = figures(*words, "--mask-names", "names.txt", "--yes")
    written = Path("texts.jsonl").read_text("utf-8")
    for secret in ("Bob", "bob@", "Cy Dee", "3704", "4111", "901820"):
        assert secret not in written
    rows = {row["source"]: row for row in map(json.loads, written.splitlines())}
    assert sorted(rows) == ["[name].json, turn 3", "a.txt", "b.txt", "m.mbox, mail 1"]
    assert rows["[name].json, turn 3"]["query"] == f"[name]: {prose(1)} My account is [iban].\n[name]: {prose(2)}"
    assert rows["a.txt"]["query"] == "Write a text that begins: Call [phone] now, [name]. Entry4 kettle ..."
    assert rows["m.mbox, mail 1"]["title"] == "Call [phone]"
    assert told["masked"] == {"mail": 1, "iban": 1, "card": 1, "phone": 3, "name": 5}
    assert "bob@example.org" not in json.dumps(told)
    out = run(*words, "--mask-names", "names.txt", "--force")[1]
    assert ["[iban]", "│", "1"] in [line.split()[1:4] for line in out.splitlines()]
    assert IBAN in out, "a sample of what is masked, before anything is written"


def test_what_was_masked_is_known_again(figures, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    planted.write(Path("in"), {"a.txt": f"{prose(1)} a@example.org", "b.txt": prose(2)})
    words = ["import", "in", "--user", "ann", "--mask", "--yes"]
    assert (figures(*words)["new"], figures(*words, "--append")["new"]) == (2, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mask-names", "names.txt"], "go with --mask"),
        (["--mask", "--mask-names", "none.txt"], "--mask-names none.txt: cannot be read"),
        (["--mask", "--mask-names", "empty.txt"], "holds no name; write one a line"),
        (["--mask", "--mask-region", "Berlin"], "--mask-region BERLIN: not a country's two letters"),
    ],
)
def test_wrong_options(run, tmp_path, monkeypatch, words, told):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    planted.write(Path("in"), {"a.txt": prose(1), "b.txt": prose(2)})
    Path("empty.txt").write_text("# none\n")
    code, _, err = run("import", "in", "--user", "ann", "--yes", *words)
    assert (code, " ".join(told.split()) in " ".join(err.replace("│", " ").split())) == (2, True)
