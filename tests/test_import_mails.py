"""Mailboxes: cut where mails end, decoded, without quotes and signatures."""

import io
from email.message import EmailMessage

import pytest
import writing_fixtures as planted
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_fixtures import mail, mbox, prose, read

from perce_lite.data.importers.mails import plain_text, read_mail, split_mbox
from perce_lite.data.importers.quotes import own_words
from perce_lite.data.importers.writings import Notes, Writing


def of_mail(message: EmailMessage) -> Writing | None:
    found = read_mail(message.as_bytes(), "m", Notes())
    return None if found is None else found[2]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_mailbox_is_cut_between_mails_and_nowhere_else(line_end):
    body = f"{prose(1)}\n\nFrom here on it is quiet.\nFrom the sea no sound."
    content = mbox(mail("Ann <ann@x.org>", "A", body), mail("ann@x.org", "B", prose(2)), line_end=line_end)
    mails = [read_mail(one, "m", Notes()) for one in split_mbox(io.BytesIO(content))]
    assert [one and one[2].text for one in mails] == [body, prose(2)]
    assert [(one[0], one[1]) for one in mails if one] == [("ann@x.org", "Ann"), ("ann@x.org", "")]


def test_as_the_standard_library_cuts_it(tmp_path):
    import mailbox

    content = mbox(*(mail("ann@x.org", f"S{number}", prose(number)) for number in range(5)))
    (tmp_path / "m").write_bytes(content)
    theirs = [bytes(one) for one in mailbox.mbox(tmp_path / "m")]
    assert [one.strip() for one in split_mbox(io.BytesIO(content))] == [one.strip() for one in theirs]


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", "koi8-r", "iso-2022-jp"])
@pytest.mark.parametrize("cte", ["base64", "quoted-printable"])
def test_encodings_of_mails(charset, cte):
    text = {"koi8-r": "Сегодня снег и ветер", "iso-2022-jp": "今日は雪です"}.get(charset, "Grüße aus Köln, voilà")
    found = of_mail(mail("Jürgen <j@x.org>", f"Re: AW: {text}", text, charset=charset, cte=cte))
    assert found is not None
    assert (found.text, found.title, found.date) == (text, text, "2024-05-01T10:15:00")


@pytest.mark.parametrize("charset", ["no-such-charset", "us-ascii", "punycode", "hex"])
def test_a_charset_that_is_a_lie(charset):
    raw = f"From: a@x.org\nContent-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: 8bit\n\n".encode()
    found = read_mail(raw + "Grüße und Küsse".encode("cp1252"), "m", Notes())
    assert found is not None
    assert found[2].text == "Grüße und Küsse"


def test_broken_headers_are_no_end():
    raw = b"From: =?utf-8?b?AAA?= <a@x.org\nSubject: =?xx?q?=ff?=\nDate: someday\n\n" + prose(1).encode()
    found = read_mail(raw, "m", Notes())
    assert found is not None
    assert (found[2].text, found[2].date) == (prose(1), None)


def test_the_plain_part_counts_and_attachments_do_not():
    message = mail("a@x.org", "S", prose(1), html=f"<p>{prose(2)}</p>")
    message.add_attachment("Attached words that somebody else may have written", filename="x.txt")
    message.add_attachment(mail("b@x.org", "Fwd", prose(3)))
    found = of_mail(message)
    assert found is not None
    assert found.text == prose(1)


def test_html_alone_is_read_without_markup_and_quotes():
    html = (
        "<html><head><title>No</title><style>p {}</style></head><body><p>Caf&eacute; &amp; rain<br>again</p>"
        "<div>Yours</div><blockquote>Old <blockquote>older</blockquote> words</blockquote>"
        '<div class="gmail_quote">On Friday Bob wrote: <div>old</div> still old</div><p>PS: done</p></body></html>'
    )
    found = of_mail(mail("a@x.org", "S", "", html=html))
    assert found is not None
    assert found.text.split() == "Café & rain again Yours PS: done".split()
    assert plain_text("a<script>b</script>c<p>d") == "ac\n\nd"


