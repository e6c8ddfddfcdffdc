"""Planted files of every kind that `perce-lite import` reads, each holding known words of known people."""

import json
from email.message import EmailMessage
from pathlib import Path

from perce_lite.data.importers.archives import files_of
from perce_lite.data.importers.reading import Reader
from perce_lite.data.importers.writings import Notes, Writing

WORDS = "kettle harbour lantern biscuit anchor meadow pebble thunder velvet walnut compass mitten saddle tulip".split()


def prose(number: int, words: int = 12) -> str:
    """A sentence of `words` words that no other number gives."""
    said = [WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(words - 1)]
    return f"Entry{number} {' '.join(said)}."


def mail(sender: str, subject: str, body: str, day: int = 1, html: str | None = None, **more: str) -> EmailMessage:
    """A mail of May 2024."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = sender, "Bob <bob@example.org>", subject
    message["Date"] = f"{day:02d} May 2024 10:15:00 +0200"
    if body:
        message.set_content(body, **more)
    if html is not None and body:
        message.add_alternative(html, subtype="html")
    elif html is not None:
        message.set_content(html, subtype="html")
    return message


def mbox(*mails: EmailMessage, line_end: bytes = b"\n") -> bytes:
    """The mails as one mailbox; a line of a body that starts with From is written as >From, as mail programs do."""
    whole = []
    for one in mails:
        head, _, body = one.as_bytes().partition(b"\n\n")
        body = body.replace(b"\nFrom ", b"\n>From ")
        whole.append(b"From ann@example.org Wed May  1 10:15:00 2024\n" + head + b"\n\n" + body + b"\n")
    return b"".join(whole).replace(b"\n", line_end)


def chatgpt(turns: int = 4) -> list[dict]:
    """ChatGPT's conversations.json: a tree with a branch that was left, the person as `user`."""
    nodes: dict = {"root": {"message": None, "parent": None, "children": ["n0"]}}
    parent = "root"
    for number in range(2 * turns):
        role = ("user", "assistant")[number % 2]
        content = {"content_type": "text", "parts": [prose(number)]}
        message = {"author": {"role": role, "name": None}, "content": content, "create_time": 1.7e9 + 9000 * number}
        nodes[f"n{number}"] = {"message": message, "parent": parent, "children": [f"n{number + 1}"]}
        parent = f"n{number}"
    left = {"author": {"role": "user"}, "content": {"parts": ["A question that was put otherwise later on"]}}
    nodes["left"] = {"message": left, "parent": "n1", "children": []}
    return [{"title": "A chat", "current_node": parent, "mapping": nodes}]


def telegram(first: int = 0) -> dict:
    """Telegram's result.json: Bob and Ann in turn from `first` on, after a service message; some texts in pieces."""
    service = {"id": 0, "type": "service", "actor": "Ann", "action": "create", "date": "2024-05-01T09:00:00"}
    messages: list[dict] = [service]
    for number in range(8):
        said = prose(first + number)
        text = said if number % 3 else [said, {"type": "bold", "text": " Indeed."}]
        head = {"id": number, "type": "message", "date": f"2024-05-01T{10 + number:02d}:00:00"}
        messages.append({**head, "from": ("Bob", "Ann")[number % 2], "text": text})
    return {"name": "Ann", "type": "personal_chat", "messages": messages}


def whatsapp(dates: list[str], form: str = "{date}, 10:15 - {who}: {text}") -> str:
    """A WhatsApp export: Bob and Ann in turn, one message a date."""
    lines = [
        form.format(date=date, who=("Bob", "Ann")[number % 2], text=prose(number)) for number, date in enumerate(dates)
    ]
    return "\n".join([form.partition("{who}")[0].format(date=dates[0]) + "Messages are end-to-end encrypted.", *lines])


def write(folder: Path, files: dict[str, str | bytes | list | dict]) -> Path:
    """Writes each file: texts in UTF-8, bytes as they are, anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(folder: Path, *me: str, senders: tuple[str, ...] = ()) -> tuple[list[Writing], Notes]:
    """All that `me` wrote in the files of a folder or a ZIP."""
    notes = Notes()
    reader = Reader(notes)
    reader.read(files_of(folder))
    return reader.of(senders, me), notes
