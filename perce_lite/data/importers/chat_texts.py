"""Chats kept as text: lines with a time and a name, in the forms of many programs and countries.

What a program writes differs; that a message begins with a time and a name does not. So a line is read piece by piece:
a date, a time, and then a name in one of a few places. A text that looks like a chat and is not surely read as one is
neither a chat nor somebody's prose: `TextChat.unclear`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from perce_lite.data.importers.chat_marks import INVISIBLE, without_marks
from perce_lite.data.importers.chats import ASSISTANTS, PEOPLE, Chat, Message, clean_name
from perce_lite.data.importers.writings import numbers_to_date

Date = tuple[int, int, int]

_PM = r"p\.?\s?m\.?|nachm\.?|م|午後|下午|오후|μ\.?\s?μ\.?|öS|ch|du\.?|अपराह्न|หลังเที่ยง|e\.?m\.?|晚上|中午|傍晚|pt[gt]\.?"
_AM = r"a\.?\s?m\.?|vorm\.?|ص|午前|上午|오전|π\.?\s?μ\.?|öö|sa|de\.?|पूर्वाह्न|ก่อนเที่ยง|f\.?m\.?|凌晨|早上|清晨|pg\.?"
_HALF = rf"(?:{_PM}|{_AM})"
_WEEKDAY = r"(?:\s?[(（]?[^\W\d_]{1,12}[)）.]?,?)"
_DATE = re.compile(
    r"(?P<a>\d{1,4})\s?(?P<between>[./-]|年|년)\s?(?P<b>\d{1,2})\s?(?:[./-]|月|월)\s?(?P<c>\d{1,4})(?!\d)(?:\s?[일日]|\.)?(?:\s?[гgр]\.)?"
    r"|(?P<day>\d{1,2})(?:st|nd|rd|th|\.)?[\s-](?:de\s)?(?P<month>[^\W\d_]{3,12})\.?,?[\s-](?:de\s)?(?P<year>\d{4}|\d{2}(?![:\d]))"
    r"|(?P<month2>[^\W\d_]{3,12})\.?\s(?P<day2>\d{1,2})(?:st|nd|rd|th)?,?\s(?P<year2>\d{4})"
)
_TIME = re.compile(
    rf"(?:(?P<before>{_HALF})\s?)?(?P<hour>\d{{1,2}})\s?(?P<colon>[:.h時时시点])\s?(?P<minute>\d{{2}})(?!\d)(?:\s?[분分])?"
    rf"(?:[:.]\s?(?P<second>\d{{2}})(?!\d)(?:[.,]\d{{1,6}})?)?(?:\s?(?P<after>{_HALF})(?!\w))?"
    r"(?:\s?(?:[+-]\d{2}:?\d{2}|UTC|GMT|Z|[A-Z]{2,4}T)\b)?",
    re.I,
)
_BETWEEN = re.compile(r"(?:T|[,،、，]?\s*(?:[^\W\d_]{1,3}(?:\sl[ae]s)?\.?,?\s+|de las\s|klo\s)?)(?=\S)")
_WORD_AHEAD = re.compile(r"[^\W\d_]{2,12}\.?,?\s(?=\d)")
_WEEKDAY_BEHIND = re.compile(rf"{_WEEKDAY}?")
_MONTHS = (
    "jan ene gen янв ian sty", "feb fév fev lut фев şub", "mar mär märz маар мар", "apr avr abr апр kwi nis",
    "may mai mag maj мая май mei maio", "jun juin giu июн cze haz", "jul juil lug июл lip tem",
    "aug aoû ago авг sie ağu", "sep set сен wrz eyl", "oct okt ott out окт paź eki", "nov ноя lis kas",
    "dec dez déc dic des дек gru ara",
)  # fmt: skip
_MONTH_OF = {word: number for number, words in enumerate(_MONTHS, 1) for word in words.split()}

_NAME = r"[^:：\t\n<>\[\]]{1,60}?"
_INLINE = re.compile(rf"^\s*(?:[-–—|,，]\s*)?(?P<name>{_NAME})\s?[:：](?=\s|$|[\u2e80-\U0003ffff])\s*")
_ANGLED = re.compile(r"^\s*(?:[-–—|]\s*)?<(?P<name>[^<>\n]{1,40})>\s+")
_TABBED = re.compile(r"^\t+\s*(?P<name>[^\t\n]{1,60}?):?\t+")
_NAME_FIRST = re.compile(r"^\[(?P<name>[^\[\]\n]{1,40})\]\s?\[(?P<time>[^\[\]\n]{1,40})\]\s?")
_TO = re.compile(r"(?i)^(?:from|von|de|da|van)\s+(.+?)\s+(?:to|an|à|para|a|naar)\s+.+$")
_NICK = re.compile(r"^[@+~%&]\s?(?=\S)")
_LONGEST_NAME = 6
"""Words of a name."""

_SPEAKER = re.compile(
    r"^\s{0,3}(?:#{1,6}\s+|[-*]\s+)?(?:[*_]{2})?(?P<name>[^\W\d_][^:：*\n<>]{0,30}?)(?:[*_]{2})?\s?[:：](?:[*_]{2})?(?:\s+|$)"
)
_HEADING = re.compile(
    r"^\s{0,3}(?:#{1,6}\s+(?:[*_]{2})?|[*_]{2}|(?=[^\W\d_]{2,12}\s(?:said|a dit|hat gesagt|dijo)\s?:))"
    r"(?P<name>[^\W\d_][^:：*#()\n]{0,30}?)(?:\s+(?:said|a dit|hat gesagt|dijo))?\s?[:：]?(?:[*_]{2})?\s*[:：]?\s*"
    r"(?:\([^()\n]{1,40}\))?\s*$"
)


@dataclass(frozen=True)
class TextChat:
    """What a text is as a chat.

    chat: None where it is none, or none that could be read
    sure: whether its lines have times; without, names that recur make a dialogue, and a person's own may be one
    unclear: it looks like a chat, and is not surely read as one
    """

    chat: Chat | None = None
    sure: bool = True
    unclear: bool = False


class _Stamp(NamedTuple):
    """A date and a time at the start of a line.

    date: as it stands, in the order of `fixed`; fixed: ymd where that is known, else ""
    end: offset behind it
    worded: a word stands ahead of it: a weekday, or a name
    """

    date: Date | None
    fixed: str
    time: tuple[int, int, int] | None
    end: int
    worded: bool = False


class _Start(NamedTuple):
    """The first line of a message. `text`: offset in the line, without letters of no width; None: it follows."""

    name: str
    stamp: _Stamp | None
    text: int | None


def chat_of_text(text: str, source: str) -> TextChat:
    """The chat that `text` is, whatever program wrote it."""
    raw = re.sub("\r\n?", "\n", text).split("\n")
    shown = [INVISIBLE.sub("", line) for line in raw]
    stamps = [_stamp(line) for line in shown]
    for find in (_stamped, _headed):
        starts = find(shown, stamps)
        if _is_chat(starts):
            return TextChat(_chat(raw, shown, stamps, starts, source))
    headed = starts
    spoken = _spoken(shown)
    if spoken:
        chat = _chat(raw, shown, [None] * len(raw), spoken, source)
        return TextChat(chat, sure=all(message.author.lower() in PEOPLE | ASSISTANTS for message in chat.messages))
    return TextChat(unclear=len(headed) > 1 or _looks_like_chat(shown, stamps))


# Times and dates


def _stamp(line: str) -> _Stamp | None:
    """The date and time that `line` begins with, in brackets or not, in either order."""
    at = len(line) - len(line.lstrip())
    if line[at : at + 1] in ("[", "(", "*", "-", "‹"):
        at += 1
    bracket = line[at - 1 : at] if at else ""
    weekday = _WORD_AHEAD.match(line, at)
    date_match = _DATE.match(line, at) or (_DATE.match(line, weekday.end()) if weekday else None)
    date, fixed = _date(date_match) if date_match else (None, "")
    if date_match and date is None and not fixed:
        date_match = None
    time = None
    if date_match:
        between = _WEEKDAY_BEHIND.match(line, date_match.end())
        places = [date_match.end(), *([between.end()] if between else [])]
        matches = [gap for place in places if (gap := _BETWEEN.match(line, place))]
        time = next((match for gap in matches if (match := _TIME.match(line, gap.end()))), None)
    else:
        in_words = weekday if bracket in ("[", "(") else None
        time = _TIME.match(line, at) or (_TIME.match(line, in_words.end()) if in_words else None)  # [Yesterday 10:15]
        if time is None or (time["colon"] == "." and not time["after"]):
            return None
        gap = _BETWEEN.match(line, time.end())
        date_match = _DATE.match(line, gap.end()) if gap else None
        date, fixed = _date(date_match) if date_match else (None, "")
    end = max(match.end() for match in (date_match, time) if match)
    closing = {"[": "]", "(": ")", "*": "*"}.get(bracket)
    if closing and (rest := re.match(rf"[^\n{re.escape(closing)}]{{0,12}}{re.escape(closing)}", line[end:])):
        end += rest.end()
    worded = weekday is not None and date_match is not None and date_match.start() == weekday.end()
    return _Stamp(date, fixed, _clock(time) if time else None, end, worded)


def _date(match: re.Match[str]) -> tuple[Date | None, str]:
    """The numbers of a date and, where it is known, their order."""
    if match["a"]:
        numbers = int(match["a"]), int(match["b"]), int(match["c"])
        if sum(len(match[name]) > 2 for name in "ac") > 1 or len(match["a"]) == 3 or len(match["c"]) == 3:
            return None, ""
        return numbers, "ymd" if match["between"] in "年년" or len(match["a"]) == 4 else ""
    word, day, year = (
        (match["month"], match["day"], match["year"])
        if match["day"]
        else (match["month2"], match["day2"], match["year2"])
    )
    month = next((_MONTH_OF[word.lower()[:size]] for size in (4, 3) if word.lower()[:size] in _MONTH_OF), None)
    return ((int(year), month, int(day)), "ymd") if month else (None, "unknown month")


def _clock(time: re.Match[str]) -> tuple[int, int, int]:
    hour, half = int(time["hour"]), time["before"] or time["after"]
    if half:
        hour = hour % 12 + (12 if re.fullmatch(_PM, half.strip(), re.I) else 0)
    return hour, int(time["minute"]), int(time["second"] or 0)


def _year_first(date: Date, order: str) -> list[int]:
    """Year, month, day of a date whose numbers stand in `order`; Thai years become those of the common era."""
    by = dict(zip(order, date, strict=True))
    year = by["y"] + (2000 if by["y"] < 100 else -543 if 2500 <= by["y"] < 2600 else 0)
    return [year, by["m"], by["d"]]


def date_order(dates: Sequence[Date]) -> str:
    """dmy, mdy or ymd: the one in which all dates exist and time does not run backwards; a chat is in its order."""

    def faults(order: str) -> int:
        days = [_year_first(date, order) for date in dates]
        backwards = sum(later < earlier for earlier, later in pairwise(days))
        return backwards + len(days) * sum(numbers_to_date(day) is None for day in days)

    return min(("dmy", "mdy", "ymd"), key=faults)


def _when(stamp: _Stamp | None, day: _Stamp | None, orders: dict[str, str]) -> str | None:
    """The moment of a message as ISO text, its day that of the line above where it has none."""
    dated = stamp if stamp and stamp.date else day
    if dated is None or dated.date is None:
        return None
    numbers = _year_first(dated.date, dated.fixed or orders[""])
    if not 1970 <= numbers[0] < 2200:  # another calendar
        return None
    return numbers_to_date([*numbers, *(stamp.time if stamp and stamp.time else ())])


def written_date(text: str) -> str | None:
    """The moment of "Tuesday, January 5, 2021 at 3:04:05 PM UTC", in any language, as ISO text.

    None where it is another form, or day and month cannot be told apart.
    """
    stamp = _stamp(re.sub(r"^[^\W\d_]{2,12},\s", "", " ".join(text.split())))
    return _when(stamp, None, {}) if stamp is not None and stamp.fixed == "ymd" else None


# Where messages start


def _stamped(lines: Sequence[str], stamps: Sequence[_Stamp | None]) -> dict[int, _Start]:
    """Lines with a time and a name, and the text behind them: 12/31/20, 10:15 - Ann: Hello."""
    starts = {}
    for number, (line, stamp) in enumerate(zip(lines, stamps, strict=True)):
        first = _NAME_FIRST.match(line)
        inner = _stamp(first["time"]) if first else None
        if first and inner and inner.time:
            starts[number] = _Start(clean_name(first["name"]), inner, first.end())
        elif stamp is not None and stamp.time is not None:
            rest = line[stamp.end :]
            speaker = _ANGLED.match(rest) or _TABBED.match(rest) or _INLINE.match(rest)
            name = _person(speaker["name"]) if speaker else ""
            if speaker and name:
                starts[number] = _Start(name, stamp, stamp.end + speaker.end())
        elif (speaker := _ANGLED.match(line)) and not line.startswith((" ", "\t")):
            starts[number] = _Start(_person(speaker["name"]), None, speaker.end())
    return _of_one_form(starts)


def _of_one_form(starts: dict[int, _Start]) -> dict[int, _Start]:
    """The starts in the form that most have: a message's second line may begin with a time and a colon too."""
    forms = Counter(bool(start.stamp and start.stamp.date) for start in starts.values())
    return {
        number: start
        for number, start in starts.items()
        if bool(start.stamp and start.stamp.date) == max(forms, key=lambda form: forms[form])
    }


