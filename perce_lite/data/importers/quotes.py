"""What in a mail's text is somebody else's or the mail program's: quoted and forwarded mails, signatures.

A mail program in any language puts the same things above what it quotes: a date with a time, an address, labels with
colons. Those are looked for; words are where a language's own are needed. (mail-parser-reply was tried: it lacks
Portuguese, Russian, Turkish, Arabic, Hebrew and Hindi, and cuts own text that follows "Do:" or "Thanks,".)
"""

import itertools
import re

from perce_lite.data.importers.chat_marks import INVISIBLE
from perce_lite.data.importers.writings import tidy

_FROM = (
    "from|von|de|da|van|fra|från|od|feladó|lähettäjä|от|від|от кого|kimden|gönderen|من|מאת|प्रेषक|से|发件人|"
    "寄件者|寄件人|"
    "差出人|送信者|보낸 사람|보낸사람|από|expéditeur|remitente|mittente|remetente|absender|nadawca|afzender|"
    "kimdən|dari|từ"
)
_OTHERS = (
    "sent|date|to|subject|cc|reply-to|gesendet|datum|an|betreff|envoyé|à|objet|enviado|enviado el|fecha|para|"
    "asunto|data|"
    "assunto|inviato|a|oggetto|verzonden|aan|onderwerp|sendt|dato|til|emne|skickat|till|ämne|odesláno|komu|"
    "předmět|wysłano|"
    "do|temat|отправлено|дата|кому|тема|копия|надіслано|gönderildi|gönderilme tarihi|tarih|kime|konu|"
    "تم الإرسال|التاريخ|"
    "إلى|الموضوع|تاريخ|נשלח|תאריך|אל|נושא|भेजा गया|दिनांक|प्रति|विषय|发送时间|日期|收件人|主题|寄件日期|收件者|"
    "主旨|送信日時|"
    "日時|日付|宛先|件名|보낸 날짜|날짜|받는 사람|제목|στάλθηκε|προς|θέμα|ημερομηνία|elküldve|címzett|tárgy|"
    "lähetetty|aihe"
)
_LABEL = re.compile(rf"(?i)^[\s>*_]*({_FROM}|{_OTHERS})[\s*_]*[:：][\s*_]*(.*)$")
_FROM_LABEL = re.compile(rf"(?i)^[\s>*_]*({_FROM})[\s*_]*[:：]")

_WROTE = (
    r"wrote|writes|schrieb|schreibt|a écrit|escribió|escribio|ha scritto|scrive|escreveu|schreef|skrev|"
    r"napsala?|napsal\(a\)|"
    r"napisała?|napisał\(a\)|писала?|написала?|написал\(a\)|пишет|пише|написав|yazdı|yazmış|şunu yazdı|كتب|"
    r"كتبت|כתבה?|כתב/ה|"
    r"ने लिखा|写道|寫道|书写|書きました|のメール|님이 작성|님이 썼습니다|έγραψε|írta|kirjoitti|viết|menulis|"
    r"a scris|writes|在.{0,60}写"
)
_ATTRIBUTION = re.compile(rf"(?i)(?:{_WROTE})[^\n]{{0,80}}[:：]?\s*$")
_TIME = r"\d{1,2}\s?[:.時时h]\s?\d{2}"
_ADDRESS = r"[<\[(＜]?[\w.+-]+@[\w-]+\.[\w.-]+"
_DATED = re.compile(rf"{_TIME}|\b(?:19|20)\d\d\b|{_ADDRESS}|\d{{1,2}}[./-]\d{{1,2}}[./-]\d{{2,4}}|\d+月\d+日")

