"""Instances of every kind of chat, export and mark: what is the person's comes in, all else is left out and named."""

# ruff: noqa: E501 (tables of what programs write, a line each)

import pytest
import writing_fixtures as planted
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_fixtures import read

from perce_lite.data.importers.chat_texts import chat_of_text

A1, B1, A2, B2 = (
    "I keep the light on all night",
    "and I bring you the oil for it",
    "The wind has shaken the door again",
    "Then I shall mend it on Friday",
)

FORMS = {
    "android, US": "12/31/20, 10:15 - {who}: {text}",
    "android, 12 hours": "12/31/20, 10:15 PM - {who}: {text}",
    "ios, Germany": "[31.12.20, 10:15:07] {who}: {text}",
    "ios, Spain": "[31/12/20 10:15:07 p. m.] {who}: {text}",
    "android, Spain": "31/12/20 10:15 p. m. - {who}: {text}",
    "android, France": "31/12/2020 à 10:15 - {who} : {text}",
    "android, Italy": "31/12/20, 10:15 - {who}: {text}",
    "android, Denmark": "31.12.2020 10.15 - {who}: {text}",
    "android, Finland": "31.12.2020 klo 10.15 - {who}: {text}",
    "android, Netherlands": "31-12-2020 10:15 - {who}: {text}",
    "android, Czechia": "31. 12. 2020 10:15 - {who}: {text}",
    "android, Hungary": "2020. 12. 31. 10:15 - {who}: {text}",
    "android, Bulgaria": "31.12.2020 г., 10:15 - {who}: {text}",
    "android, Brazil": "31/12/2020 10:15 - {who}: {text}",
    "android, Portugal": "31/12/2020 às 10:15 - {who}: {text}",
    "android, Sweden": "2020-12-31 10:15 - {who}: {text}",
    "android, Sweden, kl": "2020-12-31 kl. 10:15 - {who}: {text}",
    "android, Canada": "2020-12-31, 10:15 a.m. - {who}: {text}",
    "android, Arabic digits": "٣١\u200f/١٢\u200f/٢٠٢٠، ١٠:١٥ م - {who}: {text}",
    "android, Persian": "۲۰۲۰/۱۲/۳۱،\u200f ۱۰:۱۵ - {who}: {text}",
    "android, Thailand": "31/12/2563 10:15 - {who}: {text}",
    "android, Vietnam": "10:15, 31/12/2020 - {who}: {text}",
    "android, Greece": "31/12/20, 10:15 μ.μ. - {who}: {text}",
    "android, India": "31/12/20, 10:15 pm - {who}: {text}",
    "ios, narrow space": "\u200e[12/31/20, 10:15:07\u202fPM] {who}: {text}",
    "ios, thin space": "[2020/12/31\u200910:15:07] {who}: {text}",
    "ios, left-to-right marks": "\u200e\u202a[31.12.20,\u200e 10:15:07]\u202c \u202a{who}\u202c: {text}",
    "ios, Japan": "[2020/12/31 10:15:07] {who}: {text}",
    "ios, China": "[2020/12/31 下午10:15:07] {who}: {text}",
    "android, China": "2020年12月31日 下午10:15 - {who}: {text}",
    "android, Korea": "2020. 12. 31. 오후 10:15 - {who}: {text}",
    "WhatsApp Web, copied": "[10:15, 31/12/2020] {who}: {text}",
    "KakaoTalk, phone": "2020년 12월 31일 오후 10:15, {who} : {text}",
    "KakaoTalk, English": "December 31, 2020 at 10:15 PM, {who} : {text}",
    "Signal": "[2020-12-31 10:15] {who}: {text}",
    "Signal, export": "[2020-12-31, 10:15] {who}: {text}",
    "Skype": "[31.12.2020 10:15:07] {who}: {text}",
    "IRC": "[2020-12-31 10:15:07] <{who}> {text}",
    "IRC, ops": "2020-12-31T10:15:07 <@{who}> {text}",
    "weechat": "2020-12-31 10:15:07\t{who}\t{text}",
    "month in words": "31 Dec 2020, 10:15 - {who}: {text}",
    "month in words, French": "31 déc. 2020 à 10:15 - {who} : {text}",
    "month first": "Dec 31, 2020, 10:15 PM - {who}: {text}",
    "month in words, Russian": "31 декабря 2020 г. 10:15 - {who}: {text}",
    "a weekday": "Thu 31/12/2020 10:15 - {who}: {text}",
    "ISO with zone": "2020-12-31T10:15:07Z {who}: {text}",
    "ISO with fractions": "[2020-12-31T10:15:07.123+01:00] {who}: {text}",
    "an em dash": "31.12.2020 10:15 — {who}: {text}",
    "Telegram, pasted": "{who}, [31.12.2020 10:15]\n{text}\n",
    "Telegram, pasted, US": "{who}, [12/31/2020 10:15 PM]\n{text}\n",
    "Discord, exported": "[31-Dec-20 10:15 PM] {who}\n{text}\n",
    "Discord, pasted": "{who} — 31/12/2020 10:15\n{text}\n",
    "Slack, pasted": "{who}  10:15 PM\n{text}\n",
    "WeChat": "{who} 2020-12-31 10:15:07\n{text}\n",
    "QQ": "2020-12-31 10:15:07 {who}(12345)\n{text}\n",
    "iMessage": "Dec 31, 2020 10:15:07 PM\n{who}\n{text}\n",
    "Teams": "[10:15] {who}\n{text}\n",
}  # fmt: skip
UNDATED = {
    "IRC, no date": "[10:15] <{who}> {text}",
    "IRC, no time": "<{who}> {text}",
    "Zoom": "10:15:07\t From {who} to Everyone: {text}",
    "transcript with times": "00:10:15 {who}: {text}",
}


