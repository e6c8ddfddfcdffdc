"""What `check` finds in rows: each thing that spoils a run, planted; and nothing in rows that are in order."""

import json
from dataclasses import replace

import pytest
from cli_fixtures import figures, recipe, run, toy  # noqa: F401

from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Row
from perce_lite.evaluation.findings import findings

RAIN = "It rained all day long and we stayed at home with the cat, some tea and a good book."
SNOW = "The snow came early this year and the children ran out of the house to build a man of it."
WIND = "A cold wind blew from the sea and took the hat of our old neighbour over the harbour wall."
SUN = "In the morning the sun stood over the hills and the birds sang as if it were spring again."
REGEN = "Es regnete den ganzen Tag und wir blieben mit der Katze, etwas Tee und einem guten Buch zu Hause."
ДОЖДЬ = "Весь день шёл дождь, и мы остались дома с кошкой и хорошей книгой."


def row(number: int, text: str, split: str = "train", user: str = "ann", profile: str = "she sails", **more) -> Row:
    prompt, completion = {"role": "user", "content": "Write."}, {"role": "assistant", "content": text}
    return Row(f"line {number}", user, (Item("", profile),), (prompt,), (completion,), split, **more)


def sound() -> list[Row]:
    return [row(1, RAIN), row(2, SNOW, user="bo"), row(3, WIND, "test"), row(4, SUN, "validation", "bo")]


def found(*rows: Row) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {finding.what: (finding.count, finding.first) for finding in findings([*sound(), *rows])}


def test_nothing_is_found_in_rows_that_are_in_order():
    assert found() == {}


def test_short_responses_count_with_their_queries():
    """Labels such as 'yes' stand in many rows rightly, and in many profiles."""
    labels = [row(number, "yes", split) for number, split in ((5, "train"), (6, "test"))]
    differing = [replace(one, prompt=({"role": "user", "content": f"{one.where}?"},)) for one in labels]
    assert found(*differing) == {}
    assert list(found(*labels)) == ["the text of a held-out row stands in training as well"]
    assert found(row(7, "she", profile="she sails")) == {}


@pytest.mark.parametrize(
    ("rows", "what", "first"),
    [
        ([row(5, RAIN.upper(), "test")], "the text of a held-out row stands in training as well", ("line 5",)),
        ([row(5, RAIN), row(6, f" {RAIN}")], "the same text stands twice in one split", ("line 5", "line 6")),
        ([row(5, f"Yes. {RAIN}", profile=f"She: Yes.\n{RAIN} Bye")], "the profile contains the answer", ("line 5",)),
        ([row(5, f"Yes. {RAIN}", user="all")], "rows without a user's name", ("line 5",)),
        ([row(5, REGEN)], "texts in another language or script (de 1) than most (en, Latin)", ("line 5",)),
        ([row(5, ДОЖДЬ)], "texts in another language or script (Cyrillic 1) than most (en, Latin)", ("line 5",)),
        ([row(5, "The key is AKIAABCDEFGHIJKLMNOP, keep it")], "a secret: what looks like an AWS key", ("line 5",)),
        ([row(5, f"Yes. {RAIN}", profile="hf_" + "ab" * 17)], "a secret: what looks like a Hugging Face token", ("line 5",)),  # noqa: E501
        ([row(5, "-----BEGIN OPENSSH PRIVATE KEY-----\nabc")], "a secret: what looks like a private key", ("line 5",)),
    ],
)  # fmt: skip
def test_what_spoils_a_run_is_named_with_count_and_rows(rows, what, first):
    assert found(*rows) == {what: (len(first), first)}


def test_nothing_held_out_and_one_user():
    told = {one.what: one.count for one in findings([row(1, RAIN), row(2, SNOW)])}
    assert told == {"nothing is held out, so that nothing is measured": 2, "one user only (ann)": 2}
    nameless = [row(1, RAIN, user="all"), row(2, SNOW, "test", user="all")]
    assert [one.what for one in findings(nameless)] == ["rows without a user's name", "one user only (all)"]


def test_texts_without_letters_have_no_language():
    assert findings([row(1, "1 2 3 4 5 6"), row(2, "7 8 9 10 11 12", "test", "bo")]) == []


def test_check_shows_what_it_finds_and_no_secret(run, figures, recipe):  # noqa: F811
    key = "ghp_" + "a1" * 18
    texts = [RAIN, SNOW, WIND, SUN, f"My token is {key}, tell nobody of it", RAIN]
    rows = [
        {"user": f"u{n % 2}", "profile": "she sails", "prompt": f"Write {n}.", "completion": text, "split": split}
        for n, (text, split) in enumerate(zip(texts, ["train"] * 5 + ["test"], strict=True))
    ]
    path = recipe(rows)
    told = figures("check", path)
    assert [(one["what"], one["count"], one["first"]) for one in told["findings"]] == [
        ("the text of a held-out row stands in training as well", 1, ["rows.jsonl, line 6"]),
        ("a secret: what looks like a GitHub token", 1, ["rows.jsonl, line 5"]),
    ]
    assert key not in json.dumps(told["findings"])
    out = run("check", path)[1]
    assert "What may spoil a run" in out
    sound = [*rows[:4], {**rows[4], "completion": "None of it is a key at all", "split": "test"}]
    assert "Nothing was found that spoils a run." in run("check", recipe(sound))[1]