def test_a_mail_without_text_is_noted():
    message = EmailMessage()
    message["From"] = "a@x.org"
    message.add_attachment(b"\0\1", maintype="image", subtype="png")
    notes = Notes()
    assert read_mail(message.as_bytes(), "m", notes) is None
    assert notes.skipped == {"a mail without text": ["m"]}


@pytest.mark.parametrize(
    "below",
    [
        "\n\nOn Fri, 3 May 2024 at 10:15, Bob <bob@x.org> wrote:\n> old\n>> older\n",
        "\n\nOn Friday the third of May 2024 at a quarter past ten,\nBob <bob@x.org> wrote:\n\n> old",
        "\n\nAm 03.05.2024 um 10:15 schrieb Bob Bell <bob@x.org>:\n> old",
        "\n\nLe 3 mai 2024 à 10:15, Bob a écrit :\n> old",
        "\n\nBob wrote:\n> old",
        "\n\nOn Fri, 3 May 2024, Bob wrote:\n",
        "\n-- \nAnn Bell\nLighthouse 4",
        "\n--\nAnn",
        "\n\n-----Original Message-----\nFrom: Bob\nSubject: x\n\nold",
        "\n\nFrom: Bob <b@x.org>\nSent: Friday\nTo: Ann\n\nold",
        "\n\nSent from my iPhone",
        "\n\n-- \nAnn\n\nOn Fri, Bob wrote:\n> old",
    ],
)
def test_what_is_quoted_or_signed_is_cut(below):
    said = "Thanks, I read it twice.\n\nFrom Monday on I am at sea -- really."
    assert own_words(said + below) == said
    assert own_words((said + below).replace("\n", "\r\n")) == said


def test_answers_between_quotes_stay_and_so_does_what_only_looks_like_one():
    body = "Hello,\n\nOn the 3rd I sailed.\n\nBob wrote:\n> First?\nYes.\n\n> Second?\nNo. He wrote:\nnothing at all."
    assert own_words(body) == "Hello,\n\nOn the 3rd I sailed.\n\nYes.\n\nNo. He wrote:\nnothing at all."
    assert own_words("This is what he wrote:") == "This is what he wrote:"


def test_lines_that_flow_are_joined():
    message = mail("a@x.org", "S", "x")
    message.set_content("One line that \ngoes on. \nHere.\nNext.\n\n-- \nAnn\n")
    message.set_param("format", "flowed")
    found = of_mail(message)
    assert found is not None
    assert found.text == "One line that goes on. Here.\nNext."


HEADS = [
    b"From x\n",
    b"From: a@x.org\n",
    b"Subject: =?utf-8?q?=ff?=\n",
    b"Date: 99\n",
    b"Content-Type: multipart/mixed; boundary=b\n",
    b"Content-Type: text/plain; charset=\xff\n",
    b"Content-Type: text/html; format=flowed\n",
    b"--b\n",
    b"--b--\n",
    b"\n",
    b"Content-Transfer-Encoding: base64\n",
    b"Content-Type: message/rfc822\n",
    b"aGk=\n",
    b"<p>x<head>\n",
    b"> x\n",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(HEADS), max_size=12))
def test_no_mail_breaks_the_reader(lines):
    for content in split_mbox(lines):
        read_mail(content, "m", Notes())


def test_a_mail_that_is_nested_too_deeply_is_left_out(tmp_path):
    layers = (f"Content-Type: multipart/mixed; boundary=b{number}\n\n--b{number}\n" for number in range(3000))
    nested = b"From: a@x.org\n" + "".join(layers).encode() + b"Content-Type: text/plain\n\nHello.\n"
    found, notes = read(planted.write(tmp_path, {"a.eml": nested, "b.eml": mail("a@x.org", "S", prose(1)).as_bytes()}))
    assert [one.text for one in found] == [prose(1)]
    assert notes.skipped == {"a mail that is nested too deeply": ["a.eml"]}


def test_what_word_puts_into_html():
    assert plain_text("a<![if !supportLists]>b<![endif]><![strange[c]]>d<!-- e --><o:p></o:p>f") == "abdf"
    assert plain_text("a<![--\nb") == "a"
