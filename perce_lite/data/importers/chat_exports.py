"""Chats in the exports of messengers and assistants, read from JSON or tables: whoever a message names wrote it."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from perce_lite.data.importers.chat_marks import FORWARDED, SERVICE, without_marks
from perce_lite.data.importers.chat_texts import written_date
from perce_lite.data.importers.chats import Chat, Message, clean_name
from perce_lite.data.importers.writings import date_of, tidy

TEXTS = ("text", "content", "message", "body", "value", "contents")
DATES = ("date", "create_time", "created_at", "timestamp", "timestamp_ms", "time", "ts", "datetime", "created")
"""Fields of a message, as exports call them."""

_AUTHORS = (
    "from", "author", "sender", "sendername", "username", "user", "name", "role", "speaker", "authorname",
    "senderid", "fromname", "creator", "nickname", "nick", "screenname", "displayname", "handle", "fromid",
    "authorid", "userid", "postedby", "participant", "member", "contactname", "contact", "writer", "fromuser",
    "useremail", "fromemail", "absender", "von", "autor", "auteur", "expediteur", "expéditeur", "remitente",
    "remetente", "mittente", "afzender", "отправитель", "автор", "от", "nadawca", "gönderen", "差出人", "送信者",
    "作者",
    "发送者", "发件人", "보낸사람", "작성자", "isfromme", "fromme", "outgoing", "issender", "direction",
)  # fmt: skip
"""Fields that say whose words a message is, in small letters alone."""

_TEXTS = (
    *TEXTS, "chatmessage", "comment", "fulltext", "messagetext", "messagebody", "msg", "textcontent", "fragments",
    "nachricht", "mensaje", "mensagem", "messaggio", "bericht", "сообщение", "текст", "wiadomość", "mesaj", "内容",
    "消息", "メッセージ", "메시지", "내용",
)  # fmt: skip
_DATES = (
    "createdate",
    "createddate",
    "createtime",
    "createdat",
    "timestampms",
    "originserverts",
    "originalarrivaltime",
    "insertedat",
    "sentat",
    "datesent",
    "datum",
    "fecha",
    "data",
    *DATES,
)
_IDS, _THREADS = ("id", "messageid", "eventid", "ts"), ("threadts", "topicid", "threadid")
_REPLIES = ("replytomessageid", "replytoid", "replyto", "inreplyto", "reference", "quotedmessageid")
"""Fields that name a message, the thread that it is in, and the message that it replies to."""

_WRAPPERS = (
    "message",
    "messagecreate",
    "response",
    "tweet",
    "comment",
    "node",
    "data",
    "post",
    "dmmessage",
    "chatmessage",
)
_TELEGRAM_FORWARDS = ("forwardedfrom", "forwardedfromid", "savedfrom")
"""Present and empty where the account that wrote it is gone."""
_FORWARDS = (
    "forwardedfrommessage",
    "fwdfrom",
    "forwardfrom",
    "forwardorigin",
    "forwardsendername",
    "forwardedmessage",
    "viabot",
    "forwarddate",
    "messagesnapshots",
)
_FORWARD_FLAGS = (
    "forwarded",
    "isforwarded",
    "isforward",
    "forward",
    "isreshare",
    "forwardingscore",
    "forwardscore",
    "timesforwarded",
)
_FLAGS = ("isfromme", "fromme", "outgoing", "issender", "isoutgoing", "sentbyme", "direction")
_OUTGOING = ("true", "1", "yes", "outgoing", "out", "sent")
_HIDDEN = ("isvisuallyhiddenfromconversation", "isunsent", "deleted", "isdeleted", "istrashed")
_SERVICE = re.compile(
    r"service|system|join|leave|left|\bpin|pinned|\bcall|boost|thread(?!_broadcast)|recipient|event|activity|notification|"
    r"channel_|group_|bot_message|bot_add|unsubscribe|reminder|tombstone|poll|^add|^remove|member|topic|reaction|sticker|forward",
    re.I,
)


def chats_in(node: Any, source: str, depth: int = 0) -> Iterator[Chat]:
    """Every chat in `node`, an export read from JSON: wherever there is a list of messages that name who wrote them."""
    if depth > 12:
        return
    if isinstance(node, Mapping) and isinstance(node.get("mapping"), Mapping):
        node = list(_branch(node))
    if isinstance(node, list) and node:
        chat = _chat(node, source)
        if chat is not None:
            yield chat
            return
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    within = [chat for child in inner for chat in chats_in(child, source, depth + 1)]
    single = _chat([node], source) if isinstance(node, Mapping) and not within else None
    yield from within if single is None else [single]


def _chat(records: Sequence[Any], source: str) -> Chat | None:
    """The chat that a list of records is; None where they do not say who wrote what."""
    unwrapped = [fields for fields in map(_unwrapped, records) if fields is not None]
    if not unwrapped or _are_titled(unwrapped):
        return None
    kept, left_out = [], []
    for record in unwrapped:
        message, reason = _read(record)
        if message is not None:
            kept.append(message)
        else:
            left_out.append(str(reason))
    if all(entry.date for entry in kept):
        kept.sort(key=lambda entry: entry.date or "")  # some exports have the newest first
    return Chat(source, tuple(kept), tuple(left_out))


def _are_titled(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `name` is what each text is called, not who wrote it: no two are alike, and longer than names."""
    if any(record.get(field) for record in records for field in _AUTHORS if field != "name"):
        return False
    names = [str(record.get("name")) for record in records]
    return len(set(names)) == len(names) and sum(len(name.split()) for name in names) > 2 * len(names)


