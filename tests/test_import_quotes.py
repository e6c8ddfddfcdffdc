"""Quoted and forwarded mails as many programs write them, in plain text and in HTML: only the answer is one's own."""

# ruff: noqa: E501 (tables of what programs write, a line each)

import io

import pytest

from perce_lite.data.importers.mails import plain_text, split_mbox
from perce_lite.data.importers.quotes import own_words

OWN = "I walked down to the harbour.\n\nYours, Ann"

QUOTES = [
    'Am 03.05.2024 um 10:15 schrieb Bob Bell:\n> Bobs words',
    'Le ven. 3 mai 2024 à 10:15, Bob Bell <bob@example.org> a écrit :\n\n> Bobs words',
    'El vie, 3 may 2024 a las 10:15, Bob (<bob@example.org>) escribió:\n\n> Bobs words',
    'Em sex., 3 de mai. de 2024 às 10:15, Bob <bob@example.org>\nescreveu:\n\n> Bobs words',
    'Il giorno ven 3 mag 2024 alle ore 10:15 Bob <bob@example.org>\nha scritto:\n\n> Bobs words',
    'Op vr 3 mei 2024 om 10:15 schreef Bob <bob@example.org>:\n\n> Bobs words',
    'пт, 3 мая 2024 г. в 10:15, Bob <bob@example.org>:\n\n> Bobs words',
    'пт, 3 мая 2024 г. в 10:15, Bob <bob@example.org>:\n\nBobs words',
    '2024年5月3日(金) 10:15 Bob <bob@example.org>:\n\n> Bobs words',
    '2024년 5월 3일 (금) 오전 10:15, Bob <bob@example.org>님이 작성:\n\n> Bobs words',
    'Bob <bob@example.org> 于2024年5月3日周五 10:15写道：\n\nBobs words',
    'pt., 3 maj 2024 o 10:15 Bob <bob@example.org> napisał(a):\n\nBobs words',
    'Den fre 3 maj 2024 kl 10:15 skrev Bob <bob@example.org>:\n\nBobs words',
    'Den fre. 3. maj 2024 kl. 10.15 skrev Bob <\nbob@example.org>:\n\nBobs words',
    'pe 3. toukok. 2024 klo 10.15 Bob (bob@example.org) kirjoitti:\n\nBobs words',
    'Bob <bob@example.org>, 3 May 2024 Cum, 10:15 tarihinde şunu yazdı:\n\nBobs words',
    'Pada tanggal Jum, 3 Mei 2024 pukul 10.15 Bob <bob@example.org> menulis:\n\nBobs words',
    'Vào Th 6, 3 thg 5, 2024 vào lúc 10:15 Bob <bob@example.org> đã viết:\n\nBobs words',
    'On Fri, May 3, 2024 at 10:15 AM Bob <bob@example.org> wrote:\n\nBobs words',
    'On 5/3/24 10:15, Bob wrote:\nBobs words',
    '-------- Original Message --------\nSubject: boat\nFrom: Bob\n\nBobs words',
    '-----Original Message-----\nFrom: Bob\nBobs words',
    '-----Ursprüngliche Nachricht-----\nVon: Bob\nBobs words',
    '---------- Forwarded message ---------\nFrom: Bob <b@x.org>\nBobs words',
    '---------- Weitergeleitete Nachricht ---------\nVon: Bob\nBobs words',
    '________________________________\nFrom: Bob\nSent: Friday\nTo: Ann\nSubject: x\n\nBobs words',
    'De: Bob <bob@example.org>\nEnviado el: viernes, 3 de mayo de 2024 10:15\nPara: Ann\nAsunto: barco\n\nBobs words',
    'Da: Bob\nInviato: venerdì 3 maggio 2024 10:15\nA: Ann\nOggetto: barca\n\nBobs words',
    'Från: Bob\nSkickat: den 3 maj 2024 10:15\nTill: Ann\nÄmne: båt\n\nBobs words',
    'Fra: Bob\nSendt: 3. maj 2024 10:15\nTil: Ann\nEmne: båd\n\nBobs words',
    'Lähettäjä: Bob\nLähetetty: 3. toukokuuta 2024 10:15\nVastaanottaja: Ann\nAihe: vene\n\nBobs words',
    'From: Bob\n\nSent: Friday\n\nTo: Ann\n\nSubject: x\n\nBobs words',
    '\u200eFrom: Bob\nSent: Friday\nTo: Ann\nSubject: x\n\nBobs words',
    '**From:** Bob <b@x.org>\n**Date:** Friday\n**To:** Ann\n\nBobs words',
    '| Bobs words\n| more Bobs words',
    'Bob Bell wrote on 03/05/24 10:15:\nBobs words',
    'Bob wrote:\n> Bobs words',
    'At 10:15 03.05.2024, you wrote:\n>Bobs words',
    'Quoting Bob <bob@example.org>:\n\n> Bobs words',
    'Zitat von Bob <bob@example.org>:\n\n> Bobs words',
    '----- Mail original -----\nDe: Bob\nÀ: Ann\nBobs words',
    '----- Messaggio originale -----\nDa: Bob\nBobs words',
    '-----Mensaje original-----\nDe: Bob\nBobs words',
    'Begin forwarded message:\n\n> From: Bob\n> Bobs words',
    'Gesendet: Freitag, 03. Mai 2024 um 10:15 Uhr\nVon: "Bob" <b@x.org>\nAn: Ann\nBetreff: Boot\nBobs words',
    'Date: Fri, 3 May 2024 10:15\nFrom: b@x.org\nTo: a@x.org\nSubject: x\n\nBobs words',
    'Subject: x\nFrom: Bob\nTo: Ann\n\nBobs words',
    'Пятница, 3 мая 2024, 10:15 +03:00 от Bob <bob@example.org>:\n\nBobs words',
    '03.05.2024, 10:15, "Bob" <bob@example.org>:\n\nBobs words',
    '在 2024-05-03 10:15:07，"Bob" <bob@example.org> 写道：\n\nBobs words',
    '------------------ 原始邮件 ------------------\n发件人: "Bob"\n发送时间: 2024年5月3日\nBobs words',
    '------------------ Original ------------------\nFrom: "Bob"\nDate: Fri\nBobs words',
    'Dňa pi 3. 5. 2024 o 10:15 Bob <bob@example.org> napísal(a):\n\nBobs words',
    'Na pet., 3. maj 2024 ob 10:15 je oseba Bob <bob@example.org> napisala:\n\nBobs words',
    'Bob <bob@example.org> ezt írta (időpont: 2024. máj. 3., P, 10:15):\n\nBobs words',
    'În vin., 3 mai 2024 la 10:15, Bob <bob@example.org> a scris:\n\nBobs words',
    'Στις Παρ, 3 Μαΐ 2024 στις 10:15, ο χρήστης Bob <bob@example.org> έγραψε:\n\nBobs words',
    '\u202bבתאריך יום ו׳, 3 במאי 2024 ב-10:15 מאת \u202aBob\u202c\u200f <\u202abob@example.org\u202c\u200f>:\u202c\n\nBobs words',
    'في الجمعة، ٣ مايو ٢٠٢٤ في ١٠:١٥ ص تمت كتابة ما يلي بواسطة Bob <bob@example.org>:\n\nBobs words',
    'शुक्र, 3 मई 2024 को 10:15 बजे Bob <bob@example.org> ने लिखा:\n\nBobs words',
    'ในวันที่ ศ. 3 พ.ค. 2024 เวลา 10:15 Bob <bob@example.org> เขียนว่า:\n\nBobs words',
    'dne pá 3. 5. 2024 v 10:15 odesílatel Bob <bob@example.org> napsal:\n\nBobs words',
    'Enviado do meu iPhone\n\nEm 3 de mai. de 2024, à(s) 10:15, Bob <b@x.org> escreveu:\n\nBobs words',
]  # fmt: skip

