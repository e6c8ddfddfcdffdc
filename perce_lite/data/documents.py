"""Documents by author become rows: the profile of each is made of the same author's earlier ones."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perce_lite.data.retrieval import History, Item
from perce_lite.data.rows import Row, cohort_name, is_held_out, split_name, split_rows, user_name
from perce_lite.errors import DataError
from perce_lite.recipe import Profile, Recipe

Record = tuple[str, str | None, Mapping[str, Any]]
"""Where a record stands, the split its file says it is of, and what it says."""


def from_documents(records: Sequence[Record], rule: Profile, profiles: bool = True) -> list[Row]:
    """Documents by author: the profile of each is made of the same author's earlier ones, never later ones.

    profiles: whether to choose them; without, rows have an empty profile, which their split does not depend on

    Raises:
        DataError: a document without text or query, or without the date that `rule` needs.
    """
    by_user: dict[str, list[Record]] = defaultdict(list)
    for where, split, record in records:
        if not isinstance(record.get("text"), str):
            raise DataError(f"{where}: no text; rename yours with data.columns.text=YOUR_COLUMN")
        if not record.get("query") and not record.get("title"):
            raise DataError(f"{where}: neither query nor title: nothing to ask for")
        if rule.earlier_by != "document":
            _date(record, where, f"profile.earlier_by: {rule.earlier_by} needs one in every document")
        by_user[user_name(record.get("user"))].append((where, split, record))
    rows = []
    for user, documents in by_user.items():
        documents.sort(key=age(documents))
        history = History([item_of(record) for _, _, record in documents])
        splits = [_split_of(document) for document in documents]
        times = [_time(record, rule.earlier_by) for _, _, record in documents]
        wholes = [whole_of(record) for _, _, record in documents]
        for place, (where, _, record) in enumerate(documents):
            query = str(record.get("query") or record.get("title"))
            chosen: list[Item] = []
            if profiles:
                earlier = _earlier(times, splits, wholes, place)
                chosen = history.choose(str(record.get("title") or query), rule.select, rule.top_k, earlier)
            prompt = ({"role": "user", "content": query},)
            completion = ({"role": "assistant", "content": record["text"]},)
            rows.append(
                Row(
                    where,
                    user,
                    tuple(chosen),
                    prompt,
                    completion,
                    splits[place],
                    cohort_name(record),
                    is_held_out(record),
                    part_of=whole_of(record),
                )
            )
    return rows


def _earlier(
    times: Sequence[tuple[float, ...]], splits: Sequence[str | None], wholes: Sequence[str | None], place: int
) -> list[int]:
    """Places of the documents that may stand in the profile of the one at `place`: those that are older, see `_time`.

    A held-out document stands in no profile that is trained on, and no part of a text in that of another part of it.
    """
    now, whole, held_out = times[place], wholes[place], ("validation", "test")
    may_be_held_out = splits[place] in held_out
    return [
        other
        for other in range(place)
        if (not now or times[other] < now)
        and (may_be_held_out or splits[other] not in held_out)
        and (whole is None or wholes[other] != whole)
    ]


CHOICE = 1
"""To be increased when other rows are made of the same documents, so that what was trained on them is trained anew."""


def deciding(documents: Sequence[Record], rule: Profile) -> list[Any]:
    """All that `from_documents` makes one author's rows of, for JSON: equal, and the rows are, whatever the file."""
    content: list[Any] = [CHOICE]
    for document in sorted(documents, key=age(documents)):
        _, _, record = document
        asked = record.get("query"), record.get("title"), record["text"]
        chosen_by = _split_of(document), _time(record, rule.earlier_by), whole_of(record)
        content.append([asked, chosen_by, cohort_name(record), is_held_out(record)])
    return content


def whole_of(record: Mapping[str, Any]) -> str | None:
    """The text of which a document is a part (`part_of`); None where it stands alone."""
    return None if record.get("part_of") is None else str(record["part_of"])


def trained_documents(records: Sequence[Record], recipe: Recipe) -> set[str]:
    """Where the documents of the training split stand."""
    rows = split_rows(from_documents(records, recipe.profile, profiles=False), recipe.split, "the data", "time")
    return {row.where for row in rows if row.split == "train"}


def item_of(document: Mapping[str, Any]) -> Item:
    return Item(str(document.get("title") or ""), document["text"])


def _split_of(document: Record) -> str | None:
    where, split, record = document
    return split_name(record.get("split") or record.get("temporal_split") or split, where)


def age(documents: Sequence[Record]) -> Callable[[Record], tuple[float, ...]]:
    """What sorts an author's documents oldest first: idx where all have one, else the date, else as they stand.

    Raises:
        DataError: an idx that is no number, or a date that is not year-month-day.
    """
    if all(record.get("idx") is not None for _, _, record in documents):
        return lambda document: (_number(document[2]["idx"], document[0]),)
    if all(record.get("date") is not None for _, _, record in documents):
        return lambda document: _date(document[2], document[0], "without idx, an author's documents are ordered by it")
    for where, _, record in documents:
        if record.get("idx") is not None or record.get("date") is not None:
            raise DataError(
                f"{where}: has an idx or a date, other documents of this author have none; give it to all or to none"
            )
    return lambda document: ()


def _number(idx: Any, where: str) -> float:
    try:
        return float(idx)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: idx is {idx!r}; the order of an author's documents is a number") from error


def _date(record: Mapping[str, Any], where: str, why: str) -> tuple[float, ...]:
    """(year, month, day, ...) of a date such as 2024-05-31, 2024-05 or 2024, with a time or without."""
    numbers = _numbers(str(record.get("date")))
    if numbers is None:
        raise DataError(f"{where}: date is {record.get('date')!r}; write it as 2024-05-31 ({why})")
    return numbers


@functools.lru_cache(maxsize=4096)
def _numbers(date: str) -> tuple[float, ...] | None:
    """The numbers of a date; None where it does not begin with a year of four digits."""
    numbers = re.findall(r"\d+", date)
    return tuple(map(float, numbers)) if numbers and len(numbers[0]) == 4 else None


def _time(record: Mapping[str, Any], by: str) -> tuple[float, ...]:
    """A document's year, or year and month, by what another has to be older; empty where any that stands ahead is."""
    return () if by == "document" else _date(record, "", "")[: {"year": 1, "month": 2}[by]]
