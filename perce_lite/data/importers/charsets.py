"""Bytes become text in the encoding that they are surely in, or not at all.

A detector of general use was tried (charset-normalizer): on short texts in French, Turkish, Polish or Hebrew it took a
wrong encoding. Here an encoding counts only where what it gives is spelled as a language spells.
"""

import re
import unicodedata
from itertools import pairwise

_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip

_TYPOGRAPHY = "€‚„…‘’“”•–—™«»‹›°§©®·´¡¿ªº×£¥²³½¼¾±µ\xa0"
_WESTERN = "àáâãäåæçèéêëìíîïñòóôõöøùúûüÿœß"
_CENTRAL = "áâäąćčçďđéęëěíîĺľłńňóôöőŕřśšşťţúüůűýźžżăß"
_LATIN = (
    ("cp1250", "áéíóöőúüű", "őű"), ("cp1254", "çğıöşüâîû", "ğışİ"), ("cp1252", "áéíóúýðþæö", "ðþ"),
    ("cp1252", _WESTERN, ""), ("cp1250", _CENTRAL, ""), ("iso8859_2", _CENTRAL, ""), ("cp850", _WESTERN, ""),
    ("mac_roman", _WESTERN, ""),
)  # fmt: skip
"""Encoding, the letters beyond ASCII of the languages in it, and those of which one must occur; the first that fits."""

_CYRILLIC, _GREEK = "оеаинтсрвлкмдпуяіь", "αοιεντσςηρκπυμλάόέίή"
_HEBREW, _ARABIC = "יוהלאמרבתשנםכ", "اليمنوتربهعدةأك"
_KANA = "".join(map(chr, range(0x3041, 0x3097)))
_HANGUL = "이다는에을가고의하지로서도사어를은기나있그아리자들해한안요시너게만니인오했었대주라여면일거수정것"
_HAN = (
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手"
    "這來上國個說們為時會過學對裡裏後麼還發當無開見現風很今"
)
_OTHER_SCRIPTS = {
    **dict.fromkeys(("cp1251", "koi8_r", "koi8_u", "cp866", "iso8859_5", "mac_cyrillic"), _CYRILLIC),
    **dict.fromkeys(("cp1253", "iso8859_7"), _GREEK),
    **dict.fromkeys(("cp1255", "iso8859_8"), _HEBREW),
    **dict.fromkeys(("cp1256", "iso8859_6"), _ARABIC),
    **dict.fromkeys(("cp932", "euc_jp"), _KANA),
    "cp949": _HANGUL,
    **dict.fromkeys(("gb18030", "big5"), _HAN),
}
"""Encodings of other scripts, with letters that make up a good part of every text in the languages written so."""

_COMMON, _MARGIN = 0.2, 0.1
"""Share of common letters that a text has at least, and by how much the likeliest encoding leads."""

_FEWEST_LETTERS = 12
"""Letters that a text in another script needs, for their shares to say something."""

_SAMPLE = 2**15
"""Bytes that are looked at to find the encoding."""

_MOST_LATIN_ACCENTS = 0.3
"""Share of the letters of a text in Latin letters that are not ASCII. Vietnamese has more; it comes in UTF-8."""


