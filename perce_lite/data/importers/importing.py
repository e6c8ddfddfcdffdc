"""A person's writing, in whatever files it lies, becomes documents: what `recipes/documents.yaml` trains on.

Chats become documents too, with what was said before as the query: then the profile of an answer is made of the same
person's earlier ones, never later ones, and a held-out answer never stands in a profile that was trained on.
"""

import hashlib
import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perce_lite.data.importers.archives import files_of
from perce_lite.data.importers.mails import Mail
from perce_lite.data.importers.masking import Mask, masked_in
from perce_lite.data.importers.reading import KINDS, Reader
from perce_lite.data.importers.writings import Notes, Writing, count_words, first_words, pieces
from perce_lite.data.readers import json_lines
from perce_lite.errors import DataError
from perce_lite.files import digest, settle, write_text
from perce_lite.locks import held_alone

RECIPE = "recipes/documents.yaml"

FEW = 20
"""Texts of a user below which there is little to learn from, and next to nothing to hold out."""

_BEGINNING, _TITLE = 6, 20  # words that a query has of a text's beginning, and of its title


@dataclass(frozen=True)
class Wanted:
    """Whose writing, and how much of it.

    text_column: of tables
    senders, me: their addresses in mailboxes, their names in chats
    min_words, max_words: of a text; a longer one is cut into several
    max_parts: of a text, taken evenly from all of it, so that a long one does not swamp the rest
    mask: masks what tells who and where people are; None: nothing is masked
    """

    user: str
    text_column: str | None = None
    senders: Sequence[str] = ()
    me: Sequence[str] = ()
    min_words: int = 5
    max_words: int = 100
    max_parts: int = 10
    mask: Mask | None = None


@dataclass(frozen=True)
class Imported:
    """What there is to write.

    new: the user's records that were not there before, in the order of time
    records: all that goes into `out`, those of other users unchanged
    before: hash of `out` when its records were read; None: it was not there
    mask: what `new` was masked with; None: it was not
    """

    out: Path
    user: str
    new: list[dict[str, Any]]
    records: list[dict[str, Any]]
    notes: Notes
    mask: Mask | None = None
    before: bytes | None = None

    def write(self) -> None:
        """Writes `out`, whole or not at all.

        Raises:
            DiskFullError: no space left; what was there stays.
            DataError: somebody else has written `out` since its records were read, or is writing it.
        """
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)

        def refuse(who: str) -> DataError:
            return DataError(f"{self.out}: another import is writing it ({who}). Nothing was written; run it again.")

        with held_alone(self.out.with_name(f".{self.out.name}.lock"), refuse):
            settle(self.out)
            if _hash(self.out) != self.before:
                raise DataError(
                    f"{self.out}: was written by another program since it was read. Nothing was written; run the same "
                    "command again, with --append to add to what it holds now."
                )
            write_text(self.out, text)

    @property
    def texts(self) -> int:
        """Whole texts of the user; parts of one count as one."""
        own_records = [record for record in self.records if record["user"] == self.user]
        return len({record.get("part_of") or f"row {number}" for number, record in enumerate(own_records)})

    def commands(self) -> list[str]:
        """The commands that lead to a chat: look at `out`, train on it, talk to the adapter."""
        words = [_recipe(), "--set", f"data.path={_yaml(str(self.out.absolute()))}"]
        if not _months_apart(self.records):
            words += ["--set", "profile.earlier_by=document"]
        run = f"runs/{self.out.stem}"
        folder = ["--set", f"train.output_dir={_yaml(run)}"]
        several = len({record["user"] for record in self.records}) > 1
        trains = "fleet" if several else "train"  # an adapter for each, or the one
        adapter = run if several else f"{run}/adapter"
        return [
            shlex.join(["perce-lite", "check", *words]),
            shlex.join(["perce-lite", trains, *words, *folder]),
            shlex.join(["perce-lite", "chat", adapter, "--user", self.user]),
        ]

    def masked(self) -> dict[str, int]:
        """How often each kind is masked in the new records."""
        return masked_in(str(value) for record in self.new for name, value in record.items() if name != "user")

    def figures(self) -> dict[str, Any]:
        """What `--json` holds, less whether it was written."""
        skipped = {reason: {"count": len(where), "such_as": where[0]} for reason, where in self.notes.skipped.items()}
        users = Counter(str(record.get("user")) for record in self.records)
        report: dict[str, Any] = {"read": dict(self.notes.read), "skipped": skipped, "commands": self.commands()}
        if self.mask is not None:
            report["masked"] = self.masked()
        return {"out": str(self.out), "user": self.user, "new": len(self.new), "users": dict(users), **report}


