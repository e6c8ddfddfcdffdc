"""Reading: JSONL, parquet, a Hub data set, LaMP's and LongLaMP's own files, documents by author; all become rows."""

import itertools
import json
import pickle
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from perce_lite.console import warn
from perce_lite.data.documents import Record, age, deciding, from_documents, item_of, trained_documents, whole_of
from perce_lite.data.retrieval import History, Item
from perce_lite.data.rows import (
    SPLIT_NAMES,
    Profiled,
    Row,
    from_record,
    items_of,
    of_split,
    shape_of,
    split_name,
    split_rows,
    spread_over_users,
    user_name,
    user_of,
)
from perce_lite.errors import DataError
from perce_lite.files import disk_full_is_clear
from perce_lite.recipe import Profile, Recipe


def read_rows(recipe: Recipe) -> list[Row]:
    """Every row of the recipe's data, its split set.

    Raises:
        DataError: nothing there, a record that is no row (file and line are named), no profile anywhere.
    """
    data = recipe.data
    records = list(_records(recipe))
    shape = _shape_of(recipe, records[0] if records else None)
    if shape == "documents":
        rows = from_documents(records, recipe.profile)
    else:
        rows = [from_record(record, where, split, shape, recipe.profile) for where, split, record in records]
    if data.users is not None:
        _require_users(recipe, {row.user for row in rows})
        rows = [row for row in rows if row.user in data.users]
    if not any(row.profile for row in rows):
        raise _nothing_to_contrast(recipe, shape, len(rows))
    rows = split_rows(rows, recipe.split, str(data.path or data.hub), "time" if shape == "documents" else "row")
    if data.max_rows is not None:
        parts = [of_split(rows, name) for name in SPLIT_NAMES]
        rows = [row for part in parts for row in spread_over_users([row for row in part if row.profile], data.max_rows)]
    return rows


def _shape_of(recipe: Recipe, first: Record | None) -> str:
    """As `rows.shape_of`; raises DataError where there is no record or the split does not go with documents."""
    data = recipe.data
    if first is None:
        raise DataError(f"{data.path or data.hub}: holds no records")
    shape = data.format if data.format != "auto" else _shape(first)
    if shape == "documents" and recipe.split.by == "row":
        raise DataError(
            "split.by: row does not go with documents: an author's held-out texts would stand in the profiles of "
            "later ones that are trained on. Use time (the last ones of each author are held out) or user."
        )
    return shape


def _require_users(recipe: Recipe, known: Set[str]) -> None:
    unknown = sorted(set(recipe.data.users or ()) - known)
    if unknown:
        raise DataError(f"data.users: {', '.join(unknown)}: no such user in {recipe.data.path or recipe.data.hub}")


def _nothing_to_contrast(recipe: Recipe, shape: str, count: int) -> DataError:
    mend = "Fill the profile column, or name yours: --set data.columns.profile=YOUR_COLUMN"
    if shape == "documents":
        mend = "An author needs two documents or more: the profile is made of the earlier ones"
    return DataError(
        f"{recipe.data.path or recipe.data.hub}: the profile is empty in every one of {count} rows, so there is "
        f"nothing to contrast. {mend}."
    )


@dataclass(frozen=True, slots=True)
class _Outline:
    """What a split looks at of a row, without its texts. `content`: the row's fingerprint."""

    user: str
    place: int
    split: str | None
    unseen_user: bool
    content: str
    part_of: str | None

    def fingerprint(self) -> str:
        return self.content


@dataclass(frozen=True, slots=True)
class UserOutline:
    """One user's rows without their texts.

    splits: of each row, in the order of `RowsByUser.rows_of`; None: the row is left out
    cohorts: each cohort that the user's rows name, with the record that names it first
    """

    splits: tuple[str | None, ...]
    cohorts: tuple[tuple[str, str], ...]