_FORWARDED = (
    "original message|forwarded message|forwarded by|reply message|original appointment|"
    "ursprüngliche nachricht|originalnachricht|"
    "weitergeleitete nachricht|message d'origine|message d’origine|message original|message transféré|"
    "mensaje original|"
    "mensaje reenviado|forwarded|mensagem original|mensagem encaminhada|messaggio originale|messaggio inoltrato|"
    "messaggio originario|oorspronkelijk bericht|doorgestuurd bericht|исходное сообщение|пересылаемое сообщение|"
    "пересланное сообщение|пересылаемое|orijinal mesaj|özgün ileti|iletilen mesaj|yönlendirilmiş ileti|"
    "الرسالة الأصلية|"
    "رسالة معاد توجيهها|رسالة محولة|הודעה מקורית|הודעה שהועברה|मूल संदेश|अग्रेषित संदेश|अग्रेषित संदेश|"
    "原始邮件|转发的邮件|"
    "转发邮件信息|原始郵件|轉寄的郵件|元のメッセージ|転送メッセージ|転送されたメッセージ|원본 메시지|원본 메일|"
    "전달된 메시지|"
    "wiadomość oryginalna|wiadomość przekazana|původní zpráva|ursprungligt meddelande|oprindelig meddelelse|"
    "opprinnelig melding"
)
_RULE = re.compile(rf"(?i)^[\s>]*[-_=—–*]{{2,}}\s*(?:{_FORWARDED})\b.{{0,60}}$")
_BEGIN = re.compile(
    r"(?i)^\s*(?:begin forwarded message|anfang der weitergeleiteten (?:nachricht|e-mail)|"
    r"début du message (?:réexpédié|transféré)|"
    r"inicio del mensaje reenviado|início da mensagem (?:reencaminhada|encaminhada)|inizio messaggio inoltrato|"
    r"begin doorgestuurd bericht|начало переадресованного сообщения|начало пересылаемого сообщения|İleti(?:len|"
    r"lmiş) ileti başlangıcı|"
    r"بداية الرسالة المعاد توجيهها|תחילת ההודעה שהועברה|转发的邮件|以下是转发的邮件|開始轉寄郵件|"
    r"転送されたメッセージ|전달된 메시지)\s*[:：]?\s*$"
)
_SENT_FROM = re.compile(
    r"(?i)^\s*(?:sent from my |sent from (?:outlook|mail|yahoo|proton)|get outlook for |"
    r"von meinem \S+(?: \S+)? gesendet|"
    r"gesendet (?:von|mit) |envoyé (?:de mon|depuis|à partir de) |enviado desde mi |enviado (?:do meu|a partir do) |"
    r"inviato da(?:l mio)? |verzonden vanaf mijn |отправлено (?:с|из) |iphone'?umdan gönderildi|"
    r"\S+[’']?\S* gönderildi$|"
    r"أُ?رسل(?:ت)? من |נשלח מה|मेरे \S+ से भेजा गया|发自我的|從我的 ?\S+ ?傳送|从我的.*发送|iPhoneから送信|"
    r"\S+から送信$|"
    r"나의 \S+에서 보냄|내 \S+에서 보냄|skickat från min |sendt fra min |wysłano z |odesláno z )"
)

RULE = "-----Original Message-----"
"""A line below which nothing is the writer's own."""


