"""Masking: what tells who and where a person is becomes a word in brackets, before texts are cut and written.

phonenumbers finds phone numbers, python-stdnum computes the checksums of IBANs and cards; the rest is patterns.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from perce_lite.data.secrets import ANY_SECRET
from perce_lite.errors import DataError

KINDS = ("secret", "link", "mail", "iban", "card", "phone", "street number", "name")
"""What is masked, in the order in which it is looked for."""

REGIONS = ("US", "GB", "DE", "FR", "ES", "IT")
"""Countries whose phone numbers are found without the country's code."""

_LINK = re.compile(r"(?:https?://|ftp://|mailto:|www\.)[^\s<>\"'\[\]]*[^\s<>\"'\[\].,;:!?)]")
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}\b")
_CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?!\d)")
_FEWEST_DIGITS = 6
"""Digits of a text in which phone numbers are looked for."""

_STREETS = (
    # Hauptstraße 12a, Keizersgracht 5
    r"\b[\w.-]*(?:straße|strasse|str\.|weg|platz|allee|gasse|ring|damm|ufer|straat|laan|plein|gracht|kade) "
    r"(?P<a>\d+ ?[a-z]?)\b",
    # 12 Baker Street
    r"\b(?P<b>\d+[a-z]?) (?:[A-Z][\w'-]+ ){1,4}"
    r"(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Square|Terrace|Crescent)\b",
    # 12 bis, rue de la Paix
    r"\b(?P<c>\d+(?: ?(?:bis|ter))?),? (?:rue|avenue|av\.|boulevard|bd|place|chemin|allée|impasse|quai) ",
    # Calle Mayor, 12; Via Roma 5
    r"\b(?:[Cc]alle|[Aa]venida|[Aa]vda\.|[Pp]laza|[Vv]ia|[Vv]iale|[Pp]iazza|[Cc]orso|[Rr]ua|[Tt]ravessa|[Pp]raça) "
    r"(?:[\w'.]+ ){0,4}?[\w'.]+,? (?:n[º°.]? ?)?(?P<d>\d+)\b",
)  # fmt: skip
_STREET_NUMBER = re.compile("|".join(_STREETS))

_Span = tuple[int, int]


class Mask:
    """Masks texts, and remembers what it masked first of each kind.

    names: those of people and places, in any case
    regions: countries whose phone numbers are found without the country's code, such as DE
    """

    def __init__(self, names: Sequence[str] = (), regions: Sequence[str] = REGIONS) -> None:
        self.first: dict[str, str] = {}
        self._regions = regions
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        self._names = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.I) if names else None
        self._finders: dict[str, Callable[[str], Iterable[_Span]]] = {
            "secret": lambda text: (match.span() for match in ANY_SECRET.finditer(text)),
            "link": lambda text: (match.span() for match in _LINK.finditer(text)),
            "mail": lambda text: (match.span() for match in _MAIL.finditer(text)),
            "iban": _ibans,
            "card": _cards,
            "phone": self._phones,
            "street number": _street_numbers,
            "name": lambda text: (match.span() for match in self._names.finditer(text)) if self._names else (),
        }

    def __call__(self, text: str) -> str:
        """`text` with all that is masked replaced by its kind in brackets, such as [mail]."""
        for kind in KINDS:
            parts, last = [], 0
            for begin, end in self._finders[kind](text):
                self.first.setdefault(kind, text[begin:end])
                parts += [text[last:begin], placeholder(kind)]
                last = end
            text = "".join([*parts, text[last:]])
        return text

    def _phones(self, text: str) -> list[_Span]:
        if sum(letter.isdigit() for letter in text) < _FEWEST_DIGITS:
            return []
        from phonenumbers import PhoneNumberMatcher

        spans = [(phone.start, phone.end) for region in self._regions for phone in PhoneNumberMatcher(text, region)]
        return list(_apart(spans))


def placeholder(kind: str) -> str:
    """What stands in place of a thing of this kind."""
    return f"[{kind}]"


def masked_in(texts: Iterable[str]) -> dict[str, int]:
    """How often each kind is masked in `texts`; kinds that are not are left out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({kind: text.count(placeholder(kind)) for kind in KINDS})
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def names_in(path: Path) -> list[str]:
    """The names in a file, one a line; empty lines and those that begin with # are none.

    Raises:
        DataError: the file cannot be read, or holds no name.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--mask-names {path}: cannot be read as text in UTF-8: {error}") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise DataError(f"--mask-names {path}: holds no name; write one a line")
    return names


def checked_regions(regions: Sequence[str]) -> Sequence[str]:
    """`regions` in capitals.

    Raises:
        DataError: a country that phonenumbers does not know.
    """
    from phonenumbers import SUPPORTED_REGIONS

    wanted = [region.upper() for region in regions]
    unknown = [region for region in wanted if region not in SUPPORTED_REGIONS]
    if unknown:
        raise DataError(f"--mask-region {unknown[0]}: not a country's two letters, such as DE or US")
    return wanted


def _ibans(text: str) -> Iterator[_Span]:
    """IBANs with a right checksum; a capital word behind one is not taken for a part of it."""
    from stdnum import iban

    for match in _IBAN.finditer(text):
        ends = [end for end in range(match.end(), match.start() + 14, -1) if text[end - 1].isalnum()]
        end = next((end for end in ends if iban.is_valid(text[match.start() : end])), None)
        if end is not None:
            yield match.start(), end


def _cards(text: str) -> Iterator[_Span]:
    from stdnum import luhn

    return (match.span() for match in _CARD.finditer(text) if luhn.is_valid(re.sub(r"[ -]", "", match[0])))


def _street_numbers(text: str) -> Iterator[_Span]:
    return (match.span(match.lastgroup or 0) for match in _STREET_NUMBER.finditer(text))


def _apart(spans: Iterable[_Span]) -> Iterator[_Span]:
    """The spans in order, the longest of those that begin at one place, without those that overlap an earlier one."""
    last = 0
    for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if begin >= last:
            yield begin, end
            last = end
