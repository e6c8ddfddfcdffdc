"""Rows: one response of one user, with the user's profile; made from records in every known naming."""

import functools
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

from perce_lite.data.retrieval import History, Item
from perce_lite.errors import DataError
from perce_lite.files import digest
from perce_lite.recipe import Profile, Split

Message = dict[str, Any]
"""`role` and `content`, and what a chat template reads beside them: `MESSAGE_FIELDS`."""

MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""Fields of a message that go to the chat template."""

SCORED_FIELDS = ("content", "tool_calls", "reasoning_content", "thinking")
"""Fields by which an assistant turn says something."""

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
}
"""Names of the speakers in `conversations` of {from, value}."""

Profiled = str | tuple[Item, ...]

SPLIT_NAMES = ("train", "validation", "test", "unseen")
"""Splits that a row can end up in."""

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names that data sets give their splits."""


def split_name(value: Any, where: str) -> str | None:
    """`value` as train, validation or test; None for an empty one.

    Raises:
        DataError: a name that is none of `SPLITS`: guessing could put held-out rows into training.
    """
    if value is None or value == "":
        return None
    name = SPLITS.get(str(value).strip().lower())
    if name is None:
        raise DataError(f"{where}: split {value!r} is not one of {', '.join(SPLITS)}")
    return name


def user_name(value: Any) -> str:
    """The user as a text; "all" where the data names nobody."""
    return "all" if value is None else str(value)


def user_of(record: Mapping[str, Any], shape: str) -> str:
    """The user of a record; `shape`: rows, documents, lamp or longlamp."""
    if shape not in ("lamp", "longlamp"):
        return user_name(record.get("user"))
    names = (record.get(key) for key in ("user_id", "name", "reviewerId", "author", "id"))
    return user_name(next((name for name in names if name not in (None, "")), None))


def cohort_name(record: Mapping[str, Any]) -> str | None:
    """The record's cohort as a text; None where it names none."""
    return None if record.get("cohort") is None else str(record["cohort"])


def is_held_out(record: Mapping[str, Any]) -> bool:
    """Whether the record's user is to be held out of training: `user_held_out` is true, 1, or says so."""
    return str(record.get("user_held_out")).strip().lower() in ("true", "1", "yes")


@dataclass(frozen=True)
class Row:
    """One example.

    where: "people.jsonl, line 12": how errors name it
    profile: a text, or items with the most relevant first
    prompt: messages ahead of the first response
    completion: the response as messages; every assistant turn in it is scored
    split: train, validation, test, unseen (of a user whom training never meets), or None where the data does not say
    unseen_user: the data holds this user out of training
    template_options: what goes to the chat template beside the messages: `tools`, and the row's own keyword arguments
    part_of: the text of which this is a part, for a document that was cut into several; else None
    """

    where: str
    user: str
    profile: Profiled
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    split: str | None = None
    cohort: str | None = None
    unseen_user: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    part_of: str | None = None

    @property
    def query(self) -> str:
        """The last user message ahead of the first scored turn."""
        queries = [content_of(message) for message in self.prompt if message["role"] == "user"]
        if queries:
            return queries[-1]
        return next((content_of(message) for message in self.completion if message["role"] == "user"), "")

    @property
    def characters(self) -> int:
        """Length of profile, prompt and completion: about that of the row in tokens, to compare rows by."""
        texts = [item.title + item.text for item in items_of(self.profile)]
        texts += [content_of(message) for message in (*self.prompt, *self.completion)]
        return sum(map(len, texts))

    def fingerprint(self) -> str:
        """Equal for rows of equal content."""
        content = [self.user, self.profile, self.prompt, self.completion, self.split, self.cohort]
        return digest([*content, self.template_options] if self.template_options else content)


def content_of(message: Message) -> str:
    """A message's text; "" where it has tool calls alone."""
    return message.get("content") or ""


def says_something(message: Message) -> bool:
    """Whether an assistant turn holds a text, a thought or a tool call; one that does not carries no loss."""
    values = (message.get(name) for name in SCORED_FIELDS)
    return any(value.strip() if isinstance(value, str) else value for value in values)


def items_of(profile: Profiled) -> tuple[Item, ...]:
    """The items of a profile; a text is one item without a title."""
    return (Item("", profile),) if isinstance(profile, str) else profile


def written(row: Row) -> list[str]:
    """The texts of a row's scored turns."""
    return [content_of(message) for message in row.completion if message["role"] == "assistant"]