def _recipe() -> str:
    """The recipe of documents: as a clone has it, from whatever folder this is."""
    clone = Path(__file__).parents[3] / RECIPE
    return str(clone) if clone.is_file() and not Path(RECIPE).is_file() else RECIPE


def look(path: Path, wanted: Wanted, out: Path, append: bool = False, force: bool = False) -> Imported:
    """Reads all writing in `path`, a file, a folder or a ZIP, and makes records of what the wanted person wrote.

    append: add to the records that `out` holds; force: replace it; neither: it must not be there

    Raises:
        DataError: nothing to read, nothing of the person's, an `out` that is in the way or holds something else.
    """
    files, as_it_was = files_of(path), _hash(out)
    if out.suffix != ".jsonl":
        raise DataError(f"--out {out}: what is written is JSON, one record a line; end the name with .jsonl")
    if out.exists() and not (append or force):
        raise DataError(f"{out} is there already. Add to it with --append, or replace it with --force.")
    if path.resolve() == out.resolve():
        raise DataError(f"--out {out}: is what is read, and would be lost; give another --out")
    before = _kept(out) if append and out.exists() else []
    files = [file for file in files if (path / file.name).resolve() != out.resolve()]
    notes = Notes()
    reader = Reader(notes, wanted.text_column, alone=len(files) == 1)
    reader.read(files)
    _require_sender(reader.mails, wanted)
    if wanted.mask is not None:
        reader.mask(wanted.mask)
    texts = list(_prepared(reader.of(wanted.senders, wanted.me), wanted, notes))
    if not texts:
        raise DataError(_nothing(path, notes))
    kept_texts = {record["text"] for record in before if record.get("user") == wanted.user}
    for writing in texts:
        if writing.text in kept_texts:
            notes.skip(f"in {out.name} already", writing.source)
    new = _in_order([_record(wanted, text) for text in texts if text.text not in kept_texts])
    records = _merged(before, new, wanted.user)
    return Imported(out, wanted.user, new, records, notes, wanted.mask, as_it_was)


