"""Kinds of files that hold writing and are not read: recognised, and refused with what to convert them to."""

from pathlib import PurePosixPath

from perce_lite.data.importers.archives import Found

_DOCX = "save it as DOCX or text"
_BY_ENDING = {
    ".epub": "an EPUB book; convert it to text (pandoc book.epub -o book.txt)",
    ".rtf": f"an RTF file; {_DOCX}",
    ".odt": f"an OpenDocument text; {_DOCX}",
    ".pages": f"a Pages document; {_DOCX}",
    ".doc": f"an old Word file; {_DOCX}",
    ".dot": f"an old Word file; {_DOCX}",
    ".wpd": f"a WordPerfect file; {_DOCX}",
    **dict.fromkeys((".dotx", ".docm", ".dotm"), f"a Word template or a file with macros; {_DOCX}"),
    **dict.fromkeys((".mobi", ".azw", ".azw3"), "a Kindle book; convert it to text"),
    **dict.fromkeys((".msg", ".oft"), "an Outlook message; save it as .eml"),
    **dict.fromkeys((".pst", ".ost"), "an Outlook mailbox; convert it to mbox (readpst -r mail.pst)"),
    **dict.fromkeys((".emlx", ".olm", ".dbx", ".nsf"), "a mail program's own file; export the mails as mbox"),
    ".enex": "an Evernote export; export the notes as HTML",
    **dict.fromkeys((".one", ".onepkg"), f"a OneNote file; {_DOCX}"),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "a spreadsheet; save the sheet as CSV"),
    **dict.fromkeys((".pptx", ".ppt", ".odp", ".key"), "slides; save their text as text"),
    ".backup": "a Signal backup, which is encrypted; copy the chats as text, or export them as JSON",
    **dict.fromkeys((".crypt12", ".crypt14", ".crypt15"), "a WhatsApp backup, which is encrypted; export each chat"),
    **dict.fromkeys((".heic", ".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp"), "a picture"),
    **dict.fromkeys((".mp3", ".m4a", ".ogg", ".opus", ".wav", ".mp4", ".mov", ".webm", ".amr"), "sound or film"),
    **dict.fromkeys((".vcf", ".ics"), "contacts or a calendar, which hold no texts of one's own"),
    **dict.fromkeys((".xml", ".opml"), "XML; convert it to CSV or JSON"),
    **dict.fromkeys((".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz"), "an archive; unpack it, or make it a ZIP"),
}
_BY_NAME = {
    "chat.db": "iMessage's database; export the chats as text (imessage-exporter -f txt)",
    "sms.db": "iMessage's database; export the chats as text (imessage-exporter -f txt)",
    "msgstore.db": "WhatsApp's database; export each chat in the app",
    "db.sqlite": "Signal's database, which is encrypted; copy the chats as text",
}
_BY_BEGINNING = (
    (b"SQLite format 3\0", "a database; export what it holds as CSV or JSON"),
    (b"{\\rtf", _BY_ENDING[".rtf"]),
    (b"!BDN", _BY_ENDING[".pst"]),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"an old Office or Outlook file; {_DOCX}"),
)


def unsupported(file: Found) -> str | None:
    """What `file` is, if it is known and not read, and what to convert it to; None for all others."""
    named = _BY_NAME.get(PurePosixPath(file.name).name.lower()) or _BY_ENDING.get(file.ending)
    if named is not None:
        return named
    head = file.head()
    return next((what for start, what in _BY_BEGINNING if head.startswith(start)), None)