def of_split(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of one split, in order."""
    return [row for row in rows if row.split == name]


def spread_over_users(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, taken from each user in turn."""
    by_user: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_user[row.user].append(row)
    turns = itertools.zip_longest(*by_user.values())
    return [row for turn in turns for row in turn if row is not None][:count]


class Splittable(Protocol):
    """What a split looks at of a row; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def user(self) -> str: ...
    @property
    def split(self) -> str | None: ...
    @property
    def unseen_user(self) -> bool: ...
    @property
    def part_of(self) -> str | None: ...
    def fingerprint(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Splittable)


def split_rows(rows: Sequence[AnyRow], split: Split, source: str = "the data", otherwise: str = "row") -> list[AnyRow]:
    """Gives every row a split: the data's own where it has one, else a seeded one.

    By row, a row's split depends on that row alone. Rows of users whom training must not meet become `unseen`:
    all of them, or by time the test rows alone. `otherwise` is what `by: auto` means where the data has none; "time"
    holds out the last rows of each user, so that no held-out text stands in a profile that was trained on; the parts of
    one text stay together, and count as one.
    """
    has_split = any(row.split for row in rows)
    by = split.by if split.by != "auto" else "given" if has_split else otherwise
    if by == "given":
        if not has_split:
            raise DataError(f"split.by: given, but {source} has no split of its own; use row, user or time")
        named = [row if row.split else replace(row, split="train") for row in rows]
        return _hold_out_users(named, split, tests_alone=True)
    groups: list[list[list[int]]]  # each group is cut into test, validation, train; a unit stays whole
    by_user: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_user[row.user].append(index)
    if by == "row":
        return _hold_out_users(_each_by_its_own(rows, split), split, tests_alone=False)
    if by == "time":
        groups = [_whole_texts(rows, indices) for indices in by_user.values()]
    else:
        users = [by_user[user] for user in sorted(by_user)]
        random.Random(split.seed).shuffle(users)
        groups = [users]
    name_of = {}
    for group in groups:
        tests, validations = round(split.test * len(group)), round(split.validation * len(group))
        for position, unit in enumerate(group):
            name = "test" if position < tests else "validation" if position < tests + validations else "train"
            name_of.update(dict.fromkeys(unit, name))
    named = [replace(row, split=name_of[index]) for index, row in enumerate(rows)]
    return _hold_out_users(named, split, tests_alone=by == "time")


def _whole_texts(rows: Sequence[AnyRow], indices: Sequence[int]) -> list[list[int]]:
    """A user's rows, the last first, with the parts of one text as one unit."""
    units: dict[tuple[str, str | int], list[int]] = defaultdict(list)
    for index in reversed(indices):
        whole = rows[index].part_of
        units[("row", index) if whole is None else ("parts of", whole)].append(index)
    return list(units.values())


def _each_by_its_own(rows: Sequence[AnyRow], split: Split) -> list[AnyRow]:
    """Every row by a number made of its content: a new row moves no other one from held out to trained, or back.

    The shares come out about as asked for. Where chance leaves none for a share, the row nearest to it is taken.
    """
    places = [_place(split.seed, row.fingerprint()) for row in rows]
    names = [
        "test" if place < split.test else "validation" if place < split.test + split.validation else "train"
        for place in places
    ]
    nearest = sorted(range(len(rows)), key=places.__getitem__)
    for name, share in (("test", split.test), ("validation", split.validation)):
        left = [index for index in nearest if names[index] == "train"]
        if share * len(rows) >= 0.5 and name not in names and left:
            names[left[0]] = name
    return [replace(row, split=name) for row, name in zip(rows, names, strict=True)]


def _place(seed: int, text: str) -> float:
    """A number in 0 .. 1 that is as good as random."""
    return int(digest([seed, text])[:12], 16) / 16**12


def _hold_out_users(rows: list[AnyRow], split: Split, tests_alone: bool) -> list[AnyRow]:
    """The rows of unseen users, the data's own or a seeded share of all, become `unseen` or are left out."""
    users = sorted({row.user for row in rows})
    unseen = {row.user for row in rows if row.unseen_user}
    if not unseen:
        unseen = set(random.Random(split.seed).sample(users, round(split.unseen_users * len(users))))
    return [
        replace(row, split="unseen") if row.user in unseen else row
        for row in rows
        if row.user not in unseen or row.split == "test" or not tests_alone
    ]


def swap_profiles(rows: Sequence[Row], seed: int = 0, pool: Sequence[Row] | None = None) -> list[Row]:
    """Each row with the profile of a random row of another user in `pool` (default: `rows`): a control.

    Rows that cannot be given one (a single user) are left out.
    """
    chooser = random.Random(seed)
    swapped = []
    for row in rows:
        others = [other for other in (rows if pool is None else pool) if other.user != row.user and other.profile]
        if others:
            swapped.append(replace(row, profile=chooser.choice(others).profile))
    return swapped


def from_columns(record: Mapping[str, Any], where: str) -> Row:
    """A row of a TRL data set: `profile`, and `prompt` with `completion`, or `messages`; `user` where there is one.

    `conversations` and Alpaca's columns are read as in files; `tools` and `chat_template_kwargs` go to the template.

    Raises:
        DataError: a column that is missing or of the wrong shape; `where` is named.
    """
    shape = "alpaca" if shape_of(record) == "alpaca" else "rows"
    return from_record(record, str(record.get("where") or where), None, shape, None)


def to_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as records for JSON, which `from_columns` reads back; a text profile stays a text."""

    def plain(profile: Profiled) -> str | list[dict[str, str]]:
        return profile if isinstance(profile, str) else [{"title": item.title, "text": item.text} for item in profile]

    return [
        {
            "where": row.where,
            "user": row.user,
            "profile": plain(row.profile),
            "prompt": list(row.prompt),
            "completion": list(row.completion),
            **_option_columns(row.template_options),
        }
        for row in rows
    ]


def _option_columns(options: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = {name: value for name, value in options.items() if name != "tools"}
    columns = {"tools": options.get("tools"), "chat_template_kwargs": kwargs}
    return {name: value for name, value in columns.items() if value}


# Rows from records

NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
"""Columns that a text model cannot be shown."""

DIALOGUES = ("messages", "conversations", "conversation")
"""Columns that hold a whole dialogue."""

_ALPACA_RESPONSES, _ALPACA_INPUTS = ("output", "response"), ("input", "context")


def shape_of(names: Collection[str]) -> str | None:
    """rows, alpaca, documents, lamp or longlamp, by the fields of a record; None where they fit none."""
    if "completion" in names or any(name in names for name in DIALOGUES):
        return "rows"
    if "instruction" in names and any(name in names for name in _ALPACA_RESPONSES):
        return "alpaca"
    if "input" in names and "output" in names:
        return "lamp" if "id" in names else "longlamp"
    return "documents" if "text" in names else None


def from_record(record: Mapping[str, Any], where: str, split: str | None, shape: str, rule: Profile | None) -> Row:
    """The row of a record.

    shape: rows, alpaca, lamp or longlamp
    rule: chooses among the profile items; None: all are kept

    Raises:
        DataError: a column that is missing or of the wrong shape; `where` is named.
    """
    if shape in ("lamp", "longlamp"):
        if record.get("instruction"):
            raise DataError(f"{where}: has an instruction, which {shape} would lose; set data.format: alpaca")
        record = {**record, "prompt": record.get("input"), "completion": record.get("output")}
    elif shape == "alpaca":
        record = {**record, **_of_alpaca(record, where)}
    if seen := [name for name in NOT_TEXT if record.get(name)]:
        raise DataError(f"{where}: {', '.join(seen)}: text alone is trained on; leave such rows out")
    prompt, completion = _conversation(record, where)
    row = Row(
        where=where,
        user=user_of(record, shape),
        profile=profile_of(record.get("profile"), where),
        prompt=prompt,
        completion=completion,
        split=split_name(record.get("split"), where) or split,
        cohort=cohort_name(record),
        unseen_user=is_held_out(record),
        template_options=_template_options(record, where),
    )
    if rule is None or isinstance(row.profile, str):
        return row
    return replace(row, profile=tuple(_history(row.profile).choose(row.query, rule.select, rule.top_k)))


def _conversation(record: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and completion as messages; a dialogue is cut ahead of its first assistant turn."""
    dialogue = next((name for name in DIALOGUES if record.get(name) is not None), None)
    if dialogue is not None:
        if isinstance(record[dialogue], str):  # of a text it is not known who says what
            raise _no_messages(record[dialogue], dialogue, where)
        messages = messages_of(record[dialogue], dialogue, "user", where)
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        prompt, completion = messages[:first], messages[first:]
    else:
        prompt = messages_of(record.get("prompt"), "prompt", "user", where)
        completion = messages_of(record.get("completion"), "completion", "assistant", where)
    if not prompt:
        raise DataError(f"{where}: no prompt: nothing is said ahead of the response")
    return prompt, completion


def _of_alpaca(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Prompt and completion of {instruction, input, output}, the input below the instruction."""
    response = next(record[name] for name in _ALPACA_RESPONSES if name in record)
    texts = [str(record[name]).strip() for name in ("instruction", *_ALPACA_INPUTS) if record.get(name)]
    if not texts:
        raise DataError(f"{where}: neither instruction nor input: nothing is said ahead of the response")
    return {"prompt": "\n\n".join(texts), "completion": response}


def _template_options(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns `tools` (a list, or JSON of one) and `chat_template_kwargs`, as TRL documents them."""
    options: dict[str, Any] = {}
    for name, kind in (("chat_template_kwargs", Mapping), ("tools", Sequence)):
        value = record.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise DataError(f"{where}: {name} is no JSON: {error}") from error
        if value is None or value == []:
            continue
        if not isinstance(value, kind):
            form = "a list of tools" if name == "tools" else "an object"
            raise DataError(f"{where}: {name} is {form}, or JSON of one; this is {str(value)[:60]!r}")
        options.update({"tools": _present(value)} if name == "tools" else _present(value))
    return options


def _present(value: Any) -> Any:
    """`value` without fields that are None: Arrow gives every record the fields of all."""
    if isinstance(value, Mapping):
        return {str(name): _present(inner) for name, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list | tuple) else value


def messages_of(value: Any, column: str, role: str, where: str) -> tuple[Message, ...]:
    """Messages of a text, which `role` says, or of a list of messages; raises DataError, which names `column`."""
    if value is None:
        raise DataError(f"{where}: no {column}; rename yours with data.columns.{column}=YOUR_COLUMN")
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        return tuple(_message(message, column, where) for message in value)
    raise _no_messages(value, column, where)


def _no_messages(value: Any, column: str, where: str) -> DataError:
    return DataError(
        f"{where}: {column} is a text, or a list of messages such as {{role: user, content: a text}}; "
        f"this is {str(value)[:60]!r}"
    )


def _message(given: Mapping[str, Any], column: str, where: str) -> Message:
    """A message as chat templates take it, of {role, content, ...} or ShareGPT's {from, value}.

    Raises:
        DataError: a field that no chat template is given, content that is not text; named.
    """
    message = {name: value for name, value in given.items() if value is not None}
    if "role" not in message and {"from", "value"} <= set(message):
        speaker = str(message.pop("from"))
        message = {"role": SHAREGPT_ROLES.get(speaker, speaker), "content": message.pop("value"), **message}
    if "role" not in message or not ("content" in message or message.get("tool_calls")):
        raise _no_messages([dict(given)], column, where)
    unknown = [name for name in message if name not in MESSAGE_FIELDS]
    if unknown:
        raise DataError(
            f"{where}: {column} has a message with {', '.join(map(repr, unknown))}, which would not be trained on. "
            f"Fields of a message are {', '.join(MESSAGE_FIELDS)}; rename or remove the others."
        )
    content = message.get("content")
    if isinstance(content, list):
        content = _text_of_parts(content, column, where)
    texts = [("content", content), *((name, message.get(name)) for name in ("reasoning_content", "thinking", "name"))]
    for name, text in texts:
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: {column} has a message whose {name} is not a text: {str(text)[:60]!r}")
    return {**_present(message), "role": str(message["role"]), **({} if content is None else {"content": content})}


def _text_of_parts(parts: Sequence[Any], column: str, where: str) -> str:
    """The text of content in parts ({type: text, text: ...})."""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if any(not isinstance(text, str) for text in texts):
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in parts} - {
            "text"
        }
        raise DataError(
            f"{where}: {column} has content of the kind {', '.join(sorted(kinds))}; text alone is trained on"
        )
    return "".join(str(text) for text in texts)


@functools.lru_cache(maxsize=32)
def _history(items: tuple[Item, ...]) -> History:
    """Rows of one user often carry the same profile items: their index is built once."""
    return History(items)


_TEXTS = ("text", "abstract", "reviewText", "content", "description", "output")
_TITLES = ("title", "summary", "input")
_MARKS = ("tag", "score", "overall", "category", "rating")


def profile_of(value: Any, where: str) -> Profiled:
    """A profile as a text or as items, in the field names of rows, LaMP and LongLaMP."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, Sequence):
        raise DataError(f"{where}: profile is a text or a list of items, this is {type(value).__name__}")
    items = []
    for entry in value:
        if isinstance(entry, str):
            title, text = "", entry
        elif isinstance(entry, Mapping):
            text = next((str(entry[key]) for key in _TEXTS if entry.get(key)), "")
            titles = [str(entry[key]) for key in _TITLES if entry.get(key)][:1]
            title = " | ".join(titles + [f"{key} {entry[key]}" for key in _MARKS if entry.get(key) is not None])
        else:
            raise DataError(f"{where}: a profile item is a text or an object with title and text, this is {entry!r}")
        if title.strip() or text.strip():
            items.append(Item(title.strip(), text.strip()))
    return tuple(items)