def said(form: str, *more: tuple[str, str]) -> str:
    pairs = [("Ann Bell", A1), ("Bob", B1), ("Ann Bell", A2), ("Bob", B2), *more]
    return "\n".join(form.format(who=who, text=text) for who, text in pairs)


@pytest.mark.parametrize("name", [*FORMS, *UNDATED])
@pytest.mark.parametrize("head", ["", "Chat with Bob\n\n"])
def test_a_chat_in_the_form_of_many_programs(name, head):
    found = chat_of_text(head + said((FORMS | UNDATED)[name]).rstrip("\n") + "\nand a second line of it", "c")
    assert found.chat is not None
    assert [(message.author, message.text) for message in found.chat.messages] == [
        ("Ann Bell", A1),
        ("Bob", B1),
        ("Ann Bell", A2),
        ("Bob", f"{B2}\nand a second line of it"),
    ]
    dated = name in FORMS and name not in ("Slack, pasted", "Teams")
    assert [message.date[:10] if message.date else None for message in found.chat.messages] == [
        "2020-12-31" if dated else None
    ] * 4


def test_days_above_times():
    line = f"2020/12/31(木)\n10:15\tAnn Bell\t{A1}\n10:16\tBob\t{B1}\n\n2021/01/01(金)\n09:00\tAnn Bell\t{A2}\n09:01\tBob joined the chat\n"
    kakao = (
        f"Bob 님과 카카오톡 대화\n저장한 날짜 : 2021-01-02 10:00:00\n\n--------------- 2020년 12월 31일 목요일 ---------------\n"
        f"[Ann Bell] [오전 10:15] {A1}\n[Bob] [오전 10:16] {B1}\n--------------- 2021년 1월 1일 금요일 ---------------\n"
        f"[Ann Bell] [오전 9:00] {A2}\n"
    )
    for text in (line, kakao):
        chat = chat_of_text(text, "c").chat
        assert chat is not None
        assert [(message.author, message.text, message.date) for message in chat.messages] == [
            ("Ann Bell", A1, "2020-12-31T10:15:00"),
            ("Bob", B1, "2020-12-31T10:16:00"),
            ("Ann Bell", A2, "2021-01-01T09:00:00"),
        ]


MARKS = """
‎<attached: 00000012-PHOTO.jpg>|<Media omitted>|<Medien ausgeschlossen>|<Médias omis>|<Multimedia omitido>|<Без медиафайлов>
IMG-20201231-WA0001.jpg (file attached)|IMG-20201231-WA0001.jpg (Datei angehängt)|PTT-2020.opus (archivo adjunto)
‎image omitted|‎Bild weggelassen|‎imagen omitida|‎audio omitido|‎Video weggelassen|‎image absente|image omitted|sticker omitted
‎Missed voice call, tap to call back|‎Verpasster Sprachanruf|‎Appel vocal manqué|Missed video call|‎POLL:
This message was deleted|You deleted this message.|Diese Nachricht wurde gelöscht.|Ce message a été supprimé|Se eliminó este mensaje
Данное сообщение удалено|Bu mesaj silindi|此消息已被删除|このメッセージは削除されました|삭제된 메시지입니다.|تم حذف هذه الرسالة|הודעה זו נמחקה
null|location: https://maps.google.com/?q=1.2,3.4|‎Standort: https://maps.google.com/?q=1.2,3.4|[写真]|[Sticker]|[图片]|☎ 通話時間 1:23
사진 3장|Waiting for this message. This may take a while.|‎צורה שונתה|\u200fتمت إزالة الصورة
"""