class RowsByUser:
    """The rows of `read_rows` (without `data.max_rows`), made user by user, so that memory holds one user's texts.

    Records are read once into a temporary file without a name, which is gone when this is closed. Rows are made anew at
    each call, from the user's own records alone.

    Raises:
        DataError: as `read_rows`; DiskFullError: no space for the temporary file.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._records = tempfile.TemporaryFile(prefix="perce-lite-")  # noqa: SIM115 (closed by __exit__)
        self._offsets: dict[str, array[int]] = {}  # user -> where the user's records begin in the file, bytes
        try:
            with disk_full_is_clear(Path(tempfile.gettempdir())):
                self._shape = self._spool()
            self._outlines = self._outline()
        except BaseException:
            self._records.close()
            raise

    def __enter__(self) -> "RowsByUser":
        return self

    def __exit__(self, *error: object) -> None:
        self._records.close()

    @property
    def users(self) -> list[str]:
        """Users who have rows, in the order of their first record."""
        return list(self._outlines)

    def outline(self, user: str) -> UserOutline:
        return self._outlines[user]

    def rows_of(self, *users: str) -> list[Row]:
        """The rows of `users` with profiles and splits, in the order of `read_rows`."""
        numbered = []
        for user in users:
            splits = self._outlines[user].splits
            for (offset, row), split in zip(self._rows(user), splits, strict=True):
                if split is not None:
                    numbered.append((offset, replace(row, split=split)))
        if self._shape != "documents":
            numbered.sort(key=lambda pair: pair[0])
        return [row for _, row in numbered]

    def content_of(self, user: str) -> list[Any] | None:
        """What the rows of a user are made of, for JSON: equal as long as `rows_of` gives rows of equal content.

        Choosing profiles takes most of the time of making rows, and is not needed for it. None: the data holds rows,
        not documents.
        """
        if self._shape != "documents":
            return None
        return [self._outlines[user].splits, deciding(self._records_of(user), self._recipe.profile)]

    def _spool(self) -> str:
        """Writes the records to the file; gives their shape."""
        shape = None
        for where, split, record in _records(self._recipe):
            shape = shape or _shape_of(self._recipe, (where, split, record))
            user = user_of(record, shape)
            self._offsets.setdefault(user, array("Q")).append(self._records.tell())
            pickle.dump((where, split, record), self._records, pickle.HIGHEST_PROTOCOL)
        wanted = self._recipe.data.users
        if wanted is not None:
            _require_users(self._recipe, self._offsets.keys())
            self._offsets = {user: offsets for user, offsets in self._offsets.items() if user in wanted}
        return shape or _shape_of(self._recipe, None)

    def _rows(self, user: str, profiles: bool = True) -> list[tuple[int, Row]]:
        """The user's rows before the split, each with the offset of a record that orders it."""
        offsets, records, rule = self._offsets[user], self._records_of(user), self._recipe.profile
        if self._shape == "documents":
            rows = from_documents(records, rule, profiles)
        else:
            rows = [from_record(record, where, split, self._shape, rule) for where, split, record in records]
        return list(zip(offsets, rows, strict=True))

    def _records_of(self, user: str) -> list[Record]:
        records = []
        for offset in self._offsets[user]:
            self._records.seek(offset)
            records.append(pickle.load(self._records))
        return records

    def _outline(self) -> dict[str, UserOutline]:
        """Splits all rows by their outlines."""
        outlines: list[_Outline] = []
        cohorts: dict[str, tuple[tuple[str, str], ...]] = {}
        has_profiles = False
        for user in self._offsets:
            # Documents are split without their profiles: these are chosen until one shows that there are any.
            rows = [row for _, row in self._rows(user, profiles=not has_profiles)]
            has_profiles = has_profiles or any(row.profile for row in rows)
            named: dict[str, str] = {}
            for row in rows:
                if row.cohort is not None:
                    named.setdefault(row.cohort, row.where)
            cohorts[user] = tuple(named.items())
            for place, row in enumerate(rows):
                content = "" if self._shape == "documents" else row.fingerprint()
                outlines.append(_Outline(user, place, row.split, row.unseen_user, content, row.part_of))
        if not has_profiles:
            raise _nothing_to_contrast(self._recipe, self._shape, len(outlines))
        data, default = self._recipe.data, "time" if self._shape == "documents" else "row"
        splits: dict[str, list[str | None]] = {user: [None] * len(offsets) for user, offsets in self._offsets.items()}
        for outline in split_rows(outlines, self._recipe.split, str(data.path or data.hub), default):
            splits[outline.user][outline.place] = outline.split
        return {user: UserOutline(tuple(names), cohorts[user]) for user, names in splits.items() if any(names)}