def _hash(path: Path) -> bytes | None:
    """Hash of the content of `path`; None: there is no such file, or it is none that could be read twice."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _require_sender(mails: Sequence[Mail], wanted: Wanted) -> None:
    """Raises DataError where all mails are from one person, who is not called as the user is: they may be received."""
    senders = {(mail.address, mail.name) for mail in mails}
    if wanted.senders or len({address for address, _ in senders}) != 1:
        return
    user = re.sub(r"\W+", "", wanted.user).casefold()
    if not any(user in re.sub(r"\W+", "", text).casefold() for sender in senders for text in sender):
        address = next(iter(senders))[0]
        raise DataError(
            f"these mails are all from {address}, and it is not clear that this is {wanted.user}: say so with "
            f"--from {address}, or leave them out"
        )


def _kept(out: Path) -> list[dict[str, Any]]:
    """The documents that `out` holds."""
    kept = []
    for where, _, record in json_lines(out):
        if not (isinstance(record, Mapping) and all(isinstance(record.get(name), str) for name in ("user", "text"))):
            raise DataError(
                f"{where}: not a document (user, query, text), so nothing is added to it; take another --out"
            )
        kept.append(dict(record))
    return kept


def _nothing(path: Path, notes: Notes) -> str:
    reasons = [f"{reason} ({len(where)}, such as {where[0]})" for reason, where in notes.skipped.items()]
    left = f" Left out: {'; '.join(reasons[:6])}." if reasons else ""
    return f"{path}: no writing was found in it. What is read: {KINDS}, a folder of these, or a ZIP.{left}"


def _prepared(texts: Sequence[Writing], wanted: Wanted, notes: Notes) -> Iterator[Writing]:
    """The texts that are long enough, each once, cut to size, each with a query."""
    seen: set[str] = set()
    for text in texts:
        key = digest(text.text.casefold().split())
        if count_words(text.text) < wanted.min_words:
            notes.skip(f"fewer than {wanted.min_words} words", text.source)
        elif key in seen:
            notes.skip("a duplicate", text.source)
        else:
            yield from _parts(text, wanted, notes)
        seen.add(key)


def _parts(text: Writing, wanted: Wanted, notes: Notes) -> Iterator[Writing]:
    """The text cut to size; of a long one at most `max_parts`, evenly from all of it."""
    parts = pieces(text.text, wanted.max_words, wanted.min_words)
    if len(parts) == 1:
        yield replace(text, query=_query(text, text.text, 1))
        return
    count = min(len(parts), wanted.max_parts)
    taken = {place * len(parts) // count for place in range(count)}
    for place, part in enumerate(parts):
        source = f"{text.source}, part {place + 1} of {len(parts)}"
        if place in taken:
            query = _query(text, part, place + 1)
            yield replace(text, text=part, source=source, query=query, part_of=digest(text.text))
        else:
            notes.skip(f"more than {wanted.max_parts} parts of one text; --max-parts takes more", source)


def _query(text: Writing, part: str, number: int) -> str:
    """What a text answers: what was asked, else its title, else how it begins.

    Both prompts, with the profile and without, hold the beginning: its own tokens get the weight of what needs no
    profile, and what follows is asked for as an answer is.
    """
    if text.query and number == 1:
        return text.query
    kind = {"post": "text"}.get(text.kind, text.kind)
    if not text.title:
        return f"Write a {kind} that begins: {first_words(part, min(_BEGINNING, count_words(part) // 2))}"
    titled = f'{kind} with the {"subject" if kind == "mail" else "title"} "{first_words(text.title, _TITLE)}"'
    return f"Write a {titled}." if number == 1 else f"Write part {number} of a {titled}."


def _record(wanted: Wanted, text: Writing) -> dict[str, Any]:
    query, source = text.query, text.source
    if wanted.mask is not None:  # chats name their speakers in queries, and files are called by names
        query, source = wanted.mask(query), wanted.mask(source)
    record = {"user": wanted.user, "date": text.date, "title": text.title, "query": query, "text": text.text}
    return {name: value for name, value in {**record, "part_of": text.part_of, "source": source}.items() if value}


def _in_order(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Oldest first; what has no date comes before all that has one, as it stood."""
    return sorted(records, key=lambda record: str(record.get("date") or ""))


def _merged(before: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], user: str) -> list[dict[str, Any]]:
    """All records, the user's in order of time and numbered anew: an older text may have come later."""
    user_records = _in_order([*(record for record in before if record["user"] == user), *new])
    numbered = [{**record, "idx": number} for number, record in enumerate(user_records)]
    return [*(record for record in before if record["user"] != user), *numbered]


def _months_apart(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the recipe's `earlier_by: month` leaves most texts a profile: all dated, most after their first month."""
    months: dict[str, list[str]] = defaultdict(list)
    for record in records:
        months[record["user"]].append(str(record.get("date") or "")[:7])
    if any(not month for of_user in months.values() for month in of_user):
        return False
    return all(sum(month > min(of_user) for month in of_user) >= 0.8 * len(of_user) for of_user in months.values())


def _yaml(text: str) -> str:
    """`text` as YAML: quoted where it would be read as something else."""
    return text if re.fullmatch(r"[\w/][\w ./-]*", text) and not text.endswith(" ") else json.dumps(text)