@pytest.mark.parametrize("mark", [mark for line in MARKS.split("\n") for mark in line.split("|") if mark])
def test_a_mark_of_the_app_is_nobodys_words(mark):
    chat = chat_of_text(said(FORMS["ios, Germany"], ("Ann Bell", mark)), "c").chat
    assert chat is not None
    assert [message.text for message in chat.messages] == [A1, B1, A2, B2]
    assert len(chat.left_out) == 1


@pytest.mark.parametrize(
    "tail",
    [
        " ‎<This message was edited>", " ‎<Diese Nachricht wurde bearbeitet.>", " <This message was edited>",
        " ‎<Ce message a été modifié>", " ‎<Se editó este mensaje.>", " ‎<Сообщение изменено>", " ‎<已编辑>", " (edited)",
        "\n‎<attached: 00000012-PHOTO.jpg>", " ‎<attached: 00000012-PHOTO.jpg>",
    ],
)  # fmt: skip
def test_a_mark_behind_a_message_is_cut(tail):
    chat = chat_of_text(said(FORMS["ios, Germany"], ("Ann Bell", f"Good night{tail}")), "c").chat
    assert chat is not None
    assert chat.messages[-1].text == "Good night"


@pytest.mark.parametrize(
    "own", ["I saw <the boat", "It is 3 < 4 (twice)", "see notes.md and the log", "<3 you", "Image it"]
)
def test_what_only_resembles_a_mark_stays(own):
    chat = chat_of_text(said(FORMS["ios, Germany"], ("Ann Bell", own)), "c").chat
    assert chat is not None
    assert chat.messages[-1].text == own


@pytest.mark.parametrize(
    "text",
    [
        "31.12.2020\nSnow: all day.\nNothing else happened.\n\n01.01.2021\nStill snow.",
        "2024-05-03 07:30\nI woke up early and walked down.\n\n2024-05-04 08:00\nI slept long and stayed in.",
        "Shopping: bread and milk\nThen I went home.\nIt was late.",
        "He said: I will come.\nShe said: I will not.\nSo we left it at that, and the evening was quiet.",
        "# Morning\nI walked.\n# Evening\nI read.",
        "The train leaves at 10:15.\nWe met at 11:20.\nAnd that was all.",
        "Dear Bob:\nI am well. The light is on.\nYours\nAnn",
    ],
)
def test_prose_is_no_chat(text):
    found = chat_of_text(text, "d")
    assert (found.chat, found.unclear) == (None, False)


@pytest.mark.parametrize(
    "form",
    [
        "{n}0:15 {who} {text}",
        "2020-12-31 1{n}:15 {who} {text}",
        "(1{n}:15) {who} {text}",
        "1{n}:15:07 | {who} | {text}",
        "1{n}:15 {who}> {text}",
    ],
)
def test_what_looks_like_a_chat_and_is_not_surely_read_is_left_out_by_name(tmp_path, form):
    pairs = [("Ann", A1), ("Bob", B1), ("Ann", A2), ("Bob", B2)]
    text = "\n".join(form.format(n=n, who=who, text=text) for n, (who, text) in enumerate(pairs))
    found, notes = read(planted.write(tmp_path, {"c.txt": text, "n.txt": planted.prose(3)}))
    assert [one.text for one in found] == [planted.prose(3)]
    assert list(notes.skipped) == ["it looks like a chat or a log, and whose words it holds is not clear"]


@pytest.mark.parametrize("ending", ["txt", "md"])
@pytest.mark.parametrize("form", ["{who}: {text}", "**{who}:** {text}", "**{who}**: {text}", "- {who}: {text}"])
def test_a_dialogue_without_times(tmp_path, form, ending):
    files = planted.write(tmp_path, {f"c.{ending}": said(form), "n.txt": planted.prose(3)})
    found, _ = read(files, "Ann Bell")
    assert [one.text for one in found] == [planted.prose(3), A1, A2]
    found, notes = read(files)
    assert [one.text for one in found] == [planted.prose(3)]
    assert list(notes.skipped) == ["a dialogue; say who is to be learned in it with --me NAME"]


@pytest.mark.parametrize(
    "form",
    ["{who}: {text}", "## {who}\n\n{text}\n", "**{who}:**\n{text}\n", "#### {who}:\n{text}\n", "{who} said:\n{text}\n"],
)
@pytest.mark.parametrize("who", [("User", "Assistant"), ("You", "ChatGPT"), ("Human", "Claude")])
def test_a_chat_with_an_assistant_as_text(tmp_path, form, who):
    text = "\n".join(form.format(who=who[n % 2], text=t) for n, t in enumerate((A1, B1, A2, B2)))
    found, _ = read(planted.write(tmp_path, {"c.md": "# A chat about lights\n\n" + text}))
    assert [one.text for one in found] == [A1, A2]