def _headed(lines: Sequence[str], stamps: Sequence[_Stamp | None]) -> dict[int, _Start]:
    """Lines that hold a time and a name, or a time above a name, and nothing else; the text follows."""
    starts = {}
    for number, (line, stamp) in enumerate(zip(lines, stamps, strict=True)):
        below = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if stamp is not None and stamp.time is not None and not stamp.worded:
            rest = re.sub(r"^\s*[-–—|,]\s*", "", line[stamp.end :]).strip()
            if rest and below and _is_name(re.sub(r"[(<][^()<>]*[)>]$", "", rest).strip()):
                starts[number] = _Start(_person(re.sub(r"[(<][^()<>]*[)>]$", "", rest)), stamp, None)
            elif (
                (not rest or rest.startswith("("))
                and _is_name(below)
                and number + 2 < len(lines)
                and lines[number + 2].strip()
            ):
                starts[number] = _Start(_person(below), stamp, None)
        elif below and (start := _time_last(line)):
            starts[number] = start
    return starts


def _time_last(line: str) -> _Start | None:
    """Ann, [03.05.2024 10:15]; Ann — Today at 10:15."""
    if len(line) > 120 or not re.search(r"\d[:.h]\d\d\D.{0,16}$|\d[:.h]\d\d$", line):
        return None
    for gap in re.finditer(r"[,\s]\s*", line[:70]):
        name = re.sub(r"\s*[—–|-]+\s*\S*(?:\s\S+)?$|,$", "", line[: gap.start()]).strip()
        stamp = _stamp(line[gap.end() :])
        if (
            stamp
            and not stamp.worded
            and stamp.time
            and _is_name(name)
            and re.fullmatch(r"\s*[\])]?:?\s*(?:\([^()]*\))?\s*", line[gap.end() :][stamp.end :])
        ):
            return _Start(_person(name), stamp, None)
    return None


