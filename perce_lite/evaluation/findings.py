"""What spoils a run and stands in the rows before any training; each with a count, the first rows and what mends it."""

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from perce_lite.data.rows import Row, content_of, items_of, written
from perce_lite.data.secrets import secrets_in

FIRST = 3
"""Rows that a finding names."""

_FEWEST_WORDS = 5
"""Words of a response that is looked for elsewhere: a label or a number stands in many rows rightly."""

_WORDS_OF_A_LANGUAGE, _LETTERS, _SURE = 12, 1000, 0.95
"""Words that a text needs for its language to be told, letters of it that are looked at, the least probability."""


@dataclass(frozen=True)
class Finding:
    """What was found. count: rows that it concerns, all where it concerns the whole; first: the first of these."""

    what: str
    count: int
    first: tuple[str, ...]
    mend: str

    def figures(self) -> dict[str, Any]:
        return asdict(self)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """All that spoils a run of `rows`, which have their splits; the gravest first."""
    seekers = (
        _across_splits, _profiles_with_the_answer, _nothing_held_out, _nameless, _one_user, _twice, _other_languages,
        _secrets,
    )  # fmt: skip
    return [finding for seek in seekers for finding in seek(rows)]


def _finding(what: str, rows: Sequence[Row], mend: str) -> Iterator[Finding]:
    if rows:
        yield Finding(what, len(rows), tuple(row.where for row in rows[:FIRST]), mend)


def _plain(text: str) -> str:
    """Words in small letters: two texts that differ in spaces and capitals alone are one."""
    return " ".join(text.casefold().split())


def _is_text(plain: str) -> bool:
    return plain.count(" ") >= _FEWEST_WORDS - 1 or len(plain) >= 40


def _content(row: Row) -> str:
    """What makes two rows one: the response, with its query where it is too short to stand for a text."""
    response = _plain(" ".join(written(row)))
    return response if _is_text(response) else f"{_plain(row.query)}\n{response}"


def _across_splits(rows: Sequence[Row]) -> Iterator[Finding]:
    trained = {_content(row) for row in rows if row.split == "train"}
    yield from _finding(
        "the text of a held-out row stands in training as well",
        [row for row in rows if row.split != "train" and _content(row) in trained],
        "the figures on it praise learning by heart: take one of the two out",
    )


def _twice(rows: Sequence[Row]) -> Iterator[Finding]:
    seen: dict[str | None, set[str]] = defaultdict(set)
    again = []
    for row in rows:
        content = _content(row)
        if content in seen[row.split]:
            again.append(row)
        seen[row.split].add(content)
    yield from _finding(
        "the same text stands twice in one split", again, "it counts twice: take the copies out, unless that is meant"
    )


def _profiles_with_the_answer(rows: Sequence[Row]) -> Iterator[Finding]:
    def gives_it_away(row: Row) -> bool:
        answers = [plain for text in written(row) if _is_text(plain := _plain(text))]
        if not answers or not row.profile:
            return False
        items = [_plain(item.text) for item in items_of(row.profile)]
        return any(answer in item for answer in answers for item in items)

    yield from _finding(
        "the profile contains the answer",
        [row for row in rows if gives_it_away(row)],
        "the model learns to copy it: take it out of the profile; of documents, take the copies out",
    )


def _nothing_held_out(rows: Sequence[Row]) -> Iterator[Finding]:
    if all(row.split == "train" for row in rows):
        yield from _finding(
            "nothing is held out, so that nothing is measured",
            rows,
            "give split.test and split.validation a share, or mark rows with a column split; a user needs ten rows",
        )


def _nameless(rows: Sequence[Row]) -> Iterator[Finding]:
    nameless = [row for row in rows if row.user == "all" or not row.user.strip()]
    all_of_them = len(nameless) == len(rows)
    yield from _finding(
        "rows without a user's name",
        nameless,
        "they are taken for one person's"
        + ("" if all_of_them else ", beside those who have a name")
        + ": name the column with data.columns.user",
    )


def _one_user(rows: Sequence[Row]) -> Iterator[Finding]:
    users = {row.user for row in rows}
    if len(users) == 1:
        yield from _finding(
            f"one user only ({users.pop()})",
            rows,
            "the worth of a profile over another user's cannot be told; add rows of others if it is to be",
        )


def _secrets(rows: Sequence[Row]) -> Iterator[Finding]:
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        messages = [content_of(message) for message in (*row.prompt, *row.completion)]
        for kind in secrets_in("\n".join([*messages, *(item.text for item in items_of(row.profile))])):
            kinds[kind].append(row)
    for kind, hold in kinds.items():
        yield from _finding(
            f"a secret: what looks like {kind}", hold, "an adapter can give it away: revoke it, and import with --mask"
        )


# Languages: py3langid, where a text is long enough; scripts of all


def _other_languages(rows: Sequence[Row]) -> Iterator[Finding]:
    """Rows whose text is in another script than most, or surely in another language than most of that script."""
    scripts = [(_script(" ".join(written(row))), row) for row in rows]
    counts = Counter(script for script, _ in scripts if script)
    if not counts:
        return
    most = counts.most_common(1)[0][0]
    others = [(script, row) for script, row in scripts if script and script != most]
    languages = [(_language(" ".join(written(row))), row) for script, row in scripts if script == most]
    by_language = Counter(language for language, _ in languages if language)
    if by_language:
        spoken = by_language.most_common(1)[0][0]
        others += [(language, row) for language, row in languages if language and language != spoken]
        most = f"{spoken}, {most}"
    by_kind = ", ".join(f"{kind} {count}" for kind, count in Counter(kind for kind, _ in others).most_common(5))
    yield from _finding(
        f"texts in another language or script ({by_kind}) than most ({most})",
        [row for _, row in others],
        "two languages under one name are learned as two voices: keep one, or make them two users",
    )


def _script(text: str) -> str:
    """The script of most letters, such as Latin; "" where there are none."""
    kinds: Counter[str] = Counter()
    for letter, count in Counter(re.sub(r"[\W\d_]", "", text)).items():
        kinds[_script_of(letter)] += count
    return kinds.most_common(1)[0][0] if kinds else ""


@functools.lru_cache(maxsize=4096)
def _script_of(letter: str) -> str:
    """The script of a letter, by the first word of its Unicode name; Japanese, which has three, is one."""
    word = unicodedata.name(letter, "").partition(" ")[0].capitalize()
    return {"Hiragana": "Cjk", "Katakana": "Cjk", "Fullwidth": "Latin", "": "other letters"}.get(word, word)


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)


def _language(text: str) -> str:
    """The two letters of the language of a text; "" where it is too short, or not sure."""
    if len(text.split()) < _WORDS_OF_A_LANGUAGE:
        return ""
    language, probability = _identifier().classify(text[:_LETTERS])
    return str(language) if probability >= _SURE else ""