HTML = [
    '<div>own words here</div><div class="moz-cite-prefix">On 5/3/24 10:15, Bob wrote:<br></div><blockquote type="cite">Bobs words</blockquote>',
    '<p>own words here</p><div id="appendonsend"></div><hr><div id="divRplyFwdMsg"><b>From:</b> Bob<br><b>Sent:</b> Friday<br><b>To:</b> Ann<br><b>Subject:</b> x</div><div>Bobs words</div>',
    '<p>own words here</p><div style="border:none;border-top:solid #E1E1E1 1.0pt"><p><b>Von:</b> Bob<br><b>Gesendet:</b> Freitag<br><b>An:</b> Ann<br><b>Betreff:</b> x</p></div><p>Bobs words</p>',
    '<div>own words here</div><div class="yahoo_quoted"><div>On Friday, Bob wrote:</div><div>Bobs words</div></div>',
    '<div>own words here</div><div class="protonmail_quote">On Friday, Bob wrote:<br><blockquote>Bobs words</blockquote></div>',
    '<div>own words here</div><div name="quote" style="margin:10px"><div><b>Gesendet:</b> Freitag<br><b>Von:</b> Bob</div>Bobs words</div>',
    '<div>own words here</div><hr id="zwchr" data-marker="__DIVIDER__"><div data-marker="__HEADERS__"><b>From: </b>"Bob"<br><b>To: </b>Ann<br></div><div data-marker="__QUOTED_TEXT__">Bobs words</div>',
    '<div>own words here</div><div class="gmail_extra"><br><div class="gmail_quote">On Fri wrote:<blockquote class="gmail_quote">Bobs words</blockquote></div></div>',
    '<div>own words here</div><div class="tutanota_quote">Bobs words</div>',
    '<div>own words here</div><div class="zmail_extra">---- On Fri, 03 May 2024 10:15 Bob wrote ----<br><blockquote>Bobs words</blockquote></div>',
    '<div>own words here</div><div id="mail-editor-reference-message-container"><div>From: Bob</div>Bobs words</div>',
    '<div>own words here</div><div class="WordSection1"></div><div class="gmail_signature">Ann Bell, Keeper</div>',
    '<div>own words here</div><div class="moz-signature">-- <br>Ann Bell, Keeper</div><div class="moz-forward-container">-------- Forwarded Message --------<br>Bobs words</div>',
    '<div>own words here</div><br>-----Original Message-----<br>From: Bob<br>Bobs words',
    '<div>own words here</div><div class="OutlookMessageHeader" align="left"><hr>-----Original Message-----<br>From: Bob</div>Bobs words',
    '<div>own words here</div><div>From: Bob &lt;b@x.org&gt;<br>Date: Friday, 3 May 2024 at 10:15<br>To: Ann<br>Subject: x</div><div>Bobs words</div>',
]  # fmt: skip