def _spoken(lines: Sequence[str]) -> dict[int, _Start]:
    """Lines that begin with a name and a colon, or are a heading of a name, where two names or more recur."""
    full = sum(bool(line.strip()) and not _is_subtitle(lines, at) for at, line in enumerate(lines))
    for form, share in ((_SPEAKER, 0.5), (_HEADING, 0.0)):
        matches = {number: match for number, line in enumerate(lines) if (match := form.match(line))}
        names = Counter(_person(match["name"]) for match in matches.values() if _is_name(match["name"], words=3))
        known = {name for name, count in names.items() if name.lower() in PEOPLE | ASSISTANTS}
        recurring = {name for name, count in names.items() if count > 1 and name} | (known if len(known) > 1 else set())
        starts = {number: match for number, match in matches.items() if _person(match["name"]) in recurring}
        enough = len(starts) >= (4 if len(known) < 2 else 2) and len(starts) >= (share if len(known) < 2 else 0) * full
        if len(recurring) > 1 and enough and (form is _SPEAKER or len(known) > 1):
            of_form = form is _SPEAKER
            return {n: _Start(_person(m["name"]), None, m.end() if of_form else None) for n, m in starts.items()}
    return {}


def _is_name(text: str, words: int = _LONGEST_NAME) -> bool:
    text = text.strip()
    if not 0 < len(text) <= 60 or len(text.split()) > words or not re.search(r"[^\W_]", text):
        return False
    return not re.search(r"[.!?…。！？;]$|https?:|\d:\d|-->", text)