def _branch(conversation: Mapping[str, Any]) -> Iterator[Any]:
    """ChatGPT's tree of messages: the branch that was left standing, from its root on."""
    tree = conversation["mapping"]
    parents = [node.get("parent") for node in tree.values() if isinstance(node, Mapping)]
    leaf = conversation.get("current_node") or next((name for name in reversed(tree) if name not in parents), None)
    path: list[Any] = []
    while (
        isinstance(leaf, str) and isinstance(tree.get(leaf), Mapping) and len(path) <= len(tree)
    ):  # a broken export may turn in a circle
        path.append(tree[leaf].get("message"))
        leaf = tree[leaf].get("parent")
    return reversed(path)


def _plain(name: Any) -> str:
    """A field's name in small letters, without what stands between its words."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def _unwrapped(record: Any, depth: int = 0) -> dict[str, Any] | None:
    """The fields of a message by their plain names; of the one inside, where it is wrapped; None: not a message."""
    if not isinstance(record, Mapping) or depth > 2:
        return None
    fields = {_plain(name): value for name, value in record.items()}
    fragments = fields.get("fragments")
    if isinstance(fragments, list) and fragments and all(isinstance(part, Mapping) for part in fragments):  # DeepSeek
        return {
            **fields,
            "role": "user" if fragments[0].get("type") == "REQUEST" else "assistant",
            "fragments": fragments,
        }
    if _says(fields):
        return fields
    inner = (_unwrapped(fields.get(name), depth + 1) for name in _WRAPPERS)
    return next((message for message in inner if message is not None), None)


def _says(fields: Mapping[str, Any]) -> bool:
    return bool(_author(fields)) and any(flat(fields.get(name)).strip() for name in _TEXTS)


def _author(fields: Mapping[str, Any]) -> str:
    """Who wrote a message; "me" where it only says that it was sent."""
    flag = next((str(fields[name]).lower() for name in _FLAGS if fields.get(name) is not None), None)
    if flag in _OUTGOING or str(fields.get("type")).lower() in ("outgoing", "sent"):
        return "me"
    author = next((name for key in _AUTHORS if key not in _FLAGS and (name := _name(fields.get(key)))), "")
    return author or ("them" if flag is not None or str(fields.get("type")).lower() in ("incoming", "received") else "")


def _read(fields: Mapping[str, Any]) -> tuple[Message | None, str | None]:
    """The message of some fields, or the reason why it is nobody's words."""
    if _is_forwarded(fields):
        return None, FORWARDED
    kinds = [
        str(fields[name])
        for name in ("type", "subtype", "messagetype", "msgtype", "kind")
        if isinstance(fields.get(name), str)
    ]
    metadata = {_plain(name): value for name, value in _mapping(fields.get("metadata")).items()}
    if any(_SERVICE.search(kind) for kind in kinds) or any(
        (metadata.get(name) or fields.get(name)) is True for name in _HIDDEN
    ):
        return None, SERVICE
    author = _author(fields)
    text = next((body for name in _TEXTS if (body := flat(fields.get(name))).strip()), "")
    text = _slack(text) if re.fullmatch(r"[UWB][A-Z0-9]{2,}", str(fields.get("user"))) else text
    of_meta = "sendername" in fields and "timestampms" in fields
    if of_meta and " " in author and text.startswith(f"{author} "):
        text = ""  # "Ann Bell named the group Boats."
    shown, reason = without_marks(tidy_marks(text), of_meta)
    if not shown:
        return None, reason or SERVICE
    date = next((day for name in _DATES if fields.get(name) and (day := _date(fields[name]))), None)
    keys = tuple(str(fields[name]) for name in (*_IDS, *_THREADS) if _is_key(fields.get(name)))
    return Message(author, tidy(shown), date, keys, _replies_to(fields)), None