@pytest.mark.parametrize("quote", QUOTES)
def test_what_is_answered_is_cut_in_every_programs_form(quote):
    assert own_words(f"{OWN}\n\n{quote}") == OWN


@pytest.mark.parametrize("html", HTML)
def test_what_is_answered_is_cut_in_every_programs_html(html):
    assert own_words(plain_text(html)) == "own words here"


@pytest.mark.parametrize(
    "own",
    [
        "From: the harbour\nI walked on.", "On Friday I wrote:\nnothing at all.", "Date: I had one.\nIt was good.",
        "At 10:15 I left:\nit was late.", "The list:\nTo: do\nand more", "a | b | c\n1 | 2 | 3", "----\nA rule above.",
        "-- see below --\nand on.", "From the sea: no sound.",
    ],
)  # fmt: skip
def test_what_only_resembles_a_quote_stays(own):
    assert own_words(own) == own


@pytest.mark.parametrize(
    "envelope",
    [
        "From - Fri Sep 16 22:26:51 2016", "From 1234567890@xxx Fri Sep 16 22:26:51 +0000 2016", "From ann@x.org Fri Sep  2 22:26 2016",
        "From MAILER-DAEMON Fri Sep 16 22:26:51 2016", "From ???@??? Fri Sep 16 22:26:51 2016", "From ann@x.org Fri, 16 Sep 2016 22:26:51 +0000",
        "From \"Ann Bell\" Fri Sep 16 22:26:51 2016", "From ann at x.org  Fri Sep 16 22:26:51 2016",
    ],
)  # fmt: skip
@pytest.mark.parametrize("between", ["", "\n"])
def test_mails_begin_where_an_envelope_stands_above_headers(envelope, between):
    body = "One.\nFrom my side: two remarks.\n\nFrom here on it is quiet.\nFrom: nobody\n>From the sea\nFrom Friday to Sunday 10:15\nwe sail.\n"
    mail = f"{envelope}\nFrom: ann@x.org\nSubject: x\n\n{body}{between}"
    mails = list(split_mbox(io.BytesIO((mail * 3).encode())))
    assert len(mails) == 3
    assert all(one.decode().rstrip() == mail.partition("\n")[2].replace(">From", "From").rstrip() for one in mails)