@pytest.mark.parametrize(
    "text",
    [
        "Ann Bell\t10:15 AM\nI saw the boat go out\nBob Cole\t10:16 AM\ngood for it\n",
        "10:15:07 From  Ann Bell  to  Everyone:\n\tI saw the boat go out\n10:16:07 From  Bob  to  Everyone:\n\tgood for it\n",
        "12/31/20, 10:15 - Bob: hello there my friend",
        "You sent\nI saw the boat go out\nBob\nBob\ngood for it\n",
    ],
)
def test_what_is_too_short_to_be_sure_of_is_left_out(text):
    found = chat_of_text(text, "c")
    assert (found.chat, found.unclear) == (None, True)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        (
            "[Yesterday 10:15 AM] Bell, Ann\nI saw it\n\n[Today 10:16 AM] Cole, Bob\ngood\n\n[Today 10:17 AM] Bell, Ann\nyes\n",
            ["I saw it", "yes"],
        ),
        (
            "1\n00:00:01.000 --> 00:00:04.000\nBell, Ann: I saw it\n\n2\n00:00:05.000 --> 00:00:06.000\nBob: good\n\n"
            * 2,
            ["I saw it"] * 2,
        ),
        (
            "12/31/20, 10:15 - Bell, Ann: we sail\n\n- bread\n- milk: two\n10:30 Uhr: los\n12/31/20, 10:16 - Bob: good",
            ["we sail\n\n- bread\n- milk: two\n10:30 Uhr: los"],
        ),
        (
            "Bell, Ann, [31.12.2020 10:15]\n[Forwarded from News]\nBreaking\n\nBell, Ann, [31.12.2020 10:16]\nsaw it\n\nBob, [31.12.2020 10:17]\nno",
            ["saw it"],
        ),
    ],
)
def test_messages_of_several_lines_and_days_in_words(text, own):
    chat = chat_of_text(text, "c").chat
    assert chat is not None
    assert [message.text for message in chat.messages if message.author == "Bell, Ann"] == own


def test_a_mail_that_was_saved_as_text_is_its_senders(tmp_path):
    head = "From: bob@example.org\nTo: ann@x.org\nSubject: boats\nDate: Fri, 3 May 2024\n\n"
    german = "Von: Bob\nAn: Ann\nBetreff: Boot\nDatum: 3. Mai 2024\n\n"
    files = {"a.txt": head + A1, "b.txt": german + B1, "c.txt": head.replace("bob@", "ann@") + A2}
    found, notes = read(planted.write(tmp_path, files), senders=("ann@example.org",))
    assert [one.text for one in found] == [A2]
    assert set(notes.skipped) == {"a mail from somebody else", "a mail as text, whose sender is not surely read"}


WORDS = st.text(st.sampled_from("abcdeäßñøж漢字 语한글กñ😀,;.!?-'\"()…"), min_size=1, max_size=30)
PEOPLE = st.lists(
    st.sampled_from(["Ann", "Ann Bell", "Bob", "Zoë", "Иван", "田中", "Ann-Marie O'Neil"]),
    min_size=2,
    max_size=2,
    unique=True,
)
WITHIN = sorted(name for name in FORMS if "\n" not in FORMS[name])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WITHIN), PEOPLE, st.lists(WORDS.map(str.strip), min_size=4, max_size=8))
def test_whoever_writes_whatever_in_any_form_keeps_their_words(form, people, said):
    said = [f"word {text}" for text in said]
    lines = [FORMS[form].format(who=people[number % 2], text=text) for number, text in enumerate(said)]
    chat = chat_of_text("\n".join(lines), "c").chat
    assert chat is not None
    assert [(message.author, message.text) for message in chat.messages] == [
        (people[number % 2], text.strip()) for number, text in enumerate(said)
    ]


PIECES = st.sampled_from(
    ["[", "]", "12/31/20", ", ", "10:15", " - ", "Ann", ": ", "Bob", "\n", "\t", "<", ">", "\u200e", "Yesterday ", "PM", "-->",
     "**", "## ", "You said:", "2023년 5월 3일", "오후", "From ", " to ", "99", "\u202f", "—", "|", "…", "\r\n", "()", "31. 12. 2020"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_no_text_breaks_the_reader_and_no_word_is_made_up(text):
    found = chat_of_text(text, "c")
    for message in found.chat.messages if found.chat else ():
        assert all(word in text for word in message.text.split())
        assert message.author
    assert found.chat is None or not found.unclear