class UserTexts:
    """What the data holds of one user, to choose a profile from for any prompt: one reading, one BM25 index.

    text: the user's profile where the data has it as one text
    history: else the documents, or the profile items of the rows, oldest first
    prompts: of each document what it answers, its query and its title
    trained: whether each document is of the training split
    wholes: of each document the text that it is a part of, or None
    """

    def __init__(
        self,
        text: str | None,
        items: Sequence[Item] = (),
        prompts: Sequence[tuple[Any, ...]] = (),
        trained: Sequence[bool] = (),
        wholes: Sequence[str | None] = (),
    ) -> None:
        self.text, self.history = text, History(items)
        self._prompts, self._trained, self._wholes = prompts, trained, wholes

    def profile_for(self, prompt: str, rule: Profile) -> Profiled:
        """The profile for `prompt`, chosen by `rule`.

        Held-out documents are left out, unless the user has no other; the document that answers `prompt` always is, and
        so are the other parts of its text: an answer must not stand in the profile that it is asked with.
        """
        if self.text is not None:
            return self.text
        places = range(len(self.history.items))
        answering = {place for place in places if self._prompts and prompt in self._prompts[place]}
        answered = {self._wholes[place] for place in answering if self._wholes} - {None}
        beside = {place for place in places if self._wholes and self._wholes[place] in answered}
        allowed = [place for place in places if place not in answering | beside]
        if self._trained:
            allowed = [place for place in allowed if self._trained[place]] or allowed
        return tuple(self.history.choose(prompt, rule.select, rule.top_k, allowed))


def user_texts(recipe: Recipe, user: str) -> UserTexts:
    """The texts of `user` in the recipe's data.

    Raises:
        DataError: no such user, or the data cannot be read.
    """
    return texts_of_users(recipe, [user])[user]


def texts_of_users(recipe: Recipe, users: Collection[str]) -> dict[str, UserTexts]:
    """The texts of each of `users`; the data are read once. Raises as `user_texts`."""
    records = list(_records(recipe))
    shape = recipe.data.format if recipe.data.format != "auto" else _shape(records[0])
    by_document = shape == "documents"
    texts = (_of_documents if by_document else _of_profiles)(records, recipe, shape, set(users))
    for user in users:
        if user not in texts:
            known = _users_of(records, recipe)
            raise DataError(f"user {user}: the data knows no such user; it has {', '.join(known[:20])}")
    return texts


def _of_documents(records: list[Record], recipe: Recipe, shape: str, users: Set[str]) -> dict[str, UserTexts]:
    trained = trained_documents(records, recipe)
    documents: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if (user := user_name(record[2].get("user"))) in users:
            documents[user].append(record)
    texts = {}
    for user, own_records in documents.items():
        own_records.sort(key=age(own_records))
        texts[user] = UserTexts(
            None,
            [item_of(record) for _, _, record in own_records],
            [(record.get("query"), record.get("title")) for _, _, record in own_records],
            [where in trained for where, _, _ in own_records],
            [whole_of(record) for _, _, record in own_records],
        )
    return texts


def _of_profiles(records: list[Record], recipe: Recipe, shape: str, users: Set[str]) -> dict[str, UserTexts]:
    rows = [from_record(record, where, split, shape, None) for where, split, record in records]
    texts = {}
    for user in users:
        profiles = [row.profile for row in rows if row.user == user]
        plain = [profile for profile in profiles if isinstance(profile, str)]
        items = list(dict.fromkeys(item for profile in profiles for item in profile if isinstance(item, Item)))
        if plain or items:
            texts[user] = UserTexts(plain[-1] if plain else None, items)
    return texts


def known_users(recipe: Recipe) -> list[str]:
    """Every user of the recipe's data, by name.

    Raises:
        DataError: the data cannot be read.
    """
    return _users_of(list(_records(recipe)), recipe)


def _users_of(records: Sequence[Record], recipe: Recipe) -> list[str]:
    shape = _shape_of(recipe, records[0] if records else None)
    names = {user_of(record, shape) for _, _, record in records}
    return sorted(names if recipe.data.users is None else names & set(recipe.data.users))


def library(recipe: Recipe) -> dict[str, list[Item]]:
    """Every user's texts that training may show: documents of the training split, or the items of all profiles."""
    records = list(_records(recipe))
    shape = recipe.data.format if recipe.data.format != "auto" else _shape(records[0])
    users = recipe.data.users
    texts: dict[str, list[Item]] = defaultdict(list)
    if shape == "documents":
        records = [record for record in records if users is None or user_name(record[2].get("user")) in users]
        trained = trained_documents(records, recipe)
        for where, _, record in records:
            if where in trained:
                texts[user_name(record.get("user"))].append(item_of(record))
        return texts
    for where, split, record in records:
        row = from_record(record, where, split, shape, None)
        if users is None or row.user in users:
            texts[row.user] += [item for item in items_of(row.profile) if item.text.strip()]
    return {user: list(dict.fromkeys(items)) for user, items in texts.items()}


