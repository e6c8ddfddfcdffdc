"""What exports hold that is the person's own and names no author: posts of Facebook, Instagram and X, notes of Keep."""

import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from perce_lite.data.importers.writings import Notes, Writing, date_of, tidy

SIDE_FILES = {
    "ChatGPT": "shared_conversations message_feedback model_comparisons user user_settings sora shopping",
    "Claude": "users projects memories",
    "Slack": "channels groups dms mpims integration_logs canvases org_users huddle_transcripts",
    "Discord": "index channel audit-log guild",
    "Google": "myactivity group_info user_info watch-history search-history settings records "
    "timeline browserhistory labels",
    "Meta": "profile_information personal_information autofill_information friends your_friends followers following "
    "followers_1 notifications account_activity your_search_history liked_posts liked_comments saved_posts "
    "ads_interests",
}
"""Files of exports that hold nothing that a person wrote, by their names without .json."""

SIDE_FILE = "a side file of an export, which holds no texts of one's own"
_OF_NAME = {name for names in SIDE_FILES.values() for name in names.split()}


def is_side_file(name: str) -> bool:
    """Whether a file of this name (without folders) is known to hold nobody's texts."""
    stem, _, ending = name.lower().rpartition(".")
    return (ending in ("json", "jsonl") and stem in _OF_NAME) or name.lower() == "no-data.txt"


def posts_in(value: Any, source: str, notes: Notes) -> list[Writing]:
    """The posts and notes in a JSON file of Meta's or of Keep; empty where it is none."""
    if isinstance(value, Mapping) and isinstance(value.get("textContent"), str) and "isTrashed" in value:
        return list(_note(value, source, notes))
    records = (
        value if isinstance(value, list) else next(iter(value.values()), None) if isinstance(value, Mapping) else None
    )
    records = records if isinstance(records, list) else [value]
    return [post for number, record in enumerate(records, 1) for post in _post(record, f"{source}, post {number}")]


def _note(note: Mapping[str, Any], source: str, notes: Notes) -> Iterator[Writing]:
    if note["isTrashed"] is True:
        notes.skip("a note in the bin", source)
    elif len(note.get("sharees") or ()) > 1:
        notes.skip("a note that several people write", source)
    elif text := tidy(note["textContent"]):
        micros = note.get("createdTimestampUsec") or note.get("userEditedTimestampUsec")
        date = date_of(micros / 1e6) if isinstance(micros, int | float) else None
        yield Writing(text, source, tidy(str(note.get("title") or "")), date=date)


def _post(record: Any, source: str) -> Iterator[Writing]:
    """Facebook's {timestamp, data: [{post}]}; Instagram's {media: [{title, creation_timestamp}]}."""
    if not isinstance(record, Mapping):
        return
    data, media = record.get("data"), record.get("media")
    posts = (
        [entry["post"] for entry in data if isinstance(entry, Mapping) and isinstance(entry.get("post"), str)]
        if isinstance(data, list)
        else []
    )
    if isinstance(media, list) and all(isinstance(item, Mapping) and "creation_timestamp" in item for item in media):
        posts += [text for item in (record, *media) if isinstance(text := item.get("title"), str)][:1]
        record = {**media[0], **record} if media else record
    date = date_of(record.get("timestamp") or record.get("creation_timestamp"))
    yield from (Writing(tidy(text), source, date=date, kind="post") for text in posts if text.strip())


# X's archive: scripts that set window.YTD.NAME.part0 to a list

_SCRIPT = re.compile(r"\s*window\.(?:YTD\.(\w+)\.part\d+|__THAR_CONFIG)\s*=\s*")
_X_POSTS = ("tweet", "tweets", "community_tweet", "note_tweet")
X_SIDE_FILE = "a file of an X archive that holds no posts of one's own"
X_MESSAGES = "direct messages of an X archive, which are not read"


def script_of_x(script: str) -> tuple[str, Any] | None:
    """What a script of an X archive holds, tweets or another thing, and its records; None where it is no such script.

    Raises:
        ValueError: a script that is torn.
    """
    head = _SCRIPT.match(script)
    return None if head is None else (head[1] or "", json.loads(script[head.end() :].rstrip().rstrip(";")))


def posts_of_x(kind: str, records: Any, source: str, notes: Notes) -> list[Writing]:
    """The person's own posts in a script of an X archive; reposts and all else are noted."""
    if kind not in _X_POSTS or not isinstance(records, list):
        notes.skip(X_MESSAGES if "message" in kind else X_SIDE_FILE, source)
        return []
    posts = []
    for number, record in enumerate(records, 1):
        where = f"{source}, post {number}"
        inner = next(iter(record.values()), None) if isinstance(record, Mapping) and len(record) == 1 else record
        post, reason = _post_of_x(inner if isinstance(inner, Mapping) else {}, where)
        if post is not None:
            posts.append(post)
        else:
            notes.skip(reason, where)
    return posts


def _post_of_x(post: Mapping[str, Any], where: str) -> tuple[Writing | None, str]:
    """A post as its writer wrote it, or why it is left out."""
    core = post.get("core")
    text = str(
        post.get("full_text") or post.get("text") or (core.get("text") if isinstance(core, Mapping) else "") or ""
    )
    if text.startswith("RT @") or post.get("retweeted_status"):
        return None, "a repost on X"
    text = _with_links(text, post.get("entities"))
    if text.endswith("…"):
        return None, "a long post on X that is cut short; the whole of it is in note-tweet.js"
    if post.get("in_reply_to_status_id_str") or post.get("in_reply_to_user_id_str"):
        text = re.sub(r"^(?:@\w{1,15}\s+)+", "", text)
    body = tidy(html.unescape(text))
    date = date_of(post.get("created_at") or post.get("createdAt"))
    return (Writing(body, where, date=date, kind="post"), "") if body else (None, "a post on X without text")


def _with_links(text: str, entities: Any) -> str:
    """`text` with links as they were written in place of t.co's, and without those of pictures."""
    entities = entities if isinstance(entities, Mapping) else {}
    for kind in ("urls", "media"):
        for link in entities.get(kind) or ():
            if isinstance(link, Mapping) and link.get("url"):
                text = text.replace(str(link["url"]), "" if kind == "media" else str(link.get("expanded_url") or ""))
    return re.sub(r"\s*https://t\.co/\w+\s*$", "", text).strip()
