"""Chats: messages become turns, and a person's answers become writings."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from perce_lite.data.importers.chat_marks import INVISIBLE
from perce_lite.data.importers.writings import Notes, Writing, last_words, tidy
from perce_lite.errors import DataError

QUERY_WORDS = 40
"""Words of what was said before that stand in a query: an answer leans on the end of it."""

ASSISTANTS = {
    "assistant", "system", "tool", "model", "ai", "bot", "gpt", "chatgpt", "claude", "gemini", "copilot", "function",
    "developer",
}  # fmt: skip
PEOPLE = {"user", "human", "you"}
_PAUSE = timedelta(hours=1)


@dataclass(frozen=True)
class Message:
    """One message of a chat; `date` as in `Writing`.

    keys: what other messages call it by: its id, and the thread that it is in
    replies_to: the key of the message or the thread that it replies to, where the chat says so
    answered: the message of another person that it replies to; see `with_answered`
    """

    author: str
    text: str
    date: str | None = None
    keys: tuple[str, ...] = ()
    replies_to: str | None = None
    answered: "Message | None" = None


@dataclass(frozen=True)
class Chat:
    """A chat, its messages in the order of time.

    left_out: the reason of each message that holds nobody's words
    """

    source: str
    messages: tuple[Message, ...]
    left_out: tuple[str, ...] = ()


def clean_name(name: str) -> str:
    """A person's name as it is shown, without letters of no width and WhatsApp's mark of strangers."""
    return re.sub(r"^~\s*", "", " ".join(tidy(INVISIBLE.sub("", name)).split()))


def _key(name: str) -> str:
    """What is equal for two spellings of one name."""
    return unicodedata.normalize("NFKC", clean_name(name)).casefold()


def answers(
    chats: Sequence[Chat], me: Sequence[str], notes: Notes, aliases: Mapping[str, Iterable[str]] | None = None
) -> list[Writing]:
    """What one person wrote in the chats: each turn of theirs, its query the message that it replies to, where the chat
    says which, else what the others said since their last one.

    me: their names; in chats with an assistant it need not be given
    aliases: other names of the people whom an export names by an id

    Raises:
        DataError: nobody of that name, or several people and no name; says who is there.
    """
    shown, own_names = _people(chats, me, aliases or {})
    written = []
    for chat in chats:
        if not any(_key(message.author) in own_names for message in chat.messages):
            notes.skip("a chat without a message of the person", chat.source)
        before: list[Message] = []
        for number, turn in enumerate(turns(with_answered(chat.messages)), 1):
            if _key(turn.author) in own_names:
                where = f"{chat.source}, turn {number}"
                query = _said([turn.answered] if turn.answered is not None else before)
                written.append(Writing(turn.text, where, query=query, date=turn.date, kind="message"))
                before = []
            else:
                before.append(replace(turn, author=shown.get(turn.author, turn.author)))
    return written


def _people(
    chats: Sequence[Chat], me: Sequence[str], aliases: Mapping[str, Iterable[str]]
) -> tuple[dict[str, str], set[str]]:
    """The names by which authors are shown, and the keys of the authors that are the person."""
    wrote = Counter(message.author for chat in chats for message in chat.messages)
    names = {author: list(aliases.get(author, ())) for author in wrote}
    keys = {author: {_key(name) for name in (author, *names[author])} for author in wrote}
    shown = {author: next(iter(names[author]), author) for author in wrote}
    authors = {_key(author) for author in wrote}
    wanted = {_key(name) for name in me}
    if not wanted and authors & PEOPLE and authors <= PEOPLE | ASSISTANTS:
        return shown, PEOPLE
    known = set().union(*keys.values()) if keys else set()
    absent = [name for name in me if _key(name) not in known]
    if absent or (chats and not wanted):
        by_name: Counter[str] = Counter()
        for author, count in wrote.items():
            by_name[shown[author]] += count
        there = ", ".join(f"{author} ({count})" for author, count in by_name.most_common(10)) or "nobody"
        people = "one person" if len(by_name) == 1 else "several people"
        what = f"--me {absent[0]}: wrote nothing in these chats" if absent else f"these chats are of {people}"
        raise DataError(f"{what}. Say who is to be learned with --me NAME; in them, with their messages: {there}")
    return shown, {_key(author) for author in wrote if keys[author] & wanted}


def with_answered(messages: Sequence[Message]) -> list[Message]:
    """The messages, each with the one of another person that it replies to: the last one ahead of it of that key."""
    latest: dict[str, list[Message]] = defaultdict(list)  # by key: the last message, and the last of another author
    resolved = []
    for message in messages:
        others = [earlier for earlier in latest[message.replies_to or ""] if earlier.author != message.author]
        resolved.append(replace(message, answered=others[0] if others else None))
        for key in message.keys:
            latest[key] = [message, *(earlier for earlier in latest[key] if earlier.author != message.author)][:2]
    return resolved


def turns(messages: Sequence[Message]) -> list[Message]:
    """The messages, with those that one person sent in a row, within an hour of each other, made one.

    One that replies to another message than the last one did stands alone.
    """
    joined: list[Message] = []
    last: Message | None = None
    for message in messages:
        same = last is not None and message.answered in (None, joined[-1].answered)
        if last is not None and same and last.author == message.author and _soon(last, message):
            joined[-1] = replace(joined[-1], text=f"{joined[-1].text}\n{message.text}")
        else:
            joined.append(message)
        last = message
    return joined


def _soon(earlier: Message, later: Message) -> bool:
    if earlier.date is None or later.date is None:
        return True
    return datetime.fromisoformat(later.date) - datetime.fromisoformat(earlier.date) <= _PAUSE


def _said(before: Sequence[Message]) -> str:
    """The end of what others said, with names where several spoke."""
    several = len({turn.author for turn in before}) > 1
    return last_words(
        "\n".join(f"{turn.author}: {turn.text}" if several else turn.text for turn in before), QUERY_WORDS
    )