def decoded(content: bytes) -> str | None:
    """The text of `content`: by its byte order mark, else UTF-8, else the one encoding in which it makes words.

    None where it is no text, or where several encodings give several texts that are as likely.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return _decode(content, encoding)
    if b"\0" in content:
        return _utf_16(content)
    if b"\x1b$" in content:
        return _decode(content, "iso2022_jp")
    text = _decode(content, "utf-8")
    if text is not None:
        return text
    sample = _sample(content)
    beyond = sum(byte >= 0x80 for byte in sample)
    letters = beyond + sum(byte < 0x80 and chr(byte).isalpha() for byte in sample)
    guessed = (_latin(sample) if beyond <= _MOST_LATIN_ACCENTS * letters else None) or _other_script(sample)
    return _decode(content, guessed) if guessed else None


def _sample(content: bytes) -> bytes:
    """The lines from the first one on that is not ASCII alone."""
    first = next((match.start() for match in re.finditer(rb"[\x80-\xff]", content)), 0)
    start = content.rfind(b"\n", 0, first) + 1
    end = content.find(b"\n", start + _SAMPLE)
    return content[start : end + 1 if end >= 0 else len(content)]


_LETTER = r"[^\W\d_]"
_MARK_WITHIN_WORD = re.compile(
    rf"{_LETTER}[‚„•™«»‹›°§©®¡¿×£¥²³½¼¾±µªº\u2500-\u25ff]{_LETTER}|[€£¥©®]{_LETTER}|{_LETTER}[€£¥\u2500-\u25ff]"
)


def _decode(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return None


def _utf_16(content: bytes) -> str | None:
    """UTF-16 without a byte order mark, in the one of its two orders that gives a text."""
    texts = [_decode(content, encoding) for encoding in ("utf-16-le", "utf-16-be")]
    readable = [text for text in texts if text and _readable(text)]
    return readable[0] if len(readable) == 1 else None


def _latin(content: bytes) -> str | None:
    """The encoding of a text in Latin letters."""
    for encoding, letters, needed in _LATIN:
        text = _decode(content, encoding)
        if text is not None and _spells(text, letters + letters.upper().replace("SS", ""), needed + needed.upper()):
            return encoding
    return None


def _spells(text: str, letters: str, needed: str) -> bool:
    """Whether all beyond ASCII is in `letters`, or a mark that stands outside of words; controls are no text."""
    beyond = {letter for letter in text if ord(letter) > 127}
    if beyond - {*letters, *_TYPOGRAPHY} or (needed and not beyond & set(needed)) or not _readable(text):
        return False
    return _MARK_WITHIN_WORD.search(text) is None and not _odd_case(text)


def _other_script(content: bytes) -> str | None:
    """The one encoding that gives the letters of a language as often as it has them."""
    shares: dict[str, float] = {}  # of texts: many encodings give the same one
    encodings: dict[str, str] = {}
    for encoding, common in _OTHER_SCRIPTS.items():
        text = _decode(content, encoding)
        if text is not None and _readable(text) and not _odd_case(text) and not _MARK_WITHIN_WORD.search(text):
            letters = [letter for letter in text.lower() if letter.isalpha() and letter > "\x7f"]
            share = sum(letter in common for letter in letters) / max(len(letters), _FEWEST_LETTERS)
            shares[text] = max(share, shares.get(text, 0.0))
            encodings.setdefault(text, encoding)
    likeliest = sorted(shares, key=lambda text: shares[text], reverse=True)
    if not likeliest or shares[likeliest[0]] < _COMMON:
        return None
    clear = len(likeliest) == 1 or shares[likeliest[0]] - shares[likeliest[1]] >= _MARGIN
    return encodings[likeliest[0]] if clear else None


def _readable(text: str) -> bool:
    """Whether nearly all of it are letters, digits, blanks and marks of writing of one script beside Latin."""
    kinds = [unicodedata.category(letter) for letter in text if letter not in "\n\r\t\f\v\x1a"]
    if any(kind in ("Cc", "Cn", "Co", "Cs") for kind in kinds):
        return False
    return sum(kind[0] in "LMNZP" for kind in kinds) >= 0.9 * len(kinds) and len(_scripts(text) - {"LATIN"}) <= 1


def _scripts(text: str) -> set[str]:
    """The scripts of the letters beyond ASCII; those that Japanese mixes are one."""
    names = {unicodedata.name(letter, "?").split()[0] for letter in set(text) if letter.isalpha() and letter > "\x7f"}
    return {"CJK" if name.startswith(("KATAKANA", "HIRAGANA", "FULLWIDTH")) else name for name in names}


def _odd_case(text: str) -> bool:
    """Whether capitals stand behind small letters within words, or nearly everywhere, as in a wrong encoding."""
    pairs = [pair for pair in pairwise(text) if pair[0].isalpha() and pair[1].isalpha() and max(pair) > "\x7f"]
    capitals = sum(right.isupper() for _, right in pairs)
    return capitals > len(pairs) / 2 or sum(left.islower() and right.isupper() for left, right in pairs) > 0.01 * len(
        pairs
    )
