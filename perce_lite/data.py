"""Reading: JSONL, parquet, a Hub data set, LaMP's and LongLaMP's own files, documents by author; all become rows."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perce_lite.errors import DataError
from perce_lite.profiles import Item, choose
from perce_lite.recipe import Profile, Recipe
from perce_lite.rows import SPLITS, Profiled, Row, from_record, of_split, split_rows, spread_over_users


def read_rows(recipe: Recipe) -> list[Row]:
    """Every row of the recipe's data, its split set.

    Raises:
        DataError: nothing there, a record that is no row (file and line are named), no profile anywhere.
    """
    data = recipe.data
    records = list(_records(recipe))
    if not records:
        raise DataError(f"{data.path or data.hub}: holds no records")
    shape = data.format if data.format != "auto" else _shape(records[0][2])
    if shape == "documents":
        rows = _from_documents(records, recipe.profile)
    else:
        rows = [from_record(record, where, split, shape, recipe.profile) for where, split, record in records]
    if data.users is not None:
        unknown = sorted(set(data.users) - {row.user for row in rows})
        if unknown:
            raise DataError(f"data.users: {', '.join(unknown)}: no such user in {data.path or data.hub}")
        rows = [row for row in rows if row.user in data.users]
    if not any(row.profile for row in rows):
        raise DataError(
            f"{data.path or data.hub}: the profile is empty in every one of {len(rows)} rows, so there is nothing to "
            "contrast. Fill the profile column, or name yours: --set data.columns.profile=YOUR_COLUMN"
        )
    rows = split_rows(rows, recipe.split, otherwise="time" if shape == "documents" else "row")
    if data.max_rows is not None:
        parts = [of_split(rows, name) for name in ("train", "validation", "test")]
        rows = [row for part in parts for row in spread_over_users([one for one in part if one.profile], data.max_rows)]
    return rows


def history(recipe: Recipe, user: str) -> Profiled:
    """All that the data knows of `user`: the documents, or the profile items of the rows, oldest first.

    Raises:
        DataError: no such user.
    """
    records = list(_records(recipe))
    shape = recipe.data.format if recipe.data.format != "auto" else _shape(records[0][2])
    if shape == "documents":
        theirs = [record for _, _, record in records if str(record.get("user", "all")) == user]
        items = [Item(str(one.get("title") or ""), one["text"]) for one in sorted(theirs, key=_age)]
    else:
        rows = [from_record(record, where, split, shape, None) for where, split, record in records]
        profiles = [row.profile for row in rows if row.user == user]
        texts = [profile for profile in profiles if isinstance(profile, str)]
        if texts:
            return texts[-1]
        items = list(dict.fromkeys(item for profile in profiles for item in profile if isinstance(item, Item)))
    if not items:
        users = sorted({str(record.get("user", "all")) for _, _, record in records})
        raise DataError(f"user {user}: the data knows no such user; it has {', '.join(users[:20])}")
    return tuple(items)


# Records: whatever the file holds, one dict each, with where it stands and the split the file says it is of.

Record = tuple[str, str | None, Mapping[str, Any]]


def _records(recipe: Recipe) -> Iterator[Record]:
    path, renamed = recipe.data_path, {theirs: ours for ours, theirs in recipe.data.columns.items()}
    found = _from_hub(recipe) if path is None else _from_path(path)
    for where, split, record in found:
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: a record is an object with named fields, this is {type(record).__name__}")
        yield where, split, {renamed.get(name, name): value for name, value in record.items()} if renamed else record


def _from_hub(recipe: Recipe) -> Iterator[Record]:
    from datasets import load_dataset

    name = str(recipe.data.hub)
    try:
        splits = load_dataset(name, recipe.data.hub_config)
    except Exception as error:  # the Hub's client raises a dozen kinds, all of which mean: not to be had
        raise DataError(
            f"data.hub: {name} could not be loaded: {error}. Check the name and the network, or download it once and "
            "use data.path with the parquet file."
        ) from error
    for split, rows in splits.items():
        for number, record in enumerate(rows):
            yield f"{name}, {split} row {number}", SPLITS.get(split), record


def _from_path(path: Path) -> Iterator[Record]:
    if path.is_dir():
        questions = sorted(path.glob("*questions.json"))
        if not questions:
            raise DataError(f"{path}: this folder has no *_questions.json of LaMP; name a JSONL or parquet file in it")
        return itertools.chain.from_iterable(map(_lamp, questions))
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; data.path is taken from the recipe's own folder on")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.name.endswith("questions.json"):
        return _lamp(path)
    if path.suffix == ".json":
        return _json_array(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path)
    raise DataError(
        f"{path}: {path.suffix or 'no ending'} is not known; allowed: .jsonl, .json, .parquet, LaMP's files"
    )


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path.name}, line {number}", None, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: not JSON: {error}") from error


def _json_array(path: Path) -> Iterator[Record]:
    records = _json(path)
    if not isinstance(records, list):
        raise DataError(f"{path.name}: a JSON file holds a list of records; for one record a line use .jsonl")
    yield from ((f"{path.name}, record {number}", None, record) for number, record in enumerate(records))


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path.name}: not a parquet file: {error}") from error
    yield from ((f"{path.name}, row {number}", None, record) for number, record in enumerate(records))


def _lamp(questions: Path) -> Iterator[Record]:
    """LaMP: `train_questions.json` [{id, input, profile}] and `train_outputs.json` {golds: [{id, output}]}."""
    prefix = questions.name.removesuffix("questions.json")
    outputs = questions.with_name(f"{prefix}outputs.json")
    if not outputs.is_file():
        raise DataError(f"{questions.name}: its answers are missing; LaMP's {outputs.name} belongs beside it")
    golds = _json(outputs)
    golds = golds["golds"] if isinstance(golds, dict) and "golds" in golds else golds
    output_of = {str(gold["id"]): gold["output"] for gold in golds}
    for record in _json(questions):
        where = f"{questions.name}, id {record.get('id')}"
        if str(record.get("id")) not in output_of:
            raise DataError(f"{where}: {outputs.name} has no answer with this id")
        yield where, SPLITS.get(prefix.strip("_")), {**record, "output": output_of[str(record["id"])]}


# Rows of records.


def _shape(record: Mapping[str, Any]) -> str:
    names = set(record)
    if "completion" in names or "messages" in names:
        return "rows"
    if {"input", "output"} <= names:
        return "lamp" if "id" in names else "longlamp"
    if "text" in names:
        return "documents"
    raise DataError(
        f"the fields {', '.join(sorted(names))} fit no known shape. Rows have user, profile, prompt and completion (or "
        "messages); documents have user, query, text; rename with data.columns, such as {completion: answer}"
    )


def _from_documents(records: Sequence[Record], rule: Profile) -> list[Row]:
    """Plain documents by author: the profile of each is made of the same author's earlier ones, never later ones."""
    by_user: dict[str, list[Record]] = defaultdict(list)
    for where, split, record in records:
        if not isinstance(record.get("text"), str):
            raise DataError(f"{where}: no text; rename yours with data.columns.text=YOUR_COLUMN")
        if record.get("query") is None and record.get("title") is None:
            raise DataError(f"{where}: neither query nor title: nothing to ask for")
        by_user[str(record.get("user", "all"))].append((where, split, record))
    if rule.earlier_by != "document" and not all(record.get("date") for _, _, record in records):
        raise DataError(f"profile.earlier_by: {rule.earlier_by} needs a date (2024-05-31) in every document")
    rows = []
    for user, documents in by_user.items():
        documents.sort(key=lambda one: _age(one[2]))
        for index, (where, split, record) in enumerate(documents):
            earlier = [other for _, _, other in documents[:index] if _is_earlier(other, record, rule.earlier_by)]
            items = [Item(str(other.get("title") or ""), other["text"]) for other in earlier]
            query = str(record.get("query") or record.get("title"))
            chosen = choose(items, str(record.get("title") or query), rule.select, rule.top_k)
            split_name = SPLITS.get(str(record.get("split") or record.get("temporal_split") or split))
            prompt = ({"role": "user", "content": query},)
            completion = ({"role": "assistant", "content": record["text"]},)
            cohort = None if record.get("cohort") is None else str(record["cohort"])
            rows.append(Row(where, user, tuple(chosen), prompt, completion, split_name, cohort))
    return rows


def _age(document: Mapping[str, Any]) -> tuple[float, str]:
    """Sorts documents oldest first: by idx where it is a number, then by date; otherwise as they stand."""
    idx = document.get("idx")
    return float(idx) if isinstance(idx, int | float) else 0.0, str(document.get("date") or "")


def _is_earlier(other: Mapping[str, Any], record: Mapping[str, Any], by: str) -> bool:
    """Whether `other`, which stands ahead of `record`, is older by the whole unit `by` as well."""
    length = {"document": 0, "year": 4, "month": 7}[by]
    return by == "document" or str(other["date"])[:length] < str(record["date"])[:length]