def _is_forwarded(fields: Mapping[str, Any]) -> bool:
    if any(name in fields for name in _TELEGRAM_FORWARDS) or any(fields.get(name) for name in _FORWARDS):
        return True
    return any(str(fields.get(name) or "0").lower() not in ("0", "false", "none", "no") for name in _FORWARD_FLAGS)


def tidy_marks(text: str) -> str:
    """`text` with \\n as line break; marks of direction stay."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _date(value: Any) -> str | None:
    """The date of a message: see `date_of`; that in {"$date": ...}; one in words."""
    moment = next(iter(value.values()), None) if isinstance(value, Mapping) else value
    return date_of(moment) or (written_date(moment) if isinstance(moment, str) else None)


def _is_key(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _replies_to(fields: Mapping[str, Any]) -> str | None:
    """The key of the message, or of the thread, that a message replies to."""
    content = {_plain(name): value for name, value in _mapping(fields.get("content")).items()}
    relation = {_plain(name): value for name, value in _mapping(content.get("mrelatesto")).items()}
    places = [fields.get(name) for name in _REPLIES] + [relation.get("minreplyto")]
    named = [_replied_id(place) for place in places] + [fields.get(name) for name in _THREADS]
    return next((str(key) for key in named if _is_key(key)), None)


def _replied_id(place: Any) -> Any:
    """The id in "17", or in {"messageId": "17"} (Discord), {"event_id": "17"} (Matrix)."""
    if not isinstance(place, Mapping):
        return place
    inner = {_plain(name): value for name, value in place.items()}
    return next((inner[name] for name in _IDS if _is_key(inner.get(name))), None)


def _slack(text: str) -> str:
    """Slack's text with names of channels and links as they are shown."""
    text = re.sub(r"<(?:[#@!])[^<>|]*\|([^<>]+)>", r"\1", text)
    text = re.sub(r"<(?:https?|mailto):[^<>|]*\|([^<>]+)>", r"\1", text)
    text = re.sub(r"<((?:https?|mailto):[^<>|]*)>", r"\1", text)
    return html.unescape(re.sub(r"<[@!]([^<>|]*)>", r"@\1", text))


def _name(value: Any) -> str:
    if isinstance(value, Mapping):  # {"role": "user"}, {"username": "ann"}
        keys = (
            "name",
            "username",
            "login",
            "role",
            "displayname",
            "fullname",
            "emailaddress",
            "email",
            "address",
            "gaiaid",
            "id",
            "user",
            "emailAddress",
            "displayName",
        )
        fields = {_plain(name): inner for name, inner in value.items()}
        return next((name for key in keys if (name := _name(fields.get(key)))), "")
    return clean_name(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) and value else ""