def own_words(body: str) -> str:
    """A mail's text without what is quoted, the line that says who is quoted, the signature and mails below it."""
    lines = INVISIBLE.sub("", body.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
    lines = lines[: _end(lines)]
    kept: list[str] = []
    quoting = False
    for line in lines:
        quoted = re.match(r"\s*(?:>|\|[ \t][^|\n]*$)", line) is not None
        if quoted and not quoting:
            _drop_attribution(kept)
        elif not quoted:
            kept.append(line)
        quoting = quoted or (quoting and not line.strip())
    return tidy("\n".join(kept))


def quoted_words(body: str) -> str:
    """What a mail's text quotes of the mail that it answers: quotes of the first level, without what those quote."""
    lines = INVISIBLE.sub("", body.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
    quotes = [re.sub(r"^\s*> ?", "", line) for line in lines if re.match(r"\s*>", line)]
    return own_words("\n".join(quotes))


def _end(lines: list[str]) -> int:
    """The number of the line at which the mail's own text ends: a signature, a forwarded mail, an unmarked quote."""
    for number, line in enumerate(lines):
        if re.fullmatch(r"--\s?", line) or _RULE.match(line) or _BEGIN.match(line) or _SENT_FROM.match(line):
            return number
        if _is_ruled_head(lines, number):
            return number
        if _is_head(lines, number):
            return _without_rule(lines, number)
        if _attribution_at(lines, number) is not None and not _quoted_below(lines, number):
            return number
    return len(lines)


def is_mail(text: str) -> bool:
    """Whether a text begins with the head of a mail."""
    lines = text.strip().split("\n")
    return _is_head(lines, 0)


def _is_head(lines: list[str], start: int) -> bool:
    """Whether the head of another mail starts there: three labels, a sender's among them, or two and an address.

    Some programs put an empty line between any two.
    """
    if not _LABEL.match(lines[start][:400]):
        return False
    block = [line[:400] for line in lines[start : start + 12] if line.strip()]
    block = list(itertools.takewhile(_LABEL.match, block))
    if not any(_FROM_LABEL.match(line) for line in block):
        return False
    return len(block) >= 3 or (len(block) == 2 and _DATED.search("\n".join(block)) is not None)


def _is_ruled_head(lines: list[str], start: int) -> bool:
    """Whether words between two rules stand above a mail's label, in any language: --- Mail original ---."""
    if not re.fullmatch(r"\s*[-_=—–*]{4,}\s*[^\W\d_][^\n]{0,40}?\s*[-_=—–*]{4,}\s*", lines[start][:200]):
        return False
    below = next((line for line in lines[start + 1 : start + 4] if line.strip()), "")
    return _LABEL.match(below[:400]) is not None


def _without_rule(lines: list[str], number: int) -> int:
    """The line of the rule above a head, where one is drawn."""
    above = number - 1
    while above >= 0 and not lines[above].strip():
        above -= 1
    return above if above >= 0 and re.fullmatch(r"\s*[_\-=—*]{5,}\s*", lines[above]) else number


def _attribution_at(lines: list[str], start: int) -> int | None:
    """The last line of "On Friday, 3 May 2024, Ann <a@x.org> wrote:" where it starts there, up to three lines of it."""
    first = lines[start].strip()
    if not first or first.startswith(">"):
        return None
    for last in range(start, min(start + 3, len(lines))):
        text = " ".join(line.strip() for line in lines[start : last + 1])
        if len(text) > 300 or not lines[last].strip():
            return None
        if _is_attribution(text):
            own = last > start and _is_attribution(lines[last].strip()) and not _opens(first)
            return None if own else last
    return None


def _is_attribution(text: str) -> bool:
    if not re.search(r"[:：]$|[-—]{2,}$", text):
        return False
    wrote = _ATTRIBUTION.search(re.sub(r"\s*[-—]+$", "", text)[-120:])
    if wrote and _DATED.search(text) and _opens(text.lstrip("-—_ ")):
        return True
    return bool(re.search(_ADDRESS, text) and re.search(_TIME, text))


def _opens(text: str) -> bool:
    """Whether a line begins as such lines do: with a date, its preposition or an address."""
    return (
        re.match(
            r"(?i)\s*(?:on|am|le|el|il|em|op|den|dne|dnia|a|på|в|у|on|στις|בתאריך|ב-|في|भी|在|于|於|tarihinde)\b", text
        )
        is not None
        or re.match(r"\s*\W?\d", text) is not None
        or re.search(_ADDRESS, text) is not None
        or re.search(_TIME, text) is not None
    )


def _quoted_below(lines: list[str], number: int) -> bool:
    """Whether the next lines that say something are marked as quoted: then only those are another's."""
    last = _attribution_at(lines, number)
    below = next((line for line in lines[(last or number) + 1 :] if line.strip()), "")
    return below.lstrip().startswith(">")


def _drop_attribution(lines: list[str]) -> None:
    """Removes the line or lines that say who is quoted from the end of `lines`; a quote follows."""
    while lines and not lines[-1].strip():
        lines.pop()
    for start in range(max(len(lines) - 3, 0), len(lines)):
        if _attribution_at(lines, start) == len(lines) - 1:
            del lines[start:]
            break
    else:
        if lines and lines[-1].rstrip().endswith((":", "：")) and _names_a_writer(lines[-1]):
            lines.pop()
    lines.append("")


def _names_a_writer(line: str) -> bool:
    return len(line) < 200 and (
        _ATTRIBUTION.search(line) is not None or re.search(rf"{_TIME}|{_ADDRESS}", line) is not None
    )