def plain_rows(path: Path) -> list[Row]:
    """The rows of a file that needs no profiles: prompt and completion, or messages."""
    return [from_record(record, where, split, "rows", None) for where, split, record in _objects(_from_path(path))]


# Records: one mapping each, with its place in the file and the split that the file is of


def _records(recipe: Recipe) -> Iterator[Record]:
    if recipe.data.path is None and recipe.data.hub is None:
        raise DataError(
            "The data are not known: a script or another trainer made this adapter, or it is an export, which does not "
            "say where they lie. Give --data FILE (in Python: data=...), or a profile instead of a user"
        )
    path, renamed = recipe.data_path, {column: ours for ours, column in recipe.data.columns.items()}
    records = _from_hub(recipe) if path is None else _from_path(path)
    for where, split, record in _objects(records):
        taken = {ours: record[column] for column, ours in renamed.items() if column in record}
        kept = {name: value for name, value in record.items() if name not in renamed and name not in renamed.values()}
        yield where, split, {**kept, **taken}


def _objects(records: Iterator[Record]) -> Iterator[Record]:
    """`records`, each checked to be an object with named fields, its texts mended."""
    for where, split, record in records:
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: a record is an object with named fields, this is {type(record).__name__}")
        yield where, split, _mended(record)


def _mended(value: Any) -> Any:
    """`value` with lone surrogates, which neither Arrow nor a tokenizer takes, made question marks."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {name: _mended(inner) for name, inner in value.items()}
    return [_mended(inner) for inner in value] if isinstance(value, list) else value


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
            yield f"{name}, {split} row {number}", split_name(split, name), record


def require_data(recipe: Recipe) -> None:
    """Raises DataError where the file that `data.path` names is not there or its first record cannot be read."""
    if recipe.data_path is not None:
        _shape_of(recipe, next(_records(recipe), None))


def _from_path(path: Path) -> Iterator[Record]:
    if not path.exists():
        raise DataError(f"{path}: there is no such file; data.path is taken from the recipe's own folder on")
    if path.is_dir():
        questions = sorted(path.glob("*questions.json"))
        if not questions:
            raise DataError(f"{path}: this folder has no *_questions.json of LaMP; name a JSONL or parquet file in it")
        return itertools.chain.from_iterable(map(_lamp, questions))
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.name.endswith("questions.json"):
        return _lamp(path)
    if path.suffix == ".json":
        return _json_array(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return json_lines(path)
    raise DataError(
        f"{path}: {path.suffix or 'no ending'} is not known; allowed: .jsonl, .json, .parquet, LaMP's files"
    )


def json_lines(path: Path) -> Iterator[Record]:
    """Every record of a JSONL file, as it stands there.

    Raises:
        DataError: a line that is not JSON, or a file that is not UTF-8.
    """
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
    if not outputs.is_file() and prefix.startswith("test"):
        warn(f"{questions.name} is left out: LaMP keeps the answers of its test set to itself")
        return
    if not outputs.is_file():
        raise DataError(f"{questions.name}: its answers are missing; LaMP's {outputs.name} belongs beside it")
    golds, asked = _json(outputs), _json(questions)
    golds = golds.get("golds") if isinstance(golds, dict) else golds
    if not _list_of(golds, "id", "output"):
        raise DataError(f"{outputs.name}: not LaMP's: it holds {{golds: [{{id, output}}, ...]}}")
    if not _list_of(asked, "id", "input"):
        raise DataError(f"{questions.name}: not LaMP's: it holds [{{id, input, profile}}, ...]")
    output_of = {str(gold["id"]): gold["output"] for gold in golds}
    for record in asked:
        where = f"{questions.name}, id {record.get('id')}"
        if str(record.get("id")) not in output_of:
            raise DataError(f"{where}: {outputs.name} has no answer with this id")
        split = split_name(prefix.strip("_"), questions.name)
        yield where, split, {**record, "output": output_of[str(record["id"])]}


def _list_of(value: Any, *names: str) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether `value` is a list of objects that have these fields."""
    return isinstance(value, list) and all(isinstance(entry, Mapping) and set(names) <= set(entry) for entry in value)


# Rows of records.


def _shape(first: Record) -> str:
    """rows, alpaca, documents, lamp or longlamp, by the fields of the first record."""
    where, _, record = first
    names = set(record)
    shape = shape_of(names)
    if shape is not None:
        return shape
    raise DataError(
        f"{where}: the fields {', '.join(sorted(names))} fit no known shape. Rows have user, profile, prompt and "
        "completion (or messages, conversations, or instruction, input and output); "
        "documents have user, query, text; rename with data.columns: {completion: answer}"
    )