_PIECES = ("parts", "text", "body", "content", "messagecontent", "segment", "segments")


def flat(value: Any, depth: int = 0) -> str:
    """The text of a message: a text, a list of texts and of {text} as Telegram's, or {parts} as ChatGPT's."""
    if depth > 8:
        return ""
    if isinstance(value, Mapping):
        if value.get("type") in ("blockquote", "thinking", "tool_use", "tool_result", "THINK"):
            return ""  # another's words, and what nobody said
        fields = {_plain(name): inner for name, inner in value.items()}
        return next((text for name in _PIECES if (text := flat(fields.get(name), depth + 1))), "")
    if isinstance(value, list):
        return "".join(flat(piece, depth + 1) for piece in value)
    return value if isinstance(value, str) else ""


_USED = {
    *_AUTHORS, *_TEXTS, *_DATES, *_IDS, *_THREADS, *_REPLIES, *_WRAPPERS, *_TELEGRAM_FORWARDS, *_FORWARDS,
    *_FORWARD_FLAGS, *_FLAGS, *_HIDDEN,
    "type", "subtype", "messagetype", "msgtype", "kind", "metadata",
}  # fmt: skip


def slimmed(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a large export less what is not read: of a tree its branch, of a message its fields."""
    if isinstance(record.get("mapping"), Mapping):
        return {"messages": [message for message in _branch(record) if message is not None]}
    fields = {_plain(name): value for name, value in record.items()}
    return {name: value for name, value in record.items() if _plain(name) in _USED} if _says(fields) else record


# Meta's exports


def without_mojibake(value: Any) -> Any:
    """`value`, read from JSON, with all texts and names mended where it is Meta's: UTF-8 written as Latin-1.

    It is Meta's where every text that is not ASCII is such; in a text that was cut, the torn letter is dropped.
    """
    texts = [text for text in _texts(value) if not text.isascii()]
    mended = {text: _from_latin_1(text) for text in texts}
    torn = {text: _from_latin_1(_TORN.sub(r"\1", text)) for text, right in mended.items() if not right}
    is_metas = any(mended.values()) and all(torn.values())
    return _replaced(value, {**mended, **torn}) if is_metas else value


_TORN = re.compile("(?:[\xc2-\xf4]|[\xe0-\xf4][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2})(\\.\\.\\.|)$")
"""The first bytes of a letter at a text's end."""


def _from_latin_1(text: str) -> str:
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _replaced(value: Any, by: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return by.get(value, value)
    if isinstance(value, Mapping):
        return {by.get(str(name), name): _replaced(inner, by) for name, inner in value.items()}
    return [_replaced(inner, by) for inner in value] if isinstance(value, list) else value


# People that an export names by an id


def people_in(value: Any) -> dict[str, tuple[str, ...]]:
    """The names of people by their id, in a list of people as Slack's users.json; empty where it is none."""
    if (
        not isinstance(value, list)
        or not value
        or any(not isinstance(person, Mapping) or "id" not in person for person in value)
    ):
        return {}
    people = {}
    for record in value:
        profile = _mapping(record.get("profile"))
        keys = ("real_name", "full_name", "display_name", "name", "username")
        names = [
            clean_name(str(place[key]))
            for key in keys
            for place in (profile, record)
            if isinstance(place.get(key), str)
        ]
        if not any(names) or any(flat(record.get(name)) for name in TEXTS):
            return {}
        people[str(record["id"])] = tuple(dict.fromkeys(filter(None, names)))
    return people


def renamed(chats: Sequence[Chat], people: Mapping[str, tuple[str, ...]]) -> list[Chat]:
    """The chats with ids in texts (@U01ANN) replaced by names."""
    if not people:
        return list(chats)
    pattern = re.compile("@(" + "|".join(map(re.escape, sorted(people, key=len, reverse=True))) + r")\b")

    def named(message: Message) -> Message:
        return replace(message, text=pattern.sub(lambda match: f"@{people[match[1]][0]}", message.text))

    return [replace(chat, messages=tuple(map(named, chat.messages))) for chat in chats]