def _person(text: str) -> str:
    """A name without what a program puts around it; "" where it is none."""
    sent = _TO.match(text.strip())
    name = clean_name(_NICK.sub("", (sent[1] if sent else text).strip()))
    return name if _is_name(name.rstrip(".")) else ""


def _is_chat(starts: dict[int, _Start]) -> bool:
    """Whether lines are surely the first ones of messages: names recur, or each has a date, a time and a name."""
    if len(starts) < 2:
        return False
    names = {start.name for start in starts.values()}
    dated = sum(start.stamp is not None and start.stamp.date is not None for start in starts.values())
    within = sum(start.text is not None for start in starts.values())
    return len(names) < len(starts) or (dated == len(starts) and (within > 0 or len(starts) > 1))


def _looks_like_chat(lines: Sequence[str], stamps: Sequence[_Stamp | None]) -> bool:
    """Whether lines begin, or end, with times as a chat's do, and it is not sure who says what."""
    full = [line for line in lines if line.strip()]
    timed = [
        (stamp, line[stamp.end :])
        for line, stamp in zip(lines, stamps, strict=True)
        if stamp and stamp.time and line[stamp.end :].strip()
    ]
    if len(timed) == 1 and timed[0][0].date and _INLINE.match(timed[0][1]) and _stamp(full[0]) == timed[0][0]:
        return True  # one message of a chat
    if any(_COPIED.fullmatch(line.strip()) for line in full):
        return True
    late = sum(bool(re.match(r".{0,30}?\d[:.h]\d\d.{0,20}?[^\W\d_].{0,40}?[:：>|\t]", line)) for line in full)
    if late > 1 and 2 * late >= len(full):
        return True
    firsts = Counter(rest.split()[0] for _, rest in timed)
    several = sum(count > 1 for count in firsts.values()) > 1  # names, rather than words
    dated = any(stamp.date for stamp, _ in timed)
    return len(timed) > 1 and 2 * len(timed) >= len(full) and (dated or several)


_COPIED = re.compile(
    r"(?i)(?:you sent|du hast gesendet|vous avez envoyé|enviaste|hai inviato|você enviou|jij hebt verzonden)"
)
"""A line of Messenger's, as it is copied from a page."""


# Messages


def _chat(
    raw: Sequence[str], shown: Sequence[str], stamps: Sequence[_Stamp | None], starts: dict[int, _Start], source: str
) -> Chat:
    dates = [
        start.stamp.date for start in starts.values() if start.stamp and start.stamp.date and not start.stamp.fixed
    ]
    alone = [stamp.date for stamp in stamps if stamp and stamp.date and not stamp.fixed and stamp.time is None]
    orders = {"": date_order(dates or alone)}
    dated = any(start.stamp and start.stamp.date for start in starts.values())
    messages: list[Message] = []
    day: _Stamp | None = None
    service = True  # what stands ahead of the first message, or follows a line that nobody says, is nobody's
    name_below = -1
    for number, (line, stamp) in enumerate(zip(raw, stamps, strict=True)):
        start = starts.get(number)
        if start is not None:
            text = "" if start.text is None else _tail(line, start.text)
            messages.append(Message(start.name, text, _when(start.stamp, day, orders)))
            service, name_below = (
                False,
                number + 1 if start.text is None and shown[number + 1].strip() == start.name else -1,
            )
        elif _is_day(shown[number]):
            day, service = _stamp(_without_rules(shown[number])), True
        elif stamp is not None and stamp.time and shown[number][stamp.end :].strip() and (stamp.date or not dated):
            service = True
        elif _is_subtitle(raw, number):
            continue
        elif not service and number != name_below:
            messages[-1] = replace(messages[-1], text=f"{messages[-1].text}\n{line}")
    return _without_marks(messages, source)


def _tail(line: str, shown: int) -> str:
    """What follows the first `shown` visible letters of `line`, with the invisible ones ahead of it."""
    at = 0
    while shown:
        shown -= INVISIBLE.match(line[at]) is None
        at += 1
    return line[at:]


def _is_day(line: str) -> bool:
    """Whether a line is a date alone, as programs put above the messages of a day."""
    bare = _without_rules(line)
    day = _stamp(bare) if bare else None
    return bool(day and day.date and day.time is None and re.fullmatch(rf"{_WEEKDAY}{{0,2}}", bare[day.end :].strip()))


def _without_rules(line: str) -> str:
    """`line` without what is drawn around it: ----- 3 May 2024 -----."""
    return re.sub(r"^[-=—–*\s]+|[-=—–*\s]+$", "", line)


def _is_subtitle(lines: Sequence[str], number: int) -> bool:
    """Whether a line is the number or the time of a subtitle, not what is said."""
    below = "".join(lines[number + 1 : number + 2])
    return "-->" in lines[number] or (lines[number].strip().isdigit() and "-->" in below)


_RULE_BELOW = re.compile(r"\n\s*(?:\* \* \*|-{3,}|\*{3,}|_{3,})\s*$")
"""What stands between two turns of a conversation that was copied."""


def _without_marks(messages: Sequence[Message], source: str) -> Chat:
    """The messages that say something, and the reasons for which others were left out."""
    kept, left_out = [], []
    for message in messages:
        text, reason = without_marks(_RULE_BELOW.sub("", message.text))
        if reason is None and text:
            kept.append(replace(message, text=text))
        elif reason is not None:
            left_out.append(reason)
    return Chat(source, tuple(kept), tuple(left_out))
